"""Name the array of a model that explains why it computes no usable logits."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ModelError, counted
from .weight_files import index_tensors

_OF_ADAPTER = ("lora_a", "lora_b", "vera_d", "vera_b", "m")

_MAY_BE_ZERO = ("bias", "biases", *_OF_ADAPTER)

_WEIGHTS = (*_MAY_BE_ZERO, "weight", "scales")
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
    arrays: Any = tree_flatten(model.parameters())
    damaged: dict[str, list[str]] = {problem: [] for problem in _PROBLEMS}
    for name, array in arrays:
        if problem := _problem_of(name, array):
            damaged[problem].append(name)

    for problem, names in damaged.items():
        if names:
            count, verb = len(names) - 1, "does" if len(names) == 2 else "do"
            others = f", as {counted(count, 'other array')} {verb}" if count else ""
            found = f"its array {_place_of(model, names[0])} {problem}{others}"
            if _is_of_adapter(names[0]):
                return f"{found}: train the adapter again with a lower learning rate"
            return f"{found}: get the model again, or use another one"

    weights, advice = "its weights", "get the model again, or use another one"
    if any(_is_of_adapter(name) for name, _ in arrays):
        weights = "its weights or those of its adapter"
        advice = "use it without the adapter; if it fails too, get the model again"
    return (
        f"{weights} are damaged, too large for their type, or do not fit its config.json: {advice}"
    )


def _is_of_adapter(name: str) -> bool:
    """Return whether an array belongs to an adapter, not to its base."""
    return name.rpartition(".")[2] in _OF_ADAPTER


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
