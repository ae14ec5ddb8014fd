"""What is below an adapter: linear, embedding and expert (switch) layers of mlx-lm's models, plain or quantized.

All of them are a weight (..., rows, columns) that maps columns to rows; an embedding's rows are the
vocabulary.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .unfreeze import own_arrays

SPLIT_ROWS = (nn.AllToShardedLinear, nn.QuantizedAllToShardedLinear)
SPLIT_COLUMNS = (nn.ShardedToAllLinear, nn.QuantizedShardedToAllLinear)
SHARDED = (
    *SPLIT_ROWS,
    *SPLIT_COLUMNS,
)  # each process holds an equal part of the weight; see sharding.py
LINEARS = (nn.Linear, nn.QuantizedLinear, *SHARDED)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
QUANTIZED = (
    nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear,
    nn.QuantizedAllToShardedLinear, nn.QuantizedShardedToAllLinear,
)  # fmt: skip
WHOLE = slice(None)
_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def blocks_of(model: nn.Module) -> list[Any]:
    """Return the model's transformer blocks, in order."""
    return list(model.layers)  # pyright: ignore[reportArgumentType]  every mlx-lm model has them


def can_adapt(module: nn.Module) -> bool:
    """Tell whether ``module`` is a base that an adapter fits on."""
    return type(module) in (*LINEARS, *EMBEDDINGS, *EXPERTS)


def base_shape(module: Any) -> tuple[int, int]:
    """Return the (rows, columns) of a base's weight, of one expert for a switch layer, as if it were not quantized.

    Of a sharded weight they are those of the whole.
    """
    rows, columns = local_shape(module)
    if isinstance(module, SPLIT_ROWS):
        rows *= module.group.size()
    if isinstance(module, SPLIT_COLUMNS):
        columns *= module.group.size()
    return rows, columns


def local_shape(module: Any) -> tuple[int, int]:
    """Return the (rows, columns) of what this process holds of a base's weight, as if it were not quantized."""
    rows, columns = module.weight.shape[-2:]
    if isinstance(module, QUANTIZED):
        columns = columns * 32 // module.bits  # 3, 5 and 6 bits do not divide 32: multiply first
    return rows, columns


def quantization(base: Any) -> dict[str, Any]:
    """Return how a quantized base is quantized, as config.json has it."""
    return {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}


def fingerprint(arrays: Iterable[mx.array], described: Mapping[int, str] | None = None) -> str:
    """Return a digest of arrays: types, shapes and sums of their words modulo 2^32, in no order.

    Integer sums are the same in any order, so on any device; floating numbers count as float32,
    which holds them all. ``described`` has the lines of parts that count as the whole, by id, from
    ``whole_lines``.
    """
    known = described or {}
    lines = [known.get(id(array)) or describe_array(array) for array in arrays]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def describe_array(
    array: mx.array, axis: int | None = None, group: mx.distributed.Group | None = None
) -> str:
    """Return an array's line in a fingerprint; with ``axis``, that of the whole of which each process has a part."""
    wide = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
    total, shape = wide.view(_WORDS[wide.dtype.size]).sum(), list(wide.shape)
    if axis is not None and group is not None:
        total, shape[axis] = mx.distributed.all_sum(total, group=group), shape[axis] * group.size()
    return f"{wide.dtype} {tuple(shape)} {total.item()}"


def whole_lines(modules: Iterable[nn.Module]) -> dict[int, str]:
    """Return the id of each array of the sharded layers among ``modules`` → its line in a fingerprint, as a whole.

    All processes must ask together the first time; later a layer knows its lines.
    """
    sharded: list[Any] = [module for module in modules if isinstance(module, SHARDED)]
    for layer in sharded:
        if not hasattr(layer, "whole"):
            rows = isinstance(layer, SPLIT_ROWS)
            axes = dict.fromkeys(("weight", "scales", "biases"), 0 if rows else 1) | (
                {"bias": 0} if rows else {}
            )
            lines = {
                name: describe_array(array, axes.get(name), layer.group)
                for name, array in own_arrays(layer).items()
            }
            object.__setattr__(layer, "whole", lines)  # not among its arrays
    return {id(layer[name]): line for layer in sharded for name, line in layer.whole.items()}


def full_weight(base: Any, dtype: mx.Dtype, part: slice | mx.array = WHOLE) -> mx.array:
    """Return a base's weight as ``dtype``, dequantized if need be, or ``part`` of its rows (of its experts)."""
    if not isinstance(base, QUANTIZED):
        return base.weight[part].astype(dtype)
    scales, biases = base.scales[part], base.get("biases")
    if (
        biases is not None
    ):  # MLX rounds to the scales' type on the way, which quantized_matmul does not
        scales, biases = scales.astype(dtype), biases[part].astype(dtype)
    return mx.dequantize(base.weight[part], scales, biases, **quantization(base), dtype=dtype)


def weight_norm(base: Any) -> float:
    """Return ‖W‖ (Frobenius), computed an expert or some thousand rows at a time."""
    step = 1 if base.weight.ndim == 3 else 4096
    square = mx.array(0.0)
    for first in range(0, base.weight.shape[0], step):
        square = square + mx.square(full_weight(base, mx.float32, slice(first, first + step))).sum()
        mx.eval(square)
    if isinstance(base, SHARDED):
        square = mx.distributed.all_sum(square, group=base.group)
    return math.sqrt(float(square.item()))  # pyright: ignore[reportArgumentType]


def project(base: Any, x: mx.array, part: slice = WHOLE, *, back: bool = False) -> mx.array:
    """Return x Wᵀ without the base's bias: (..., n, columns) → (..., n, rows), expert by expert for a switch layer.

    W may be a ``part`` of the rows; ``back`` gives x W, (..., n, rows) → (..., n, columns).
    """
    weight = base.weight[part]
    if not isinstance(base, QUANTIZED):
        return x @ (weight if back else weight.swapaxes(-1, -2))
    biases = base.get("biases")
    biases = None if biases is None else biases[part]
    return mx.quantized_matmul(
        x, weight, base.scales[part], biases, transpose=not back, **quantization(base)
    )


def plain_layer(base: Any, weight: mx.array) -> Any:
    """Return a plain layer of the base's kind that holds ``weight`` and the base's bias."""
    has_bias = "bias" in base
    if isinstance(base, EMBEDDINGS):
        layer: Any = nn.Embedding(1, 1)
    elif isinstance(base, LINEARS):
        layer = nn.Linear(1, 1, bias=has_bias)
    else:
        layer = SwitchLinear(1, 1, 1, bias=has_bias)
    layer.weight = weight
    if has_bias:
        layer.bias = base.bias
    return layer


def packed_layer(base: Any, arrays: Mapping[str, mx.array], settings: Mapping[str, Any]) -> Any:
    """Return a quantized layer of the base's kind that holds the packed ``arrays`` and the base's bias."""
    smallest = mx.zeros((1, 1, max(32, settings["group_size"]))[-base.weight.ndim :])
    layer = plain_layer(base, smallest).to_quantized(**settings)
    for name, array in arrays.items():
        layer[name] = array
    return layer
