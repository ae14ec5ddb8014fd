"""Compare details of scaled positions in a config with what mlx-lm's rotary layers compute.

YaRN and LongRoPE also multiply the rotated vectors by a factor. mlx-lm does not read every field
that determines it in transformers.

Source: transformers 5.24, ``modeling_rope_utils.py``.
"""

import math
from collections.abc import Iterator
from typing import Any

import mlx.nn as nn
from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE

from ..errors import ModelError
from .rope_parameters import KEY, text_part

_CLOSE = 1e-4


def check_magnitude(model: nn.Module, config: dict[str, Any]) -> None:
    """Check that a model multiplies rotated vectors by the factor that its config requires.

    Raises:
        ModelError: mlx-lm computes another factor.
    """
    for layer, scaling in _scaled_layers(model, config):
        if isinstance(layer, YarnRoPE):
            expected, computed = _yarn_factor(scaling), layer.mscale
        else:
            expected, computed = _long_factor(scaling), _factor_of(layer)
        if expected is None or math.isclose(expected, computed, rel_tol=_CLOSE):
            continue
        raise ModelError(
            f"its config.json scales rotated vectors by {expected:.6g} (attention_factor, factor"
            f" or mscale of {_name(scaling)}), but mlx-lm's {config['model_type']} by"
            f" {computed:.6g}, so its outputs would be wrong; use a newer mlx-lm, or another model"
        )


def positions_note(model: nn.Module, config: dict[str, Any]) -> str | None:
    """Return a note for the user if mlx-lm approximates the positions of a model, else None."""
    for layer, scaling in _scaled_layers(model, config):
        if isinstance(layer, YarnRoPE) and scaling.get("truncate") is False:
            return (
                "config.json has YaRN with truncate false, and mlx-lm rounds the limits of its"
                " range of frequencies; the outputs differ a little from those of transformers"
            )
        if isinstance(layer, SuScaledRoPE):
            original = layer.original_max_position_embeddings
            if scaling.get("short_factor") != scaling.get("long_factor"):
                return (
                    "config.json scales positions differently for texts of up to"
                    f" {original:,} tokens (short_factor) and longer ones (long_factor), but mlx-lm"
                    " uses"
                    " long_factor for all; on shorter texts, the outputs differ from those of"
                    " transformers"
                )
    return None


def _scaled_layers(
    model: nn.Module, config: dict[str, Any]
) -> Iterator[tuple[YarnRoPE | SuScaledRoPE, dict[str, Any]]]:
    """Yield each rotary layer with YaRN or LongRoPE, and the settings that it follows."""
    part = text_part(config)
    stored = part.get(KEY) or config.get(KEY) or part.get("rope_scaling")
    if not isinstance(stored, dict):
        return

    # transformers 5 may have settings for each kind of layer.
    nested = [value for value in stored.values() if isinstance(value, dict)]
    by_name = {_name(scaling): scaling for scaling in nested or [stored]}
    for module in model.modules():
        if isinstance(module, YarnRoPE) and "yarn" in by_name:
            yield module, by_name["yarn"]
        if isinstance(module, SuScaledRoPE) and "longrope" in by_name:
            yield module, by_name["longrope"]


def _name(scaling: dict[str, Any]) -> str:
    """Return the kind of a scaling."""
    kind = str(scaling.get("rope_type") or scaling.get("type"))
    return "longrope" if kind == "su" else kind


def _yarn_factor(scaling: dict[str, Any]) -> float:
    """Return the factor of YaRN in transformers."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def magnitude(scale: float) -> float:
        factor = scaling["factor"]
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    both, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return magnitude(both) / magnitude(all_dims) if both and all_dims else magnitude(1)


def _long_factor(scaling: dict[str, Any]) -> float | None:
    """Return the factor of LongRoPE in transformers; None if mlx-lm follows the same rule."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if factor is None or original is None or "long_mscale" in scaling:
        return None
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _factor_of(layer: SuScaledRoPE) -> float:
    """Return the factor that a LongRoPE layer applies; mlx-lm has no public name for it."""
    return layer._scale  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
