"""A copy of a model that computes in float32, for questions that half precision can't decide."""

from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapters.tensor_parallel import is_sharded
from ..device import room_for_copy
from ..models.derived_weights import forget_derived
from ..models.loading import shared_copy

Result = TypeVar("Result")


def in_float32(model: nn.Module, ask: Callable[[nn.Module], Result]) -> Result:
    """Return ``ask(model)``, computed on a copy of the model in float32.

    The model itself is used if it computes in float32 already; if its weights are quantized to
    types that give half precision; if it is divided among processes; or if there is no room for
    the copy. Quantized weights keep their bits in the copy.
    """
    if not _is_possible(model):
        return ask(model)

    copied = shared_copy(model)
    copied.set_dtype(mx.float32)
    forget_derived(copied)
    try:
        return ask(copied)
    finally:
        del copied
        mx.clear_cache()


def _is_possible(model: nn.Module) -> bool:
    """Return whether a copy in float32 is needed and possible."""
    needed = 0
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, array in arrays.items():
        if name.endswith(".scales") and not mx.issubdtype(array.dtype, mx.floating):
            return False
        if mx.issubdtype(array.dtype, mx.floating) and array.itemsize < mx.float32.size:
            needed += mx.float32.size * array.size

    return needed > 0 and not is_sharded(model) and needed <= room_for_copy()
