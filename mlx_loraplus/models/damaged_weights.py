"""Name the array of a model that explains why it computes no usable logits."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ModelError, counted
from .weight_files import index_tensors

_MAY_BE_ZERO = ("bias", "biases", "lora_b")

_HUGE = 1e12
"""No trained weight is larger. The square of a larger product overflows float32."""


def describe_damage(model: nn.Module) -> str:
    """Return which array of a model is damaged, and what to do, for an error message.

    Numbers that are not finite come first, then huge ones, then arrays of zeros. If several arrays
    are damaged alike, the first in the model's order is named, with the number of the others.
    """
    advice = "get the model again, or use another one"
    kinds: tuple[tuple[str, Callable[[mx.array], mx.array]], ...] = (
        ("holds NaN", lambda array: mx.isnan(array).any()),
        ("holds infinite numbers", lambda array: mx.isinf(array).any()),
        (f"holds numbers above {_HUGE:g}", lambda array: mx.abs(array).max() > _HUGE),
        ("holds only zeros", lambda array: mx.logical_not(array.any())),
    )
    arrays: Any = tree_flatten(model.parameters())
    for problem, is_damaged in kinds:
        names: list[str] = []
        for name, array in arrays:
            if not mx.issubdtype(array.dtype, mx.floating) or name.endswith(_MAY_BE_ZERO):
                continue
            if array.size and is_damaged(array).item():
                names.append(name)
        if names:
            others = f" (and so do {counted(len(names) - 1, 'other array')})" if names[1:] else ""
            return f"its array {_place_of(model, names[0])} {problem}{others}: {advice}"
    return (
        "its weights are damaged, too large for their type, or do not fit its config.json:"
        f" {advice}"
    )


def _place_of(model: nn.Module, name: str) -> str:
    """Return the name of an array as it is stored, and its file if the model's folder is known."""
    folder: Path | None = getattr(getattr(model, "origin", None), "folder", None)
    if folder is None:
        return name

    # Below an adapter, the base has one more level.
    stored = name.replace(".linear.", ".").replace(".embedding.", ".")
    with suppress(ModelError, OSError):
        tensors = index_tensors(folder)
        return f"{stored} in {tensors.get(stored, folder)}"
    return stored
