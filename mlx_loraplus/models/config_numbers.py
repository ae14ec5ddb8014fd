"""Check the numbers in a model's config.json that determine its shapes."""

import math
from typing import Any

from ..errors import ModelError
from .rope_parameters import TEXT_PARTS, text_part

LARGEST = 2**31 - 1
"""The largest size of an array's axis in MLX."""
_MOST_LAYERS = 10_000  # more would take hours to make before any error

_POSITIONS = ("max_position_embeddings", "n_positions")
"""Counts that are no sizes of arrays in most families, and may be larger."""

LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
"""Names of the field with the number of layers; they vary by family."""

_COUNTS = (
    *LAYERS, "hidden_size", "n_embd", "d_model", "vocab_size",
    "num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads", "head_dim",
    "intermediate_size", *_POSITIONS,
)  # fmt: skip
"""Whole numbers that are at least 1 in every model. Some families have a list of them."""

_OPTIONAL = ("num_key_value_heads", "num_kv_heads", "head_dim", "intermediate_size",
             *_POSITIONS)  # fmt: skip
"""Counts that may be null, which means the family's default."""

_NORMS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps",
    "norm_epsilon",
)  # fmt: skip
"""Small positive numbers that a norm adds to the mean square."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

_QUANTIZATIONS = ("quantization", "quantization_config")
"""Settings that are dictionaries, or null for a model that is not quantized."""

_SCALED_BY_FACTOR = ("linear", "dynamic", "yarn", "llama3")
"""Types of ``rope_scaling`` that need a factor."""


def check_numbers(config: dict[str, Any]) -> None:
    """Check the sizes in a config, or in the language model's part of a multimodal one.

    Raises:
        ModelError: A part is not an object, a size is not a positive whole number, a norm's
            epsilon is not a positive number, a quantization or a ``rope_scaling`` has the wrong
            form, a ``rope_scaling`` lacks its type or factor, or more experts are chosen for a
            token than there are.
    """
    for name in TEXT_PARTS:
        if not isinstance(config.get(name) or {}, dict):
            raise _wrong(name, config[name], "an object with the language model's fields")

    part = text_part(config)
    for name in _QUANTIZATIONS:
        for holder in (config, part):
            if not isinstance(holder.get(name) or {}, dict):
                raise _wrong(name, holder[name], "what the program that quantized it wrote")
    for name in _COUNTS:
        if name in part:
            _check_count(name, part[name])
    for name in _NORMS:
        if name in part and not _is_positive(part[name]):
            raise _wrong(name, part[name], "a small positive number, such as 1e-06")
    _check_experts(part)
    _check_scaling(part)


def _check_count(name: str, value: Any) -> None:
    """Check a count, or a list with one for each layer."""
    if value is None and name in _OPTIONAL:
        return
    values: list[Any] = value if isinstance(value, list) and value else [value]
    for number in values:
        if not _is_positive(number) or number != int(number):
            raise _wrong(name, value, "a whole number of at least 1")
        most = _MOST_LAYERS if name in LAYERS else LARGEST
        if number > most and name not in _POSITIONS:
            raise _wrong(name, value, f"a whole number from 1 to {most:,}")


def _check_experts(part: dict[str, Any]) -> None:
    """Check how many experts are chosen for each token, in a part that has experts."""
    chosen: Any = part.get("num_experts_per_tok")
    for name in _EXPERTS:
        experts: Any = part.get(name)
        if not isinstance(experts, int) or not experts or chosen is None:
            continue
        if not _is_positive(chosen) or not chosen <= experts:
            raise _wrong("num_experts_per_tok", chosen, f"1 to {name}, which is {experts}")


def _check_scaling(part: dict[str, Any]) -> None:
    """Check the form of ``rope_scaling``, and its factor."""
    scaling: Any = part.get("rope_scaling")
    if not scaling:
        return
    if not isinstance(scaling, dict):
        raise _wrong("rope_scaling", scaling, 'null, or as in {"rope_type": "linear", "factor": 2}')

    kind = scaling.get("rope_type") or scaling.get("type")
    if kind is None and "factor" in scaling:
        types = ", ".join(_SCALED_BY_FACTOR)
        raise _wrong("rope_scaling", scaling, f"a rope_type beside the factor, such as {types}")
    if kind in _SCALED_BY_FACTOR and "factor" not in scaling:
        raise _wrong("rope_scaling", scaling, f"a factor beside the type {kind!r}, such as 2.0")


def _is_positive(value: Any) -> bool:
    """Return whether a value is a number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def _wrong(name: str, value: Any, allowed: str) -> ModelError:
    """Return the error for a value that is not allowed."""
    return ModelError(
        f"its config.json has {name} {value!r:.80}; allowed is {allowed}: correct config.json, or"
        " get the folder again"
    )
