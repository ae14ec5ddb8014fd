"""Check that a model from Python has the form of mlx-lm's language models."""

import inspect

import mlx.nn as nn

from ..errors import ModelError


def check_language_model(model: nn.Module) -> None:
    """Check that a model has transformer blocks, and takes tokens and caches, as mlx-lm's do.

    Raises:
        ModelError: It does not.
    """
    missing = ""
    if not hasattr(model, "layers"):
        missing = "it has no layers"
    elif not _takes_caches(model):
        missing = "it takes no cache"
    if missing:
        raise ModelError(
            f"a {type(model).__name__} is not a language model of mlx-lm, because {missing}: model,"
            " tokenizer = mlx_loraplus.load(name) loads one"
        )


def _takes_caches(model: nn.Module) -> bool:
    """Return whether a model can be called with caches."""
    parameters = inspect.signature(type(model).__call__).parameters.values()
    return any(each.name == "cache" or each.kind is each.VAR_KEYWORD for each in parameters)
