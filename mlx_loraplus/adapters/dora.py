"""DoRA: the adapted weight's direction and its rows' lengths learn apart (Liu et al., arXiv 2402.09353).

    V = W + s B A,   y = (m / ‖V‖) V x + bias,   m = ‖V‖ at the start, row by row; ‖V‖ takes no gradient (§4.3)

V is never made. With V = W + s L R its rows' lengths follow from

    ‖V‖² = ‖W‖² + 2 s Σ_r L ∘ (W Rᵀ) + s² Σ_r L ∘ (L R Rᵀ)

where ‖W‖² is constant and W Rᵀ costs as much as the base does for r tokens, quantized or not. m is
(out,), (vocabulary,) or (experts, out), mlx-lm's leaf ``m``.
"""

from typing import Any, ClassVar

import mlx.core as mx

from .layers import EMBEDDINGS, EXPERTS, LINEARS, QUANTIZED, WHOLE, base_shape, full_weight, project
from .lora import LoRA, LoRAEmbedding, LoRALinear, LoRASwitchLinear

_TINY = 1e-30  # a row of zeros (padding of a vocabulary) has no direction; it stays zero


class DoRA(LoRA):
    """What DoRA layers share: the magnitude m and the rows' lengths."""

    kept: ClassVar = (1, 1, 0)
    untrained: ClassVar = ("m",)  # ‖W‖²

    @classmethod
    def shapes(cls, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A, B and m."""
        return {**super().shapes(base, rank), "m": (*base.weight.shape[:-2], base_shape(base)[0])}

    def settle(self) -> None:
        """Make ‖W‖² of the base, and m so that the outputs are those of W + s B A."""
        self._squares = mx.square(full_weight(self.base, mx.float32)).sum(axis=-1)
        mx.eval(self._squares)  # now: one full weight at a time
        self.m = self.row_norms()

    def row_norms(self) -> mx.array:
        """Return ‖W + s B A‖ of each row, without gradient: (..., rows)."""
        # Contiguous, since BLAS rounds otherwise for a transposed matrix, and a loaded one is not
        # transposed.
        left, right = (mx.contiguous(mx.stop_gradient(factor)) for factor in self.factors())
        x = right if isinstance(self.base, QUANTIZED) else right.astype(self.base.weight.dtype)
        across = (
            project(self.base, x).astype(mx.float32).swapaxes(-1, -2)
        )  # W Rᵀ: (..., rows, rank)
        change = 2 * across + self.scale * (left @ (right @ right.swapaxes(-1, -2)))
        return mx.sqrt(mx.maximum(self._squares + self.scale * (left * change).sum(axis=-1), _TINY))

    def merged(self, weight: mx.array, part: slice = WHOLE) -> mx.array:
        """Return (m / ‖V‖) V for the base's ``weight`` W, float32, or ``part`` of its rows (of its experts)."""
        v = super().merged(weight, part)
        return v * (self.m[part] / mx.maximum(mx.linalg.norm(v, axis=-1), _TINY**0.5))[..., None]


def _stretch(y: mx.array, gain: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return g (y - bias) + bias; g stays float32, since a row's 1.002 would be 1 in bfloat16."""
    if bias is None:
        return (gain * y).astype(y.dtype)
    return (gain * (y - bias)).astype(y.dtype) + bias


class DoRALinear(DoRA, LoRALinear):
    """y = (m / ‖V‖) ∘ (x Wᵀ + s (x A) B) + bias over a Linear or QuantizedLinear; arguments as of LoRALinear."""

    groups: ClassVar = {**LoRALinear.groups, "m": "magnitude"}

    def __call__(self, x: mx.array) -> mx.array:
        """Return y: (..., in) → (..., out)."""
        return _stretch(super().__call__(x), self.m / self.row_norms(), self.base.get("bias"))


class DoRAEmbedding(DoRA, LoRAEmbedding):
    """y = (m[x] / ‖V[x]‖) (W[x] + s A[x] B) over an Embedding or QuantizedEmbedding; arguments as of LoRAEmbedding."""

    groups: ClassVar = {**LoRAEmbedding.groups, "m": "embedding"}

    def __call__(self, x: mx.array) -> mx.array:
        """Return the tokens' embeddings: (...) → (..., hidden)."""
        a, b = self.lora_matrices()
        rows = mx.stop_gradient(
            self.base(x).astype(mx.float32) + self.scale * (a[x] @ b)
        )  # only these, no dropout
        lengths = mx.sqrt(mx.maximum(mx.square(rows).sum(axis=-1), _TINY))
        return _stretch(super().__call__(x), (self.m[x] / lengths)[..., None])

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the tied head's logits: (..., hidden) → (..., vocabulary)."""
        return _stretch(super().as_linear(x), self.m / self.row_norms())


class DoRASwitchLinear(DoRA, LoRASwitchLinear):
    """One DoRA for each expert; arguments as of LoRASwitchLinear. W Rᵀ is made for all experts, chosen or not."""

    groups: ClassVar = {**LoRASwitchLinear.groups, "m": "magnitude"}

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return each row's output from its expert: (..., in) and its expert's index → (..., out)."""
        gain = (self.m / self.row_norms())[indices][..., None, :]
        bias = self.base.bias[indices][..., None, :] if "bias" in self.base else None
        return _stretch(super().__call__(x, indices, sorted_indices), gain, bias)


LAYERS = {LINEARS: DoRALinear, EMBEDDINGS: DoRAEmbedding, EXPERTS: DoRASwitchLinear}
