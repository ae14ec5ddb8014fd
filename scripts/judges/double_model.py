"""Make an MLX model compute in float64, so that a comparison shows the formulas and not rounding.

MLX's own norms, rotations and attention compute in float32 whatever the type of their input, so
they are replaced by the same formulas in MLX's basic operations. Our losses cast to ``mx.float32``,
and use an exponential made for float32; within ``double_losses`` both are float64. MLX's exponential
has a relative error of 2e-6 in float64, so a power of e stands for it. This works on the CPU only.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten


class DoubleNorm(nn.Module):
    """RMSNorm in the type of its input."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """Return x / sqrt(mean(x²) + eps), times the weight."""
        square = mx.square(x).mean(axis=-1, keepdims=True)
        return x / mx.sqrt(square + mx.array(self.eps, mx.float64)) * self.weight


class DoubleRoPE(nn.Module):
    """Rotary positions in float64, for heads whose halves are rotated against each other."""

    def __init__(self, rope: nn.RoPE):
        super().__init__()
        if rope.traditional or rope.scale != 1.0:
            raise ValueError("only plain rotations of halves are known here")
        self.dims, self.base = rope.dims, rope.base

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        """Return the rotated x, (rows, heads, length, dims)."""
        positions = np.arange(offset, offset + x.shape[-2])
        frequencies = self.base ** (-np.arange(0, self.dims, 2) / self.dims)
        angles = positions[:, None] * frequencies
        cosines, sines = (mx.array(f(angles), dtype=mx.float64) for f in (np.cos, np.sin))
        one, other = mx.split(x, 2, axis=-1)
        return mx.concatenate(
            [one * cosines - other * sines, one * sines + other * cosines], axis=-1
        )


@contextmanager
def double_losses() -> Iterator[None]:
    """Let everything that names ``mx.float32``, and the softmax of our losses, compute in float64."""
    with (
        mock.patch.object(mx, "float32", mx.float64),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", _attention),
        mock.patch("mlx_loraplus.kernels.cross_entropy.exp", _exp),
    ):
        yield


def _attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any
) -> mx.array:
    """Return softmax(s q kᵀ) v with a causal mask; query heads may share a head of k and v."""
    if mask != "causal":
        raise ValueError("only causal masks are known here")
    repeats = q.shape[1] // k.shape[1]
    k, v = mx.repeat(k, repeats, axis=1), mx.repeat(v, repeats, axis=1)
    scores = mx.array(scale, mx.float64) * (q @ k.swapaxes(-1, -2))
    is_seen = mx.tri(q.shape[2], dtype=mx.bool_)
    exps = mx.where(is_seen, _exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    return exps / exps.sum(axis=-1, keepdims=True) @ v


def _exp(x: mx.array) -> mx.array:
    return mx.power(mx.array(math.e, mx.float64), x)


def use_double(model: nn.Module) -> None:
    """Make a Llama with float32 weights compute in float64 on the CPU, in place."""
    mx.set_default_device(mx.cpu)

    # What was trainable stays so, because an update keeps the names of the parameters.
    replaced: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            replaced.append((name, DoubleNorm(module)))
        elif isinstance(module, nn.RoPE):
            replaced.append((name, DoubleRoPE(module)))
    model.update_modules(tree_unflatten(replaced))
    model.update(tree_map(_widened, model.parameters()))


def _widened(array: mx.array) -> mx.array:
    """Return float32 numbers as float64, and other arrays unchanged."""
    return array.astype(mx.float64) if array.dtype == mx.float32 else array
