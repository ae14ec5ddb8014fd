"""Write a fused model's weights under the names and in the shapes of its base's files.

mlx-lm's ``sanitize`` turns the tensors of a checkpoint into a model's weights. It renames them, and
it joins, splits and transposes them: the experts of a block become one weight, for example.
transformers looks for the tensors of the checkpoint, so a fused model is written in their form.

No table of families is needed. Where ``sanitize`` only renames a tensor, it returns the same array
under another name. Elsewhere it moves numbers, and may add a constant: w = P x + c, where each row
of P has a single 1. The inverse is x = Pᵀ (w - c), and the product with Pᵀ is the vector-Jacobian
product of ``sanitize``. The result passes through ``sanitize`` again, and is used only if the fused
weights come back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..models.loading import shared_copy
from .fused_layer import is_floating, is_quantized


def stored_tensors(folder: Path) -> dict[str, mx.array]:
    """Return the tensors of a model's folder; they are read from disk when they are used."""
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        loaded: Any = mx.load(str(file))
        tensors |= loaded
    return tensors


def has_base_form(model: nn.Module, base: Path) -> bool:
    """Return whether ``in_base_form`` can express a fused model's weights.

    Args:
        model: The fused model, with the parameters that will be stored.
        base: The base's folder.
    """
    if any(is_quantized(module) for _, module in model.named_modules()):
        return False
    try:
        read = _sanitize(model, in_base_form(model, base))
    # ``sanitize`` of mlx-lm's models may raise any kind of error for unexpected tensors.
    except Exception:  # noqa: BLE001
        return False

    weights = weights_of(model)
    if read.keys() != weights.keys():
        return False

    # Each array is removed before it is computed, so that only one at a time is in memory.
    while read:
        name, array = read.popitem()
        own = weights[name]
        if array is own:
            continue
        if array.shape != own.shape or array.dtype != own.dtype or not _is_same(array, own):
            return False
    return True


def _is_same(array: mx.array, own: mx.array) -> bool:
    """Return whether two arrays are equal, up to a rounding error of the largest number."""
    if mx.array_equal(array, own, equal_nan=True).item():
        return True
    if not is_floating(own):
        return False
    difference = mx.abs(array - own).max()
    return bool((difference <= mx.finfo(own.dtype).eps * mx.abs(own).max()).item())


def in_base_form(model: nn.Module, base: Path) -> dict[str, mx.array]:
    """Return a fused model's weights as tensors with the names, shapes and types of its base.

    A tensor that ``sanitize`` changes is copied from the base if the fuse did not change it.
    Tensors that mlx-lm drops are left out. The arrays are computed when they are used.

    Args:
        model: The fused model, with the parameters that will be stored.
        base: The base's folder.

    Raises:
        KeyError: The model has a weight that mlx-lm does not make from the base.
    """
    weights, tensors = weights_of(model), stored_tensors(base)
    order = list(tensors)

    # A weight that was only renamed gets its name in the base back.
    written: dict[str, mx.array] = {}
    for own, name in _find_renamed(model, tensors).items():
        written[name] = weights.pop(own)

    # Other weights are computed back.
    if weights:
        moved = [name for name in order if name not in written and is_floating(tensors[name])]
        written |= _Checkpoint(model, base, tuple(moved), tuple(weights)).invert(weights)
    return {name: written[name] for name in order if name in written}


def weights_of(model: nn.Module) -> dict[str, mx.array]:
    """Return a model's parameters by their names."""
    return dict(tree_flatten(model.parameters()))


def _sanitize(model: nn.Module, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return the weights that mlx-lm makes of a checkpoint's tensors."""
    if not hasattr(model, "sanitize"):
        return dict(tensors)

    # ``sanitize`` of some models removes entries of the model.
    copied: Any = shared_copy(model)
    return copied.sanitize(dict(tensors))


def _find_renamed(model: nn.Module, tensors: Mapping[str, mx.array]) -> dict[str, str]:
    """Return name in the model → name in the base, for tensors that ``sanitize`` only renames."""
    names = {id(array): name for name, array in tensors.items()}
    renamed: dict[str, str] = {}
    for own, array in _sanitize(model, tensors).items():
        if id(array) in names:
            renamed[own] = names[id(array)]
    return renamed


@dataclass(frozen=True)
class _Checkpoint:
    """The tensors of a base from which ``sanitize`` computes weights.

    Attributes:
        model: The model.
        base: The base's folder.
        moved: The names of the tensors.
        outputs: The names of the weights.
    """

    model: nn.Module
    base: Path
    moved: tuple[str, ...]
    outputs: tuple[str, ...]

    def invert(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the tensors from which ``sanitize`` makes the given weights."""
        zeros: dict[str, mx.array] = {}
        for name, array in self._read().items():
            zeros[name] = mx.zeros(array.shape, array.dtype)
        constants = self._sanitized(zeros)

        # Pᵀ times ones shows which tensors mlx-lm uses, and which of them the fuse changed.
        changed = self._find_changed(weights)
        ones: dict[str, mx.array] = {}
        marks: dict[str, mx.array] = {}
        for name, constant in constants.items():
            ones[name] = mx.ones(constant.shape, constant.dtype)
            marks[name] = mx.full(constant.shape, name in changed, constant.dtype)
        used = self._transposed(self._read(), ones)
        touched = self._transposed(self._read(), marks)

        # Pᵀ times the weights without the constant gives the tensors.
        differences: dict[str, mx.array] = {}
        for name, constant in constants.items():
            differences[name] = weights[name].astype(constant.dtype) - constant
        inverse = self._transposed(zeros, differences)

        written: dict[str, mx.array] = {}
        for name, array in self._read().items():
            if mx.any(touched.pop(name)).item():
                written[name] = inverse[name]
            elif mx.any(used.pop(name)).item():
                written[name] = array
        return written

    def _read(self) -> dict[str, mx.array]:
        """Return the tensors, which are read from disk when they are used."""
        tensors = stored_tensors(self.base)
        return {name: tensors[name] for name in self.moved}

    def _sanitized(self, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the weights that ``sanitize`` makes of tensors in place of those in the base."""
        weights = _sanitize(self.model, {**stored_tensors(self.base), **tensors})
        return {name: weights[name] for name in self.outputs}

    def _find_changed(self, weights: Mapping[str, mx.array]) -> set[str]:
        """Return the names of the weights that differ from those of the base."""
        changed: set[str] = set()
        found = self._sanitized({})
        while found:
            name, array = found.popitem()
            own = weights[name].astype(array.dtype)
            if not mx.array_equal(array, own, equal_nan=True).item():
                changed.add(name)
        return changed

    def _transposed(
        self, tensors: Mapping[str, mx.array], cotangents: Mapping[str, mx.array]
    ) -> dict[str, mx.array]:
        """Return Pᵀ times the cotangents: tensor → array."""

        def sanitized(*arrays: mx.array) -> list[mx.array]:
            return list(self._sanitized(dict(zip(self.moved, arrays, strict=True))).values())

        _, products = mx.vjp(
            sanitized,
            [tensors[name] for name in self.moved],
            [cotangents[name] for name in self.outputs],
        )
        return dict(zip(self.moved, products, strict=True))
