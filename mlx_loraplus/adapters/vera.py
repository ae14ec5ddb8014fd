"""VeRA: random matrices that all layers share and none trains, and two vectors for each layer that do.

    y = W x + b ∘ (P_B (d ∘ (P_A x)))        d = 0.1, b = 0 at the start (Kopiczko et al., arXiv 2310.11454)

P_A and P_B are as large as the largest layer needs; each layer takes the first of their rows and
columns. There is no scale. With A = diag(d) P_A and B = diag(b) P_B the adapter is exactly a LoRA
of scale 1, which is how it is fused. b is to B what d is to A: b starts at zero and is the last to
act, so LoRA+ gives b the rate lambda * eta, and d eta.
"""

import math
from typing import Any, ClassVar

import mlx.core as mx

from .adapter import Adapter, Projections
from .layers import EXPERTS, LINEARS, base_shape
from .lora import LoRASwitchLinear

D_START = 0.1


def make_projections(shapes: list[tuple[int, int]], rank: int) -> Projections:
    """Draw P_A and P_B for layers of these (out, in), Kaiming uniform as in PEFT: ±√(6 / fan-in)."""
    outs, ins = (max(sides) for sides in zip(*shapes, strict=True))
    bound_a, bound_b = math.sqrt(6 / ins), math.sqrt(6 / rank)
    return mx.random.uniform(-bound_a, bound_a, (ins, rank)), mx.random.uniform(
        -bound_b, bound_b, (rank, outs)
    )


class VeRALinear(Adapter):
    """y = x Wᵀ + (d ∘ (x P_A)) P_B ∘ b over a Linear or QuantizedLinear, d (rank,), b (out,); P_A, P_B are shared."""

    groups: ClassVar = {"vera_d": "lora_a", "vera_b": "lora_b"}
    draw: ClassVar = staticmethod(make_projections)
    kept: ClassVar = (0, 1, 1)

    def __init__(self, base: Any, projections: Projections, dropout: float = 0.0):
        super().__init__(base, 1.0, dropout)
        self._projections = projections
        shapes = self.shapes(base, projections[0].shape[1])
        self.vera_d, self.vera_b = mx.full(shapes["vera_d"], D_START), mx.zeros(shapes["vera_b"])

    @classmethod
    def shapes(cls, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of d and b."""
        experts = base.weight.shape[:-2]
        return {"vera_d": (*experts, rank), "vera_b": (*experts, base_shape(base)[0])}

    def _own_projections(self, dtype: mx.Dtype) -> Projections:
        """Return this layer's part of P_A and P_B: (in, rank), (rank, out)."""
        rows, columns = base_shape(self.base)
        a, b = self._projections
        return a[:columns].astype(dtype), b[:, :rows].astype(dtype)

    def lora_matrices(self) -> tuple[mx.array, mx.array]:
        """Return A = P_A diag(d) and B = P_B diag(b): (in, rank), (rank, out)."""
        a, b = self._own_projections(mx.float32)
        return a * self.vera_d, b * self.vera_b

    def __call__(self, x: mx.array) -> mx.array:
        """Return y: (..., in) → (..., out)."""
        a, b = self._own_projections(x.dtype)
        z = (self.dropout(x) @ a * self.vera_d.astype(x.dtype)) @ b
        return self.base(x) + z * self.vera_b.astype(x.dtype)


class VeRASwitchLinear(VeRALinear):
    """One d (experts, rank) and b (experts, out) for each expert; the projections are the same for all."""

    to_factors: ClassVar = staticmethod(LoRASwitchLinear.to_factors)

    def lora_matrices(self) -> tuple[mx.array, mx.array]:
        """Return A (experts, rank, in) and B (experts, out, rank)."""
        a, b = self._own_projections(mx.float32)
        return a.T * self.vera_d[..., None], b.T * self.vera_b[..., None]

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return each row's output from its expert: (..., in) and its expert's index → (..., out)."""
        a, b = self._own_projections(x.dtype)
        d, stretch = (v.astype(x.dtype)[indices][..., None, :] for v in (self.vera_d, self.vera_b))
        z = (self.dropout(x) @ a * d) @ b
        return self.base(x, indices, sorted_indices=sorted_indices) + z * stretch


LAYERS = {LINEARS: VeRALinear, EXPERTS: VeRASwitchLinear}
