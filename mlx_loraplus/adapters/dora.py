"""DoRA: the adapted weight's direction and its rows' lengths learn apart (Liu et al., arXiv 2402.09353).

    V = W + s B A,   y = (m / ‖V‖) V x + bias,   m = ‖V‖ at the start, row by row; ‖V‖ takes no gradient (§4.3)

V is never made. With V = W + s L R its rows' lengths follow from

    ‖V‖² = ‖W‖² + 2 s Σ_r L ∘ (W Rᵀ) + s² Σ_r L ∘ (L R Rᵀ)

where ‖W‖² is constant and W Rᵀ costs as much as the base does for r tokens, quantized or not. m is (out,),
(vocabulary,) or (experts, out), mlx-lm's leaf ``m``.
"""

from typing import Any, ClassVar

import mlx.core as mx

from .base import full_weight, project
from .lora import LoRA, LoRAEmbedding, LoRALinear, LoRASwitchLinear

_TINY = 1e-30  # a row of zeros (padding of a vocabulary) has no direction; it stays zero


class DoRA(LoRA):
    """What DoRA layers share: the magnitude m and the rows' lengths."""

    def settle(self) -> None:
        """Make ‖W‖² of the base, and m so that the outputs are those of W + s B A."""
        self._squares = mx.square(full_weight(self.base, mx.float32)).sum(axis=-1)
        mx.eval(self._squares)  # now: one full weight at a time
        self.m = self.row_norms()

    def row_norms(self) -> mx.array:
        """Return ‖W + s B A‖ of each row, without gradient: (..., rows)."""
        # Contiguous, since BLAS rounds otherwise for a transposed matrix, and a loaded one is not transposed.
        left, right = (mx.contiguous(mx.stop_gradient(factor)) for factor in self.factors())
        across = project(self.base, right).astype(mx.float32).swapaxes(-1, -2)  # W Rᵀ: (..., rows, rank)
        change = 2 * across + self.scale * (left @ (right @ right.swapaxes(-1, -2)))
        return mx.sqrt(mx.maximum(self._squares + self.scale * (left * change).sum(axis=-1), _TINY))

    def merged(self, weight: mx.array) -> mx.array:
        """Return (m / ‖V‖) V for the base's ``weight`` W, float32."""
        v = super().merged(weight)
        return v * (self.m / mx.maximum(mx.linalg.norm(v, axis=-1), _TINY**0.5))[..., None]


def _stretch(y: mx.array, change: mx.array, gain: mx.array, bias: mx.array | None) -> mx.array:
    """Return y + (g - 1) (y - bias) + g change, which is y itself while g = 1 and there is no change."""
    unbiased = y if bias is None else y - bias
    return y + (gain - 1).astype(y.dtype) * unbiased + gain.astype(y.dtype) * change


class DoRALinear(DoRA, LoRALinear):
    """y = (m / ‖V‖) ∘ (x Wᵀ + s (x A) B) + bias over a Linear or QuantizedLinear; arguments as of LoRALinear."""

    groups: ClassVar = {**LoRALinear.groups, "m": "magnitude"}

    def __call__(self, x: mx.array) -> mx.array:
        """Return y: (..., in) → (..., out)."""
        a, b = self.pair()
        change = self.scale * (self.dropout(x) @ a.astype(x.dtype) @ b.astype(x.dtype))
        return _stretch(self.base(x), change, self.m / self.row_norms(), self.base.get("bias"))


class DoRAEmbedding(DoRA, LoRAEmbedding):
    """y = (m[x] / ‖V[x]‖) (W[x] + s A[x] B) over an Embedding or QuantizedEmbedding; arguments as of LoRAEmbedding."""

    groups: ClassVar = {**LoRAEmbedding.groups, "m": "embedding"}

    def __call__(self, x: mx.array) -> mx.array:
        """Return the tokens' embeddings: (...) → (..., hidden)."""
        a, b = self.pair()
        y, change = self.base(x), self.scale * (a[x] @ b)
        squares = mx.square(mx.stop_gradient(y.astype(mx.float32) + change)).sum(axis=-1)  # of these rows only
        gain = (self.m[x] / mx.sqrt(mx.maximum(squares, _TINY)))[..., None]
        return _stretch(y, self.dropout(change).astype(y.dtype), gain, None)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the tied head's logits: (..., hidden) → (..., vocabulary)."""
        a, b = self.pair()
        change = self.scale * (self.dropout(x) @ b.T.astype(x.dtype) @ a.T.astype(x.dtype))
        return _stretch(self.base.as_linear(x), change, self.m / self.row_norms(), None)


class DoRASwitchLinear(DoRA, LoRASwitchLinear):
    """One DoRA for each expert; arguments as of LoRASwitchLinear. W Rᵀ is made for all experts, chosen or not."""

    groups: ClassVar = {**LoRASwitchLinear.groups, "m": "magnitude"}

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return each row's output from its expert: (..., in) and its expert's index → (..., out)."""
        base: Any = self.base
        y = base(x, indices, sorted_indices=sorted_indices)
        gain = (self.m / self.row_norms())[indices][..., None, :]
        bias = base.bias[indices][..., None, :] if "bias" in base else None
        return _stretch(y, self.change(x, indices, sorted_indices), gain, bias)
