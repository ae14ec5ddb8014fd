"""The choices of a training step that change its speed and memory, but not its results.

A GPU needs some microseconds to launch a kernel, whatever its size. Its slices of the vocabulary
are therefore larger than those of a CPU, and it uses MLX's own kernels where these have gradients.
"""

from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx

from ..device import Backend, on_gpu

AttentionKind = Literal["native", "chunked"]
CrossEntropyKind = Literal["native", "composed"]
DeltaRuleKind = Literal["native", "loop"]

SMALLEST_SLICE = 4 * 2**20
"""Bytes of a slice on a CPU, and the fewest that a GPU tries."""
_GPU_SLICE = 64 * 2**20
_CUDA_TILE = 128  # queries
_MOST_PADDING = 1 / 4  # of the length; shorter rows need little memory without a fused gradient


@dataclass(frozen=True)
class StepChoices:
    """How a training step is computed. Results differ only by rounding.

    Attributes:
        attention: "native" for MLX's own attention where it has a fused gradient (not for packed
            rows), and ``kernels/window_attention.py`` for sliding windows that are shorter than the
            row. "chunked" for ``kernels/attention.py`` everywhere.
        slice_bytes: Bytes of the float32 logits in one slice of the vocabulary. MLX evaluates
            ahead, so six to sixteen slices exist at once.
        cross_entropy: "native" for MLX's own cross-entropy in each slice, which reads the logits
            fewer times on a GPU. "composed" for separate operations, which are faster on a CPU.
        delta_rule: "native" for MLX's own gated delta rule (Qwen 3.5, Qwen 3 Next) where it
            computes the same as mlx-lm's loop over the tokens. "loop" for that loop, in pieces.
    """

    attention: AttentionKind = "chunked"
    slice_bytes: int = SMALLEST_SLICE
    cross_entropy: CrossEntropyKind = "composed"
    delta_rule: DeltaRuleKind = "loop"

    def other_attention(self) -> "StepChoices":
        """Return the choices with the other kind of attention."""
        return replace(self, attention="chunked" if self.attention == "native" else "native")

    def other_cross_entropy(self) -> "StepChoices":
        """Return the choices with the other kind of cross-entropy."""
        kind = "composed" if self.cross_entropy == "native" else "native"
        return replace(self, cross_entropy=kind)

    def other_delta_rule(self) -> "StepChoices":
        """Return the choices with the other way to compute the gated delta rule."""
        return replace(self, delta_rule="loop" if self.delta_rule == "native" else "native")

    def __str__(self) -> str:
        names = f"{self.attention} attention, {self.cross_entropy} cross-entropy"
        return names + (", native delta rule" if self.delta_rule == "native" else "")


def default_choices(*, gpu: bool | None = None) -> StepChoices:
    """Return the choices for a GPU or a CPU; by default for MLX's default device."""
    if gpu is None:
        gpu = on_gpu()
    return StepChoices("native", _GPU_SLICE, "native", "native") if gpu else StepChoices()


def fused_length(length: int, widths: tuple[int, int], itemsize: int, kind: Backend) -> int | None:
    """Return the length at which MLX's causal attention has a fused gradient, or None.

    It is the length of the queries, or, on CUDA, the next multiple of 128. It is None if there is
    no fused gradient for these shapes and types, or if the padding would exceed a quarter of the
    length. MLX then keeps the scores of all queries and keys. On a CPU, the length is always that
    of the queries, because there "native" is an explicit choice.

    Args:
        length: The number of queries of a row.
        widths: The widths of a head of the queries, and of the values.
        itemsize: Bytes of a number of the queries; 2 for float16 and bfloat16.
        kind: What computes the attention.
    """
    if kind == "cpu":
        return length
    if kind == "metal":
        return length if min(widths) >= 64 and max(widths) <= 256 else None

    # cuDNN's attention needs an Ampere GPU; its gradient works on tiles of 128 queries.
    is_ampere = int(mx.device_info().get("compute_capability_major", 0)) >= 8
    has_kernel = max(widths) <= 128 and all(width % 8 == 0 for width in widths)
    if not (is_ampere and itemsize == 2 and has_kernel):
        return None
    padded = -(-length // _CUDA_TILE) * _CUDA_TILE
    return padded if padded - length <= _MOST_PADDING * length else None
