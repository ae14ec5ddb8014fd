"""Check that a model from Python has the form of mlx-lm's language models."""

import inspect

import mlx.nn as nn

from ..errors import ModelError


def check_blocks(model: nn.Module) -> None:
    """Check that a model has transformer blocks where mlx-lm's models have them.

    Raises:
        ModelError: It has none.
    """
    if not hasattr(model, "layers"):
        raise _no_language_model(model, "has no layers")


def check_language_model(model: nn.Module) -> None:
    """Check that a model has transformer blocks and takes caches, so that it can generate.

    Raises:
        ModelError: It does not.
    """
    check_blocks(model)
    parameters = inspect.signature(type(model).__call__).parameters.values()
    if not any(each.name == "cache" or each.kind is each.VAR_KEYWORD for each in parameters):
        raise _no_language_model(model, "takes no cache")


def _no_language_model(model: nn.Module, why: str) -> ModelError:
    return ModelError(
        f"the model, a {type(model).__name__}, is not a language model of mlx-lm, because it {why}:"
        " model, tokenizer = mlx_loraplus.load(name) loads one"
    )
