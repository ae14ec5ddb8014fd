"""VeRA: frozen random matrices that all layers share, and two trained vectors for each layer.

    y = W x + b ∘ (P_B (d ∘ (P_A x)))      d = 0.1, b = 0 at the start

From Kopiczko et al., arXiv 2310.11454. P_A and P_B are as large as the largest layer needs; each
layer uses their first rows and columns. VeRA has no scale. With A = diag(d) P_A and
B = diag(b) P_B the adapter is exactly a LoRA of scale 1, and it is fused as a LoRA. Like B of a
LoRA, b starts at zero and is applied last, so LoRA+ trains b at the rate lambda * eta and d at eta.
"""

import math
from typing import Any, ClassVar

import mlx.core as mx

from .base_layers import EXPERTS, LINEARS, base_shape
from .lora import Adapter, LoRASwitchLinear, Projections, SavedActivations

D_START = 0.1


def make_projections(shapes: list[tuple[int, int]], rank: int) -> Projections:
    """Draw P_A and P_B for layers of the given (out, in).

    Both have the Kaiming uniform distribution in ±√(6 / fan-in), as in PEFT.
    """
    largest_out = max(rows for rows, _ in shapes)
    largest_in = max(columns for _, columns in shapes)

    bound_a = math.sqrt(6 / largest_in)
    bound_b = math.sqrt(6 / rank)
    projection_a = mx.random.uniform(-bound_a, bound_a, (largest_in, rank))
    projection_b = mx.random.uniform(-bound_b, bound_b, (rank, largest_out))
    return projection_a, projection_b


class VeRALinear(Adapter):
    """VeRA over a Linear or QuantizedLinear: y = x Wᵀ + (d ∘ (x P_A)) P_B ∘ b.

    d is (rank,) and b is (out,); all layers share P_A and P_B.

    Args:
        base: The frozen base.
        projections: P_A and P_B, from ``make_projections``.
        dropout: Probability that an element of the adapter's input is zeroed while training.
    """

    groups: ClassVar = {"vera_d": "lora_a", "vera_b": "lora_b"}
    make_projections: ClassVar = staticmethod(make_projections)
    saved_activations: ClassVar = SavedActivations(inputs=0, outputs=1, rank=1)

    def __init__(
        self,
        base: Any,
        projections: Projections,
        dropout: float = 0.0,
    ):
        super().__init__(base, 1.0, dropout)
        self._projections = projections

        rank = projections[0].shape[1]
        shapes = self.shapes(base, rank)
        self.vera_d = mx.full(shapes["vera_d"], D_START)
        self.vera_b = mx.zeros(shapes["vera_b"])

    @classmethod
    def shapes(cls, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of d and b."""
        experts = base.weight.shape[:-2]
        rows, _ = base_shape(base)
        return {"vera_d": (*experts, rank), "vera_b": (*experts, rows)}

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
        d = self.vera_d.astype(x.dtype)
        gain = self.vera_b.astype(x.dtype)

        z = (self.dropout(x) @ a * d) @ b
        return self.base(x) + z * gain


class VeRASwitchLinear(VeRALinear):
    """VeRA over experts, with its own d and b for each: d (experts, rank), b (experts, out).

    All experts share P_A and P_B.
    """

    to_factors: ClassVar = staticmethod(LoRASwitchLinear.to_factors)

    def lora_matrices(self) -> tuple[mx.array, mx.array]:
        """Return A (experts, rank, in) and B (experts, out, rank)."""
        a, b = self._own_projections(mx.float32)
        return a.T * self.vera_d[..., None], b.T * self.vera_b[..., None]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: mx.array,
        indices: mx.array,
        sorted_indices: bool = False,
    ) -> mx.array:
        """Return each row's output from its expert: (..., in) → (..., out).

        Args:
            x: The input.
            indices: The expert of each row.
            sorted_indices: Whether ``indices`` is sorted, which lets the base work faster.
        """
        a, b = self._own_projections(x.dtype)
        d = self.vera_d.astype(x.dtype)[indices][..., None, :]
        gain = self.vera_b.astype(x.dtype)[indices][..., None, :]

        z = (self.dropout(x) @ a * d) @ b
        return self.base(x, indices, sorted_indices=sorted_indices) + z * gain


LAYERS = {
    LINEARS: VeRALinear,
    EXPERTS: VeRASwitchLinear,
}
