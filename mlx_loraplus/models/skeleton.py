"""Make a model's skeleton, which is the model without weights, and read the config it needs."""

import copy
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _get_classes  # pyright: ignore[reportPrivateUsage]

from ..device import kept_random_state
from ..errors import ModelError
from ..files import read_bounded
from .config_problems import explain_problem
from .config_translation import check_config, for_mlx_lm
from .find_model import find_config
from .known_models import KNOWN, relatives
from .layer_kinds import check_runs

VISION_BYTES = 840_000_000
"""Size of the vision tower in repositories of Gemma 3 4B and larger. mlx-lm does not load it."""


def config_of(name: str) -> dict[str, Any]:
    """Return the config of a model: from ``models.toml`` for a short name, else from config.json.

    Raises:
        ModelError: The model does not exist, or its config can't be read.
    """
    if name not in KNOWN:
        return read_config(find_config(name))

    known = KNOWN[name]
    if known.repo.endswith("4bit"):
        return known.config | {"quantization": {"group_size": 64, "bits": 4}}
    if known.repo.endswith("MXFP4-Q8"):
        return known.config | {"quantization": _experts_in_mxfp4(known.config)}
    return dict(known.config)


def _experts_in_mxfp4(config: dict[str, Any]) -> dict[str, Any]:
    """Return the quantization of a gpt-oss whose experts stay in MXFP4, with the rest in 8 bits."""
    quantization: dict[str, Any] = {"group_size": 64, "bits": 8, "mode": "affine"}
    for layer in range(config["num_hidden_layers"]):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            path = f"model.layers.{layer}.mlp.experts.{matrix}"
            quantization[path] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    return quantization


def read_config(path: Path) -> dict[str, Any]:
    """Return the contents of a config.json.

    Raises:
        ModelError: The file is not JSON or has no model_type, or mlx-lm needs a package for this
            model_type that is not installed.
    """
    try:
        config = json.loads(read_bounded(path).decode("utf-8"))  # mlx-lm reads no other encoding
    except (ValueError, OSError, RecursionError) as problem:
        raise ModelError(f"{path} is not JSON: {problem!s:.200}") from None

    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} has no model_type, so its architecture is not known")
    _check_installed(config["model_type"])
    return config


def _check_installed(model_type: str) -> None:
    """Raise if mlx-lm's code for a model type needs a package that is not installed.

    In this case mlx-lm would exit the process. Other errors are reported when the model is made.
    """
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            _get_classes({"model_type": model_type})
    except SystemExit:
        advice = " ".join(printed.getvalue().split()) or "no package is named"
        names = relatives(model_type)[:4]
        other = f"; or use another model of its family: {', '.join(names)}" if names else ""
        raise ModelError(
            f"mlx-lm needs a package that is not installed for models of type {model_type}:"
            f" {advice}{other}"
        ) from None
    except Exception:  # noqa: BLE001
        return


def make_skeleton(config: dict[str, Any]) -> nn.Module:
    """Return the model that mlx-lm makes from a config, quantized as in the config.

    The model's arrays are never computed, so it uses no memory.

    Raises:
        ModelError: mlx-lm does not support the model, or can't make it from this config.
    """
    # Making the layers draws random numbers.
    try:
        with kept_random_state():
            return _make_model(for_mlx_lm(copy.deepcopy(config)))  # a copy, as mlx-lm changes it
    except ModelError:
        raise
    # mlx-lm's model classes may raise any kind of error for an unexpected config.
    except (Exception, SystemExit) as problem:  # noqa: BLE001
        raise ModelError(
            explain_problem(config, problem)
            or f"mlx-lm can't make a model of this config: {type(problem).__name__}:"
            f" {problem!s:.200}"
        ) from None


def _make_model(config: dict[str, Any]) -> nn.Module:
    """Make the model, and apply the same changes as when its weights are loaded."""
    model_class, args_class = _get_classes(config)
    model: Any = model_class(args_class.from_dict(config))

    # Loading a tied model removes its head.
    text = config.get("text_config", config)
    is_tied = text.get("tie_word_embeddings", text["model_type"].startswith("gemma"))
    inner = getattr(model, "language_model", model)
    if is_tied and "lm_head" in inner:
        inner.pop("lm_head")
        inner.tie_word_embeddings = True

    check_config(model, config)
    check_runs(model, config)
    if settings := config.get("quantization"):
        _quantize(model, settings)
    return model


def _quantize(model: nn.Module, settings: dict[str, Any]) -> None:
    """Quantize the same layers as mlx-lm's converter; a layer may have its own settings."""
    group_size = settings["group_size"]

    def settings_for(path: str, module: Any) -> Any:
        if path in settings:
            return settings[path]
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    nn.quantize(
        model,
        group_size,
        settings["bits"],
        mode=settings.get("mode", "affine"),
        class_predicate=settings_for,
    )
