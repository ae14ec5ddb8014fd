"""Refuse a family that mlx-lm can't train before its weights are downloaded."""

from dataclasses import dataclass
from importlib.metadata import version

from mlx_lm.utils import _get_classes  # pyright: ignore[reportPrivateUsage]

from ..device import backend
from ..errors import ModelError
from .find_model import find_config
from .known_models import CHOSEN_BY_MEMORY, KNOWN, relatives
from .skeleton import config_of, read_config

_CHECKED_VERSION = "0.32.2"


@dataclass(frozen=True)
class _Untrainable:
    """The reason why a family can't be trained, and the nearest model that can."""

    reason: str
    instead: str


_NO_GRADIENT = "its choice of experts has no gradient"

_UNTRAINABLE = {
    "bitnet": _Untrainable("no adapter fits its layers of ternary weights", "llama-3.2-3b"),
    "deepseek_v41": _Untrainable(_NO_GRADIENT, "qwen3.5-35b-a3b"),
    "deepseek_v41_text": _Untrainable(_NO_GRADIENT, "qwen3.5-35b-a3b"),
    "gemma3n": _Untrainable("it computes other logits with caches than without", "gemma-4-e2b-it"),
    "phi3small": _Untrainable("its code is for one vocabulary only", "phi-4-mini"),
    "recurrent_gemma": _Untrainable("its class is not a complete module", "gemma-3-4b-it"),
}
"""The hub's model_type → why mlx-lm of the checked version can't train it. Source: the results of
scripts/judges/families."""

_UNTRAINABLE_ON_METAL = {
    "rwkv7": _Untrainable("its Metal kernel has no gradient", "qwen3.5-0.8b"),
}
"""The same for what mlx-lm can't train on a Mac alone."""


def check_trainable(name: str) -> None:
    """Check that mlx-lm can train the family of a model. Only its config is downloaded.

    Raises:
        ModelError: mlx-lm can't train it, or needs a package for it. The message names models that
            can be trained instead.
    """
    try:
        path = None if name in KNOWN else find_config(name)
    except ModelError:
        return  # loading the model reports it

    config = read_config(path) if path else config_of(name)
    model_type = config["model_type"]
    found = _UNTRAINABLE.get(model_type)
    if backend() == "metal":
        found = found or _UNTRAINABLE_ON_METAL.get(model_type)
    if found and version("mlx-lm") == _CHECKED_VERSION:
        raise ModelError(
            f"mlx-lm {_CHECKED_VERSION} can't train {name}, a {model_type}: {found.reason}; the"
            f" nearest model that can be trained is --model {found.instead}"
        )
    if not _is_known(model_type):
        raise ModelError(
            f"mlx-lm {version('mlx-lm')} has no models of type {model_type!r:.60}, so {name}"
            f" can't be trained: {_relatives(model_type)}"
        )


def _is_known(model_type: str) -> bool:
    """Return whether mlx-lm has code for a model_type."""
    try:
        _get_classes({"model_type": model_type})
    except ValueError as problem:
        return "not supported" not in str(problem)
    except Exception:  # noqa: BLE001  other problems are reported when the model is made
        return True
    return True


def _relatives(model_type: str) -> str:
    """Return advice that names the models of the same family that have short names."""
    names = relatives(model_type)
    if not names:
        chosen = " or ".join(CHOSEN_BY_MEMORY)
        return f"use a newer mlx-lm, or another model, such as {chosen} (--list-models)"
    return f"use a newer mlx-lm, or another model of its family: {', '.join(names[:4])}"
