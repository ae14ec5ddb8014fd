"""Fold an adapter into a plain or quantized layer, and measure how well its change is preserved."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mode
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.mla import MultiLinear

from ..adapters.base_layers import (
    QUANTIZED,
    base_shape,
    full_weight,
    packed_layer,
    plain_layer,
    quantization,
)
from ..adapters.combined_adapters import MergedAdapters
from ..adapters.lora import Adapter
from ..errors import AdapterError, ModelError
from .fuse_quality import LayerChange
from .gptq import inverse_factors, quantize

Form = dict[str, Any] | None
"""How a layer is quantized, as in config.json; None for full precision."""

WIDTHS = (2, 3, 4, 5, 6, 8)

# The number of weights that are in full precision at a time. GPTQ works column by column and needs
# many rows to be fast, so its parts are larger.
PART = 2**19
COLUMN_PART = 2**22


def candidate_forms(base: Any, bits: int | Literal["auto"], *, dequantize: bool) -> list[Form]:
    """Return the forms that the fused layer may have, in order of preference.

    Args:
        base: The layer below the adapter.
        bits: The width. auto: the base's width, then each wider width, then full precision.
        dequantize: Allow full precision only.
    """
    own: Form = quantization(base) if isinstance(base, QUANTIZED) else None
    if dequantize or (own is None and bits == "auto"):
        return [None]
    if own and bits == own["bits"]:
        return [own]

    size = _group_size(base, own)
    if bits != "auto":
        return [None if size is None else _affine(size, bits)]

    # From here on the base is quantized, because "auto" leaves a plain base plain.
    assert own is not None
    wider = [width for width in WIDTHS if width > own["bits"]]
    affine = [] if size is None else [_affine(size, width) for width in wider]
    return [own, *affine, None]


def _group_size(base: Any, own: Form) -> int | None:
    """Return the first group size (the base's own, 64, 32) that divides the columns, or None."""
    sizes = [64, 32]
    if own and own["mode"] == "affine":
        sizes.insert(0, own["group_size"])

    columns = base_shape(base)[1]
    return next((size for size in sizes if columns % size == 0), None)


def _affine(size: int, bits: int) -> dict[str, Any]:
    return {"group_size": size, "bits": bits, "mode": "affine"}


def fuse_layer(
    path: str,
    adapter: Adapter,
    forms: Sequence[Form],
    dtype: mx.Dtype,
    inputs: Sequence[mx.array],
) -> tuple[nn.Module, LayerChange]:
    """Return the fused layer in the first form that preserves its change, or else in the last one.

    Args:
        path: The layer's path.
        adapter: The adapter on its base.
        forms: The forms to try, from ``candidate_forms``; at least one.
        dtype: The stored type of a plain layer's weights or a quantized layer's scales.
        inputs: Inputs of the layer, (tokens, columns) each. A quarter of them is used to measure
            the result; the others guide the rounding.

    Raises:
        AdapterError: The change is not finite.
    """
    # If there are enough inputs, measure the result on inputs that the rounding has not seen.
    guiding = [x for number, x in enumerate(inputs) if number % 4 != 3]
    judging = list(inputs[3::4]) or list(inputs)
    factors = inverse_factors(guiding) if guiding and forms[0] else []
    fuser = _LayerFuser(path, adapter, dtype, factors, judging)

    *preferred, last = forms
    for form in preferred:
        layer, change = fuser.fuse(form)
        if change.preserved:
            return layer, change
    return fuser.fuse(last)


@dataclass(frozen=True)
class _LayerFuser:
    """An adapter on its base, and how its fused layer is rounded and measured.

    Attributes:
        path: The layer's path.
        adapter: The adapter on its base.
        dtype: The stored type of weights or scales.
        factors: The factors from ``inverse_factors``, or empty.
        inputs: The inputs on which the fused layer is measured, (tokens, columns) each.
    """

    path: str
    adapter: Adapter
    dtype: mx.Dtype
    factors: Sequence[mx.array]
    inputs: Sequence[mx.array]

    @property
    def base(self) -> Any:
        """The layer below the adapter."""
        return self.adapter.base

    @property
    def base_form(self) -> Form:
        """How the base is quantized."""
        return quantization(self.base) if isinstance(self.base, QUANTIZED) else None

    def fuse(self, form: Form) -> tuple[nn.Module, LayerChange]:
        """Return the fused layer in one form, and its measured change."""
        before = _describe(self.base_form, self.base.weight.dtype)
        change = LayerChange(self.path, before, _describe(form, self.dtype))

        # Process one part at a time, so that only one part is in full precision.
        pieces: dict[str, list[mx.array]] = {}
        for part in _parts(self.base, COLUMN_PART if self.factors else PART):
            weight = full_weight(self.base, mx.float32, part)
            merged = self.adapter.merged(weight, part)
            arrays = self._stored_arrays(merged, part, form)
            stored = _layer(self.base, arrays, form)
            change.add(weight, merged, full_weight(stored, mx.float32), self.inputs)

            for name, array in arrays.items():
                pieces.setdefault(name, []).append(array)
            mx.eval(arrays)

        if not math.isfinite(change.ratio):
            raise AdapterError(
                f"the change of {self.path} is not finite: {_explain_overflow(self.adapter)}"
            )
        whole = {name: mx.concatenate(parts) for name, parts in pieces.items()}
        return _layer(self.base, whole, form), change

    def _stored_arrays(self, merged: mx.array, part: slice, form: Form) -> dict[str, mx.array]:
        """Return the stored arrays of a part of the fused layer, given its merged weight."""
        base = self.base
        if form is None:
            arrays = {"weight": merged.astype(self.dtype)}
        else:
            # If the form stays the same, the base's grid fits weights that changed very little.
            grid = None
            if form == self.base_form and form["mode"] == "affine":
                grid = (base["scales"][part], base["biases"][part])
            arrays = quantize(merged, form, self.dtype, grid, self.factors)

        # On a CPU the model is in float32, the type that is fast there. The arrays are
        # widened to float32, but their values are the ones that will be stored.
        own = base.weight if self.base_form is None else base.get("biases", base.scales)
        if own.dtype == mx.float32:
            arrays = {name: _widened(array) for name, array in arrays.items()}
        return arrays


def _explain_overflow(adapter: Adapter) -> str:
    """Return why an adapter's change is not finite, and what to do."""
    parts = adapter.parts if isinstance(adapter, MergedAdapters) else ((adapter, 1.0),)
    arrays = [part[name] for part, _ in parts for name in part.groups]
    sizes = [float(mx.abs(array).max().item()) for array in arrays]  # pyright: ignore[reportArgumentType]
    factor = max(abs(weight * part.scale) for part, weight in parts)

    found = "its adapter holds values that are not finite"
    if all(math.isfinite(size) for size in sizes):
        found = f"its adapter holds values up to {max(sizes):.2g}, multiplied by {factor:.2g}"
        if max(sizes) < factor:
            return f"{found}; use a smaller scale (alpha) or weight"
    return (
        f"{found}, as after a training that diverged; train again with a lower learning rate, or"
        " use an earlier checkpoint"
    )


def _parts(base: Any, size: int) -> Iterator[slice]:
    """Cut a base's rows, or its experts, into parts of about ``size`` weights."""
    rows, columns = base_shape(base)
    is_matrix = base.weight.ndim == 2
    weights_each = columns if is_matrix else rows * columns

    step = max(1, size // weights_each)
    for start in range(0, base.weight.shape[0], step):
        yield slice(start, start + step)


def _layer(base: Any, arrays: Mapping[str, mx.array], form: Form) -> nn.Module:
    """Return a layer of the same kind as the base, with these arrays."""
    if form is None:
        return plain_layer(base, arrays["weight"])
    return packed_layer(base, arrays, form)


def _widened(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if is_floating(array) else array


def _describe(form: Form, dtype: mx.Dtype) -> str:
    """Return how a layer is stored, such as "4 bits", "mxfp4" or "bfloat16"."""
    if form is None:
        return str(dtype).rpartition(".")[2]
    return f"{form['bits']} bits" if form["mode"] == "affine" else form["mode"]


def is_floating(array: mx.array) -> bool:
    """Return whether an array holds floating-point values."""
    return mx.issubdtype(array.dtype, mx.floating)


def is_quantized(module: nn.Module) -> bool:
    """Return whether a layer's weight is quantized, for a layer of any class."""
    return "weight" in module and "scales" in module and hasattr(module, "bits")


def stored_dtype(name: str, dtypes: Mapping[str, mx.Dtype]) -> mx.Dtype:
    """Return the type to store a parameter in.

    Args:
        name: The parameter's name.
        dtypes: Name → type of the base's parameters. A parameter that the base does not have gets
            the type of its layer, or else the most frequent type.
    """
    layer = name.rpartition(".")[0]
    for known in (name, f"{layer}.weight", f"{layer}.scales"):
        if known in dtypes:
            return dtypes[known]
    return mode(dtypes.values()) if dtypes else mx.bfloat16


def dequantize_layer(
    path: str, module: Any, dtype: mx.Dtype, dtypes: Mapping[str, mx.Dtype] | None = None
) -> nn.Module:
    """Return a quantized layer in full precision.

    Args:
        path: The layer's path.
        module: A layer with a quantized weight.
        dtype: The type of the returned layer's weight.
        dtypes: As for ``stored_dtype``. The weight is rounded to the type that it will be stored
            in.

    Raises:
        ModelError: No plain counterpart of the layer is known.
    """
    if isinstance(module, QUANTIZED):
        weight = full_weight(module, mx.float32)
        if dtypes:
            weight = weight.astype(stored_dtype(f"{path}.weight", dtypes))
        return plain_layer(module, weight.astype(dtype))

    if type(module).__name__ != "QuantizedMultiLinear":
        raise ModelError(
            f"{path} ({type(module).__name__}) can't be dequantized: leave --dequantize out"
        )

    # This is a layer of multi-head latent attention. The scales are converted first, as in
    # full_weight, because MLX would otherwise round the weight to the type of the scales.
    scales, biases = module.scales, module.get("biases")
    if biases is not None:
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    layer = MultiLinear(1, 1, 1)
    layer.weight = mx.dequantize(module.weight, scales, biases, **quantization(module), dtype=dtype)
    return layer


def replace_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Replace the layer at ``path`` by ``layer``, and compute its arrays now.

    This way only one layer at a time is in full precision.
    """
    mx.eval(layer.parameters())
    model.update_modules(tree_unflatten([(path, layer)]))
