"""A model's config before anything is downloaded, and its skeleton: the model without any of its weights."""

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes  # pyright: ignore[reportPrivateUsage]

from ..errors import ModelError
from ..files import read_bounded
from .hub_config import check_config, for_mlx_lm
from .known_models import KNOWN
from .registry import find_config

VISION_BYTES = 840_000_000
"""Of the vision tower that the repositories of Gemma 3 4B and larger hold besides; mlx-lm leaves it out."""


def config_of(name: str) -> dict[str, Any]:
    """Return the config of a model: of a short name as known.py has it, of all others from their config.json.

    Raises:
        ModelError: There is no such model, or its config can't be had.
    """
    if name in KNOWN:
        quantization = {"quantization": {"group_size": 64, "bits": 4}}
        return KNOWN[name].config | (quantization if KNOWN[name].repo.endswith("4bit") else {})
    return read_config(find_config(name))


def read_config(path: Path) -> dict[str, Any]:
    """Return what a config.json says.

    Raises:
        ModelError: It is no JSON, or does not say what kind of model it is.
    """
    try:
        config = json.loads(read_bounded(path))
    except (ValueError, OSError, RecursionError) as problem:
        raise ModelError(f"{path} is not JSON: {problem!s:.200}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} has no model_type, so its kind of model is not known")
    _check_installed(config["model_type"])
    return config


def _check_installed(kind: str) -> None:
    """Raise ModelError where mlx-lm's code for the kind of model ends the process because a package is missing."""
    try:
        _get_classes({"model_type": kind})
    except SystemExit:
        raise ModelError(
            f"mlx-lm needs a package that is not installed for models of the kind {kind}: "
            f"python -c 'import mlx_lm.models.{kind}' names it"
        ) from None
    except Exception:  # noqa: BLE001  told better where the model is made
        return


def make_skeleton(config: dict[str, Any]) -> nn.Module:
    """Return the model of a config as mlx-lm makes it, quantized as the config says; no array of it is ever computed.

    Raises:
        ModelError: mlx-lm does not know the model, or can't make it from this config.
    """
    high, low = mx.random.state[0].tolist()  # pyright: ignore[reportIndexIssue]
    try:
        config = for_mlx_lm(copy.deepcopy(config))  # mlx-lm's classes write into it
        model_class, args_class = _get_classes(config)
        text = config.get("text_config", config)
        model: Any = model_class(args_class.from_dict(config))
        inner = getattr(model, "language_model", model)
        if (
            text.get("tie_word_embeddings", text["model_type"].startswith("gemma"))
            and "lm_head" in inner
        ):
            inner.pop("lm_head")
            inner.tie_word_embeddings = True
        check_config(model, config)
        if settings := config.get("quantization"):
            _quantize(model, settings)
    except ModelError:
        raise
    # mlx-lm's model classes answer a strange config with errors of every kind
    except (Exception, SystemExit) as problem:  # noqa: BLE001
        raise ModelError(
            f"mlx-lm can't make a model of this config: {type(problem).__name__}: {problem!s:.200}"
        ) from None
    finally:
        mx.random.seed(high << 32 | low)  # a caller's own numbers stay what they would have been
    return model


def _quantize(model: nn.Module, settings: dict[str, Any]) -> None:
    """Quantize what mlx-lm's converter would, some layers in their own way where the config says so."""
    group = settings["group_size"]

    def how(path: str, module: Any) -> Any:
        if path in settings:
            return settings[path]
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group == 0

    nn.quantize(
        model, group, settings["bits"], mode=settings.get("mode", "affine"), class_predicate=how
    )
