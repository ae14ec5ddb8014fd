"""DoRA: the direction and the row norms of the adapted weight are learned separately.

    V = W + s B A,    y = (m / ‖V‖) V x + bias,    m = ‖V‖ at the start

From Liu et al., arXiv 2402.09353. ‖V‖ is the norm of each row, and is treated as a constant in the
backward pass (§4.3).

V is never computed. With V = W + s L R, the norms of its rows follow from

    ‖V‖² = ‖W‖² + 2 s Σ_r L ∘ (W Rᵀ) + s² Σ_r L ∘ (L R Rᵀ)

where ‖W‖² is constant. Computing W Rᵀ costs as much as applying the base, quantized or not, to r
tokens. m is (out,), (vocabulary,) or (experts, out), and is stored as ``m``, as in mlx-lm.
"""

from typing import Any, ClassVar

import mlx.core as mx

from .base_layers import (
    EMBEDDINGS,
    EXPERTS,
    LINEARS,
    QUANTIZED,
    WHOLE,
    base_shape,
    full_weight,
    project,
)
from .lora import (
    LoRA,
    LoRAEmbedding,
    LoRALinear,
    LoRASwitchLinear,
    SavedActivations,
)

# Lower limit of a squared norm. A row of zeros (padding of the vocabulary) has no direction, and
# stays zero.
_TINY = 1e-30


class DoRA(LoRA):
    """Base class of the DoRA layers: the magnitude m and the norms of the rows."""

    saved_activations: ClassVar = SavedActivations(inputs=1, outputs=1, rank=0)
    frozen_extras: ClassVar = ("m",)  # ‖W‖²

    @classmethod
    def shapes(cls, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A, B and m."""
        experts = base.weight.shape[:-2]
        rows, _ = base_shape(base)
        return {**super().shapes(base, rank), "m": (*experts, rows)}

    def update_derived(self) -> None:
        """Compute ‖W‖² of the base, and set m so that the outputs equal those of W + s B A."""
        # Evaluate now, so that only one full weight is in memory at a time.
        self._squares = mx.square(full_weight(self.base, mx.float32)).sum(axis=-1)
        mx.eval(self._squares)
        self.m = self.row_norms()

    def row_norms(self) -> mx.array:
        """Return ‖W + s B A‖ of each row, without gradient: (..., rows)."""
        # Make the factors contiguous. A loaded matrix is not transposed, and BLAS rounds a
        # transposed matrix differently.
        left, right = (mx.contiguous(mx.stop_gradient(factor)) for factor in self.factors())

        # W Rᵀ: (..., rows, rank)
        x = right if isinstance(self.base, QUANTIZED) else right.astype(self.base.weight.dtype)
        across = project(self.base, x).astype(mx.float32).swapaxes(-1, -2)

        # ‖V‖² = ‖W‖² + s Σ_r L ∘ (2 W Rᵀ + s L R Rᵀ)
        gram = right @ right.swapaxes(-1, -2)
        change = 2 * across + self.scale * (left @ gram)
        squares = self._squares + self.scale * (left * change).sum(axis=-1)
        return mx.sqrt(mx.maximum(squares, _TINY))

    def merged(self, weight: mx.array, part: slice = WHOLE) -> mx.array:
        """Return (m / ‖V‖) V.

        Args:
            weight: The base's weight W, float32, or a part of it.
            part: The rows that ``weight`` holds, or the experts of a switch layer.
        """
        v = super().merged(weight, part)
        norms = mx.maximum(mx.linalg.norm(v, axis=-1), _TINY**0.5)
        gain = self.m[part] / norms
        return v * gain[..., None]


def _stretch(
    y: mx.array,
    gain: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    """Return g (y - bias) + bias in the type of y.

    g stays float32, because a gain of 1.002 would be 1 in bfloat16.
    """
    if bias is None:
        return (gain * y).astype(y.dtype)
    return (gain * (y - bias)).astype(y.dtype) + bias


class DoRALinear(DoRA, LoRALinear):
    """DoRA over a Linear or QuantizedLinear: y = (m / ‖V‖) ∘ (x Wᵀ + s (x A) B) + bias.

    The arguments are those of ``LoRALinear``.
    """

    groups: ClassVar = {**LoRALinear.groups, "m": "magnitude"}

    def __call__(self, x: mx.array) -> mx.array:
        """Return y: (..., in) → (..., out)."""
        y = super().__call__(x)
        gain = self.m / self.row_norms()
        return _stretch(y, gain, self.base.get("bias"))


class DoRAEmbedding(DoRA, LoRAEmbedding):
    """DoRA over an Embedding or QuantizedEmbedding: y = (m[x] / ‖V[x]‖) (W[x] + s A[x] B).

    The arguments are those of ``LoRAEmbedding``.
    """

    groups: ClassVar = {**LoRAEmbedding.groups, "m": "embedding"}

    def __call__(self, x: mx.array) -> mx.array:
        """Return the tokens' embeddings: (...) → (..., hidden)."""
        # Only the rows of these tokens are needed. The norms are computed without dropout.
        a, b = self.lora_matrices()
        v = self.base(x).astype(mx.float32) + self.scale * (a[x] @ b)
        squares = mx.square(mx.stop_gradient(v)).sum(axis=-1)
        norms = mx.sqrt(mx.maximum(squares, _TINY))

        gain = self.m[x] / norms
        return _stretch(super().__call__(x), gain[..., None])

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the tied head's logits: (..., hidden) → (..., vocabulary)."""
        logits = super().as_linear(x)
        return _stretch(logits, self.m / self.row_norms())


class DoRASwitchLinear(DoRA, LoRASwitchLinear):
    """DoRA over experts, one DoRA for each; the arguments are those of ``LoRASwitchLinear``.

    W Rᵀ is computed for all experts, selected or not.
    """

    groups: ClassVar = {**LoRASwitchLinear.groups, "m": "magnitude"}

    def __call__(
        self,
        x: mx.array,
        indices: mx.array,
        sorted_indices: bool = False,
    ) -> mx.array:
        """Return each row's output from its expert, as ``LoRASwitchLinear`` does."""
        gain = (self.m / self.row_norms())[indices][..., None, :]
        bias = self.base.bias[indices][..., None, :] if "bias" in self.base else None
        return _stretch(super().__call__(x, indices, sorted_indices), gain, bias)


LAYERS = {
    LINEARS: DoRALinear,
    EMBEDDINGS: DoRAEmbedding,
    EXPERTS: DoRASwitchLinear,
}
