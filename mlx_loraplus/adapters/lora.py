"""LoRA layers over every kind of base that mlx-lm's models have: linear, embedding and expert (switch) layers.

y = W x + s B A x, with A random and B = 0 at the start, so that attaching changes nothing (Hu et
al., arXiv 2106.09685; the start is the LoRA+ paper's Init[1], arXiv 2402.12354 §3). The base stays
a child and stays frozen. A and B are float32 whatever the base is, and are cast to the activations'
type where they meet them.

The names and shapes of the parameters, ``lora_a`` and ``lora_b``, are mlx-lm's, so what is saved
loads there.
"""

import math
import weakref
from typing import Any, ClassVar

import mlx.core as mx
from mlx.nn.layers.distributed import sum_gradients

from .adapter import Adapter
from .layers import EMBEDDINGS, EXPERTS, LINEARS, SHARDED, SPLIT_ROWS, base_shape, project

_summed: list[Any] = []  # the x that sharded layers were given last, weakly, and what it became


@mx.custom_function
def add_product(y: mx.array, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """Return y + x A B: y (..., out), x (..., in), A (in, rank), B (rank, out).

    MLX's own gradient goes over the wide arrays several times more.
    """
    return mx.addmm(y, x @ a, b)


@add_product.vjp
def _(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
    _, x, a, b = primals
    tokens, d = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    dz = d @ b.T  # (tokens, rank)
    return cotangent, (dz @ a.T).reshape(x.shape), tokens.T @ dz, (tokens @ a).T @ d


class LoRA(Adapter):
    """What LoRA layers share.

    Args:
        base: The frozen base.
        rank: r, at most min(rows, columns).
        scale: s = alpha / rank.
        dropout: Share of the adapter's input (of an embedding's output) set to zero while training.

    PiSSA's start A₀, B₀, where there is one, is taken off again: y = W x + s (B A - B₀ A₀) x. That
    is PiSSA's residual base W - s B₀ A₀ with nothing rounded, over any base, and a plain LoRA of
    twice the rank to everybody else.
    """

    groups: ClassVar = {"lora_a": "lora_a", "lora_b": "lora_b"}
    kept: ClassVar = (1, 0, 0)
    rank_of_b: ClassVar[int] = -2  # B's axis of rank

    def __init__(self, base: Any, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base, scale, dropout)
        self._start_a: Any = None
        self._start_b: Any = None
        shapes = self.shapes(base, rank)
        fan_in = math.prod(shapes["lora_a"]) // (rank * math.prod(base.weight.shape[:-2]))
        self.lora_a, self.lora_b = uniform(shapes["lora_a"], fan_in), mx.zeros(shapes["lora_b"])
        self.settle()

    @classmethod
    def shapes(cls, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        (rows, columns), experts = base_shape(base), base.weight.shape[:-2]
        a, b = cls.to_factors(mx.zeros((*experts, rows, rank)), mx.zeros((*experts, rank, columns)))
        return {"lora_a": a.shape, "lora_b": b.shape}

    @property
    def rank(self) -> int:
        """The rank r of the A and B that train."""
        return self.lora_a.shape[1]

    @property
    def has_start(self) -> bool:
        """Whether a start is taken off."""
        return self._start_a is not None

    def lora_matrices(self) -> tuple[mx.array, mx.array]:
        """Return A and B as they act, of rank 2 r over a PiSSA start."""
        if self._start_a is None:
            return self.lora_a, self.lora_b
        a = mx.concatenate([self.lora_a, self._start_a], axis=1)
        return a, mx.concatenate([self.lora_b, -self._start_b], axis=self.rank_of_b)

    def set_lora_matrices(self, a: mx.array, b: mx.array, *, start_rank: int | None = None) -> None:
        """Take A and B; with ``start_rank`` they are what ``lora_matrices`` gave, the last ``start_rank`` being the start."""
        if start_rank is not None:
            a, self._start_a = mx.split(a, [start_rank], axis=1)
            b, start_b = mx.split(b, [start_rank], axis=self.rank_of_b)
            self._start_b = -start_b
        self.lora_a, self.lora_b = a, b

    def set_factors(self, left: mx.array, right: mx.array) -> None:
        """Take A and B from L (..., rows, rank) and R (..., rank, columns)."""
        self.lora_a, self.lora_b = self.to_factors(left, right)

    def subtract_start(self) -> None:
        """Take the A and B of this moment off the base: the outputs are those of the base alone."""
        self._start_a, self._start_b = self.lora_a, self.lora_b

    def settle(self) -> None:
        """Make what follows from base, A and B, once these are as they start."""


class LoRALinear(LoRA):
    """y = x Wᵀ + s (x A) B over a Linear or QuantizedLinear, A (in, rank), B (rank, out)."""

    def __call__(self, x: mx.array) -> Any:
        """Return y: (..., in) → (..., out)."""
        a, b = self.lora_matrices()
        return add_product(
            self.base(x), self.dropout(x), a.astype(x.dtype), (self.scale * b).astype(x.dtype)
        )


class ShardedLoRALinear(LoRALinear):
    """A LoRA over a linear of which each process holds a part (see sharding.py); A and B are whole."""

    def __call__(self, x: mx.array) -> Any:
        """Return y: (..., in) → (..., this process's part of out), or (..., its part of in) → (..., out)."""
        base, (a, b) = self.base, self.lora_matrices()
        rank, processes = base.group.rank(), base.group.size()
        a, b = a.astype(x.dtype), (self.scale * b).astype(x.dtype)
        if isinstance(base, SPLIT_ROWS):
            x = _sum_gradients(x, base.group)
            y: Any = add_product(
                project(base, x), self.dropout(x), a, mx.split(b, processes, axis=1)[rank]
            )
        else:
            dropped = self.dropout(x, (rank, processes))
            y = add_product(project(base, x), dropped, mx.split(a, processes, axis=0)[rank], b)
            y = mx.distributed.all_sum(y, group=base.group)
        return y + base.bias if "bias" in base else y


class LoRAEmbedding(LoRA):
    """y = W[x] + s A[x] B over an Embedding or QuantizedEmbedding, A (vocabulary, rank), B (rank, hidden).

    Where the model ties its head to the base, the head gets the same change.
    """

    groups: ClassVar = {"lora_a": "embedding", "lora_b": "embedding"}
    child: ClassVar = "embedding"

    @staticmethod
    def to_factors(one: mx.array, other: mx.array) -> tuple[mx.array, mx.array]:
        """Return them as they are: L is A and R is B."""
        return one, other

    def __call__(self, x: mx.array) -> mx.array:
        """Return the tokens' embeddings: (...) → (..., hidden)."""
        a, b = self.lora_matrices()
        y = self.base(x)
        return y + (self.scale * self.dropout(a[x] @ b)).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the tied head's logits, x Wᵀ + s (x Bᵀ) Aᵀ: (..., hidden) → (..., vocabulary)."""
        a, b = self.lora_matrices()
        z = self.dropout(x) @ b.T.astype(x.dtype)
        return mx.addmm(self.base.as_linear(x), z, a.T.astype(x.dtype), alpha=self.scale)


class LoRASwitchLinear(LoRA):
    """One LoRA for each expert e of a SwitchLinear or QuantizedSwitchLinear: y = x W[e]ᵀ + s (x A[e]ᵀ) B[e]ᵀ.

    A is (experts, rank, in), B (experts, out, rank).
    """

    rank_of_b: ClassVar = -1

    @staticmethod
    def to_factors(one: mx.array, other: mx.array) -> tuple[mx.array, mx.array]:
        """Exchange them: L is B and R is A."""
        return other, one

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return each row's output from its expert: (..., in) and its expert's index → (..., out)."""
        z = self.dropout(x)
        for matrix in self.lora_matrices():
            transposed = matrix.swapaxes(-1, -2).astype(x.dtype)
            z = mx.gather_mm(z, transposed, rhs_indices=indices, sorted_indices=sorted_indices)
        return self.base(x, indices, sorted_indices=sorted_indices) + self.scale * z


def _sum_gradients(x: mx.array, group: mx.distributed.Group) -> Any:
    """Return x, whose gradient is summed over the processes: once for all the layers that are given this x.

    MLX's own layers do it once each: five times a block, for q, k, v, gate and up, where two are
    enough.
    """
    if not (_summed and _summed[0]() is x):
        identity: Any = sum_gradients(group)
        _summed[:] = weakref.ref(x, lambda _: _summed.clear()), identity(x)
    return _summed[1]


def uniform(shape: tuple[int, ...], fan_in: int) -> mx.array:
    """Return numbers uniform in ±1/√fan-in: mlx-lm's and, up to a constant, everybody's start."""
    bound = 1 / math.sqrt(fan_in)
    return mx.random.uniform(-bound, bound, shape)


LAYERS = {
    SHARDED: ShardedLoRALinear,
    LINEARS: LoRALinear,
    EMBEDDINGS: LoRAEmbedding,
    EXPERTS: LoRASwitchLinear,
}
