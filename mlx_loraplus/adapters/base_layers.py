"""The layers below an adapter: linear, embedding and expert (switch) layers, plain or quantized.

Each of them holds a weight (..., rows, columns) that maps columns to rows. The rows of an embedding
are the vocabulary.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .unfreeze import FullyTrained, own_arrays

# Sharded layers: each process holds an equal part of the layer; see tensor_parallel.py.
SPLIT_ROWS = (nn.AllToShardedLinear, nn.QuantizedAllToShardedLinear)
SPLIT_COLUMNS = (nn.ShardedToAllLinear, nn.QuantizedShardedToAllLinear)
SHARDED = (*SPLIT_ROWS, *SPLIT_COLUMNS)

LINEARS = (nn.Linear, nn.QuantizedLinear, *SHARDED)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
QUANTIZED = (
    nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear,
    nn.QuantizedAllToShardedLinear, nn.QuantizedShardedToAllLinear,
)  # fmt: skip

WHOLE = slice(None)
"""All rows of a weight, or all its experts."""

_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def blocks_of(model: nn.Module) -> list[Any]:
    """Return the model's transformer blocks, in order."""
    return list(model.layers)  # pyright: ignore[reportArgumentType]  every mlx-lm model has them


def can_adapt(module: nn.Module) -> bool:
    """Return whether an adapter can have ``module`` as its base."""
    return type(module) in (*LINEARS, *EMBEDDINGS, *EXPERTS)


def is_trained_layer(module: nn.Module) -> bool:
    """Return whether ``module`` trains in full, and could have an adapter instead."""
    layers = (*LINEARS, *EMBEDDINGS, *EXPERTS)
    return isinstance(module, FullyTrained) and isinstance(module, layers)


# Shapes and settings


def base_shape(module: Any) -> tuple[int, int]:
    """Return the (rows, columns) of a base's weight, as if it were not quantized.

    For a switch layer, this is the shape of one expert. For a sharded layer, it is the shape of the
    whole weight.
    """
    rows, columns = local_shape(module)
    if isinstance(module, SPLIT_ROWS):
        rows *= module.group.size()
    if isinstance(module, SPLIT_COLUMNS):
        columns *= module.group.size()
    return rows, columns


def local_shape(module: Any) -> tuple[int, int]:
    """Return the (rows, columns) that this process holds, as if the base were not quantized."""
    rows, columns = module.weight.shape[-2:]
    if isinstance(module, QUANTIZED):
        # Multiply before dividing, because 32 is not a multiple of 3, 5 or 6 bits.
        columns = columns * 32 // module.bits
    return rows, columns


def quantization(base: Any) -> dict[str, Any]:
    """Return the settings of a quantized base, in the form that config.json uses."""
    return {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}


# Fingerprints


def fingerprint(arrays: Iterable[mx.array], described: Mapping[int, str] | None = None) -> str:
    """Return a digest of arrays that does not depend on their order.

    It covers their types, their shapes and the sums of their words modulo 2^32. Integer sums do not
    depend on the order of the terms, so every device gives the same digest. Floating-point arrays
    are converted to float32, which holds all their values.

    Args:
        arrays: The arrays.
        described: The line of each whole sharded array, by the array's id, from ``whole_lines``.
    """
    known = described or {}
    lines = [known.get(id(array)) or describe_array(array) for array in arrays]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def describe_array(
    array: mx.array,
    axis: int | None = None,
    group: mx.distributed.Group | None = None,
) -> str:
    """Return an array's line in a fingerprint.

    Args:
        array: The array, or this process's part of it.
        axis: The axis along which the processes of ``group`` divide the array, or None. If it is
            given, the line describes the whole array.
        group: The processes.
    """
    wide = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
    total = wide.view(_WORDS[wide.dtype.size]).sum()
    shape = list(wide.shape)

    # The parts' sums add up to the sum of the whole.
    if axis is not None and group is not None:
        total = mx.distributed.all_sum(total, group=group)
        shape[axis] *= group.size()
    return f"{wide.dtype} {tuple(shape)} {total.item()}"


def whole_lines(modules: Iterable[nn.Module]) -> dict[int, str]:
    """Return the fingerprint line of each array of the sharded layers, by the array's id.

    The lines describe the whole arrays, so all processes must make the first call for a layer
    together. The layer then keeps its lines.
    """
    found: dict[int, str] = {}
    for module in modules:
        if not isinstance(module, SHARDED):
            continue

        layer: Any = module
        if not hasattr(layer, "whole"):
            # Bypass nn.Module.__setattr__, which would list the lines among the parameters.
            object.__setattr__(layer, "whole", _describe_sharded(layer))
        for name, line in layer.whole.items():
            found[id(layer[name])] = line
    return found


def _describe_sharded(layer: Any) -> dict[str, str]:
    """Return the fingerprint line of each whole array of a sharded layer, by the array's name."""
    # The bias has one element per row, so it is not divided if the columns are.
    if isinstance(layer, SPLIT_ROWS):
        axes = {"weight": 0, "scales": 0, "biases": 0, "bias": 0}
    else:
        axes = {"weight": 1, "scales": 1, "biases": 1}

    arrays = own_arrays(layer).items()
    return {name: describe_array(array, axes.get(name), layer.group) for name, array in arrays}


# Weights


def full_weight(
    base: Any,
    dtype: mx.Dtype,
    part: slice | mx.array = WHOLE,
) -> mx.array:
    """Return a base's weight in ``dtype``, dequantized if necessary.

    Args:
        base: The layer.
        dtype: Type of the result.
        part: The rows to return, or the experts of a switch layer.
    """
    if not isinstance(base, QUANTIZED):
        return base.weight[part].astype(dtype)

    scales = base.scales[part]
    biases = base.get("biases")

    # Without this cast, MLX would round the weight to the scales' type, unlike quantized_matmul.
    if biases is not None:
        scales = scales.astype(dtype)
        biases = biases[part].astype(dtype)
    return mx.dequantize(base.weight[part], scales, biases, **quantization(base), dtype=dtype)


def weight_norm(base: Any) -> float:
    """Return ‖W‖ (Frobenius) of the whole weight."""
    # Process one expert, or 4096 rows, at a time to keep the dequantized part small.
    step = 1 if base.weight.ndim == 3 else 4096
    square = mx.array(0.0)
    for first in range(0, base.weight.shape[0], step):
        weight = full_weight(base, mx.float32, slice(first, first + step))
        square = square + mx.square(weight).sum()
        mx.eval(square)

    if isinstance(base, SHARDED):
        square = mx.distributed.all_sum(square, group=base.group)
    return math.sqrt(float(square.item()))  # pyright: ignore[reportArgumentType]


def project(
    base: Any,
    x: mx.array,
    part: slice = WHOLE,
    *,
    back: bool = False,
) -> mx.array:
    """Return x Wᵀ without the base's bias: (..., n, columns) → (..., n, rows).

    For a switch layer, the leading axis holds the experts.

    Args:
        base: The layer, quantized or not.
        x: The input.
        part: The rows of W to use.
        back: Return x W instead: (..., n, rows) → (..., n, columns).
    """
    weight = base.weight[part]
    if not isinstance(base, QUANTIZED):
        return x @ (weight if back else weight.swapaxes(-1, -2))

    biases = base.get("biases")
    if biases is not None:
        biases = biases[part]
    return mx.quantized_matmul(
        x, weight, base.scales[part], biases, transpose=not back, **quantization(base)
    )


# New layers of the same kind as a base


def plain_layer(base: Any, weight: mx.array) -> Any:
    """Return an unquantized layer of the base's kind, with ``weight`` and the base's bias."""
    # Create the layer as small as possible, because its weight is replaced.
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


def packed_layer(
    base: Any,
    arrays: Mapping[str, mx.array],
    settings: Mapping[str, Any],
) -> Any:
    """Return a quantized layer of the base's kind, with packed arrays and the base's bias.

    Args:
        base: The layer whose kind and bias are used.
        arrays: The packed weight, the scales and, if the mode has them, the biases.
        settings: group_size, bits and mode.
    """
    # Quantize the smallest weight that has one whole group, then replace the layer's arrays.
    shape = (1, 1, max(32, settings["group_size"]))
    smallest = mx.zeros(shape[-base.weight.ndim :])
    layer = plain_layer(base, smallest).to_quantized(**settings)
    for name, array in arrays.items():
        layer[name] = array
    return layer
