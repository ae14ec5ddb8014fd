"""Name the array of a model that explains why it computes no usable logits."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ModelError, counted
from .weight_files import index_tensors

_MAY_BE_ZERO = ("bias", "biases", "lora_b")

_WEIGHTS = (*_MAY_BE_ZERO, "weight", "scales", "lora_a", "m")
"""The names of learned arrays. Others, such as masks, may hold huge or infinite values."""

_HUGE = 1e12
"""No trained weight is larger. The square of a larger product overflows float32."""

_PROBLEMS = (
    "holds NaN",
    "holds infinite values",
    f"holds values above {_HUGE:g}",
    "holds only zeros",
)


def describe_damage(model: nn.Module) -> str:
    """Return which array of a model is damaged, and what to do, for an error message.

    Values that are not finite come first, then huge ones, then matrices of zeros. If several
    arrays are damaged alike, the first in the model's order is named, with the number of the
    others.
    """
    advice = "get the model again, or use another one"
    arrays: Any = tree_flatten(model.parameters())
    damaged: dict[str, list[str]] = {problem: [] for problem in _PROBLEMS}
    for name, array in arrays:
        if problem := _problem_of(name, array):
            damaged[problem].append(name)

    for problem, names in damaged.items():
        if names:
            count, verb = len(names) - 1, "does" if len(names) == 2 else "do"
            others = f", as {counted(count, 'other array')} {verb}" if count else ""
            return f"its array {_place_of(model, names[0])} {problem}{others}: {advice}"
    return (
        "its weights are damaged, too large for their type, or do not fit its config.json:"
        f" {advice}"
    )


def _problem_of(name: str, array: mx.array) -> str:
    """Return the first of the problems that an array has, or an empty text."""
    if not array.size or not mx.issubdtype(array.dtype, mx.floating):
        return ""
    last = name.rpartition(".")[2]
    is_weight = last in _WEIGHTS
    # A vector of zeros may be right, such as the weight of a norm that multiplies by 1 + weight.
    is_matrix = array.ndim >= 2 and last not in _MAY_BE_ZERO

    found = (
        mx.isnan(array).any(),
        mx.isinf(array).any() & is_weight,
        (mx.abs(array).max() > _HUGE) & is_weight,
        mx.logical_not(array.any()) & is_matrix,
    )
    for problem, is_damaged in zip(_PROBLEMS, found, strict=True):
        if is_damaged.item():
            return problem
    return ""


def _place_of(model: nn.Module, name: str) -> str:
    """Return the name of an array as it is stored, and its file if the model's folder is known."""
    folder: Path | None = getattr(getattr(model, "origin", None), "folder", None)
    if folder is None:
        return name

    # Below an adapter, the base has one more level.
    shortened = name.replace(".linear.", ".").replace(".embedding.", ".")
    with suppress(ModelError, OSError):
        tensors = index_tensors(folder)
        stored = shortened if name not in tensors and shortened in tensors else name
        return f"{stored} in {tensors.get(stored, folder)}"
    return name
