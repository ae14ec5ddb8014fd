"""Make an MLX model compute in float64, so that a comparison shows the formulas and not rounding.

MLX's own norms and rotations compute in float32 whatever the type of their input, so they are
replaced by the same formulas in MLX's basic operations. This works on the CPU only.
"""

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
