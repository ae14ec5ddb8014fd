"""The base class of all adapters, and LoRA over linear, embedding and expert (switch) layers.

    y = W x + s B A x

A is random and B = 0 at the start, so that attaching changes nothing (Hu et al., arXiv 2106.09685;
this start is Init[1] of the LoRA+ paper, arXiv 2402.12354 §3). The base is a child of the layer and
stays frozen. A and B are float32 over any base. The forward pass casts them to the activations'
type.

The parameters ``lora_a`` and ``lora_b`` have the same names and shapes as in mlx-lm, so mlx-lm can
load the saved adapters. For a linear layer they are the transposes of A and B above: in code,
y = x Wᵀ + s (x A) B with A (in, r) and B (r, out).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..config import AdapterConfig
from .base_layers import EMBEDDINGS, EXPERTS, LINEARS, WHOLE, base_shape
from .dropout import Dropout

Projections = tuple[mx.array, mx.array]
"""Two frozen float32 matrices that all layers share: (largest in, rank), (rank, largest out)."""


class SavedActivations(NamedTuple):
    """How many arrays a layer saves for the backward pass, by their width."""

    inputs: int  # as wide as the layer's input
    outputs: int  # as wide as its output
    rank: int  # as wide as the rank


class Adapter(nn.Module):
    """A frozen base layer and a change s L R of its weight W; for LoRA, L is B and R is A.

    The constructor of a layer takes (base, rank, scale, dropout), or (base, projections, dropout)
    if the kind sets ``make_projections``. A layer class defines ``groups``, ``shapes``,
    ``lora_matrices`` and ``__call__``. It also overrides ``merged`` if the merged weight is not
    W + s L R.
    """

    groups: ClassVar[dict[str, str]] = {}
    """LoRA+ group of each parameter of the adapter; A and B, or their counterparts, come first."""

    child: ClassVar[str] = "linear"
    """Name of the attribute that holds the base, the same as in mlx-lm's layers."""

    saved_activations: ClassVar[SavedActivations] = SavedActivations(inputs=1, outputs=1, rank=0)
    """What the layer saves for the backward pass, besides what its base saves."""

    frozen_extras: ClassVar[tuple[str, ...]] = ()
    """Parameters for which the layer also holds a frozen float32 array of the same size."""

    make_projections: ClassVar[Callable[[list[tuple[int, int]], int], Projections] | None] = None
    """Makes the shared projections from the (out, in) of all layers and a rank."""

    def __init__(
        self,
        base: nn.Module,
        scale: float,
        dropout: float,
    ):
        super().__init__()
        self[self.child] = base
        self.scale = scale  # s
        self.dropout = Dropout(dropout)
        self._projections: Any = None

        # Whether the base belongs to the adapter and is saved with it, as with ``quantize``.
        self.owns_base = False

        # The settings that the adapter was made with; None if they are unknown.
        self.made_with: AdapterConfig | None = None

    @classmethod
    def shapes(cls, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters that an adapter over ``base`` adds."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """The kind's name in the settings, which is also the name of its module."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def projections(self) -> Projections | None:
        """The matrices that all of the model's adapters share, if the kind has such matrices."""
        return self._projections

    @property
    def is_plain_lora(self) -> bool:
        """Whether the merged weight is W + s L R, so that other programs can load it as a LoRA."""
        layer = type(self)
        return layer.merged is Adapter.merged and layer.delta is Adapter.delta

    @property
    def base(self) -> Any:
        """The frozen layer inside the adapter."""
        return self[self.child]

    def replace_base(self, base: nn.Module) -> None:
        """Replace the base with a layer that belongs to the adapter."""
        self[self.child] = base
        self.owns_base = True

    def lora_matrices(self) -> tuple[mx.array, mx.array]:
        """Return the A and B of the equivalent LoRA, in the shapes of ``lora_a`` and ``lora_b``.

        The scale of this LoRA is ``scale``.
        """
        raise NotImplementedError

    @staticmethod
    def to_factors(first: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
        """Convert (A, B) to (L, R), or (L, R) to (A, B): the conversion is its own inverse."""
        return second.T, first.T

    def factors(self) -> tuple[mx.array, mx.array]:
        """Return L (..., rows, rank) and R (..., rank, columns); the weight changes by s L R."""
        return self.to_factors(*self.lora_matrices())

    def delta(self, part: slice = WHOLE) -> mx.array:
        """Return s L R, the change of the base's weight, in float32.

        Args:
            part: The rows to return, or the experts of a switch layer.
        """
        left, right = self.factors()

        # R is shared by all rows of a matrix, but each expert has its own.
        if right.ndim == 3:
            right = right[part]
        return self.scale * (left[part] @ right)

    def merged(self, weight: mx.array, part: slice = WHOLE) -> mx.array:
        """Return the weight of a plain layer that is equivalent to the base with the adapter.

        Args:
            weight: The base's weight, float32, or a part of it.
            part: The rows that ``weight`` holds, or the experts of a switch layer.
        """
        return weight + self.delta(part)


def base_of(layer: Any) -> Any:
    """Return the base of an adapter, or ``layer`` unchanged if it is not an adapter."""
    return layer.base if isinstance(layer, Adapter) else layer


@mx.custom_function
def add_product(y: mx.array, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """Return y + x A B, with a gradient that reads the wide arrays less often than MLX's gradient.

    Args:
        y: (..., out).
        x: (..., in).
        a: A, (in, rank).
        b: B, (rank, out).
    """
    return mx.addmm(y, x @ a, b)


@add_product.vjp
def _(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
    _, x, a, b = primals
    tokens = x.reshape(-1, x.shape[-1])
    d = cotangent.reshape(-1, cotangent.shape[-1])

    # The gradient of the small product x A: (tokens, rank).
    dz = d @ b.T

    dx = (dz @ a.T).reshape(x.shape)
    da = tokens.T @ dz
    db = (tokens @ a).T @ d
    return cotangent, dx, da, db


class LoRA(Adapter):
    """Base class of the LoRA layers.

    With a PiSSA start A₀, B₀ the layer is y = W x + s (B A - B₀ A₀) x. This is equivalent to
    PiSSA's residual base W - s B₀ A₀, but the residual is not rounded. It works over any base, and
    other programs can load the adapter as a plain LoRA of rank 2 r.

    Args:
        base: The frozen base.
        rank: r, at most min(rows, columns).
        scale: s = alpha / rank.
        dropout: Probability that an element of the adapter's input (of an embedding's output) is
            zeroed while training.
    """

    groups: ClassVar = {"lora_a": "lora_a", "lora_b": "lora_b"}  # parameter → its LoRA+ group
    saved_activations: ClassVar = SavedActivations(inputs=1, outputs=0, rank=0)
    rank_of_b: ClassVar[int] = -2  # the axis of B that has length r

    def __init__(self, base: Any, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base, scale, dropout)
        self._start_a: Any = None
        self._start_b: Any = None

        # The fan-in of A is the product of its axes except those of the rank and the experts.
        shapes = self.shapes(base, rank)
        experts = math.prod(base.weight.shape[:-2])
        fan_in = math.prod(shapes["lora_a"]) // (rank * experts)
        self.lora_a = uniform(shapes["lora_a"], fan_in)
        self.lora_b = mx.zeros(shapes["lora_b"])
        self.update_derived()

    @classmethod
    def shapes(cls, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        rows, columns = base_shape(base)
        return {"lora_a": (columns, rank), "lora_b": (rank, rows)}

    @property
    def rank(self) -> int:
        """The rank r of the trained A and B."""
        return self.lora_a.shape[1]

    @property
    def has_start(self) -> bool:
        """Whether a PiSSA start is subtracted."""
        return self._start_a is not None

    def lora_matrices(self) -> tuple[mx.array, mx.array]:
        """Return A and B including a PiSSA start, which doubles their rank."""
        if self._start_a is None:
            return self.lora_a, self.lora_b

        a = mx.concatenate([self.lora_a, self._start_a], axis=1)
        b = mx.concatenate([self.lora_b, -self._start_b], axis=self.rank_of_b)
        return a, b

    def set_lora_matrices(self, a: mx.array, b: mx.array, *, start_rank: int | None = None) -> None:
        """Set A and B.

        Args:
            a: A.
            b: B.
            start_rank: Rank of the PiSSA start at the end of A and B, in the layout that
                ``lora_matrices`` returns; None if A and B have no start.
        """
        if start_rank is not None:
            a, self._start_a = mx.split(a, [start_rank], axis=1)
            b, start_b = mx.split(b, [start_rank], axis=self.rank_of_b)
            self._start_b = -start_b
        self.lora_a, self.lora_b = a, b

    def set_factors(self, left: mx.array, right: mx.array) -> None:
        """Set A and B from L (..., rows, rank) and R (..., rank, columns)."""
        self.lora_a, self.lora_b = self.to_factors(left, right)

    def subtract_start(self) -> None:
        """Subtract the current A and B, so that the outputs are those of the base alone."""
        self._start_a, self._start_b = self.lora_a, self.lora_b

    def update_derived(self) -> None:
        """Compute what depends on the base and on the initial A and B, once these are set.

        LoRA has nothing to compute; DoRA computes its magnitudes.
        """


class LoRALinear(LoRA):
    """LoRA over a Linear or QuantizedLinear: y = x Wᵀ + s (x A) B, A (in, rank), B (rank, out)."""

    def __call__(self, x: mx.array) -> Any:
        """Return y: (..., in) → (..., out)."""
        a, b = self.lora_matrices()
        a = a.astype(x.dtype)
        b = (self.scale * b).astype(x.dtype)
        return add_product(self.base(x), self.dropout(x), a, b)


class LoRAEmbedding(LoRA):
    """LoRA over an Embedding or QuantizedEmbedding: y = W[x] + s A[x] B.

    A is (vocabulary, rank), B is (rank, hidden). If the model's head is tied to the base, the head
    changes with it.
    """

    groups: ClassVar = {"lora_a": "embedding", "lora_b": "embedding"}
    child: ClassVar = "embedding"

    @classmethod
    def shapes(cls, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        vocabulary, hidden = base_shape(base)
        return {"lora_a": (vocabulary, rank), "lora_b": (rank, hidden)}

    @staticmethod
    def to_factors(first: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
        """Return the matrices unchanged: L is A and R is B."""
        return first, second

    def __call__(self, x: mx.array) -> mx.array:
        """Return the tokens' embeddings: (...) → (..., hidden)."""
        a, b = self.lora_matrices()
        y = self.base(x)
        change = self.scale * self.dropout(a[x] @ b)
        return y + change.astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the tied head's logits, x Wᵀ + s (x Bᵀ) Aᵀ: (..., hidden) → (..., vocabulary)."""
        a, b = self.lora_matrices()
        z = self.dropout(x) @ b.T.astype(x.dtype)
        return mx.addmm(self.base.as_linear(x), z, a.T.astype(x.dtype), alpha=self.scale)


class LoRASwitchLinear(LoRA):
    """LoRA over a SwitchLinear or QuantizedSwitchLinear, with one A and B for each expert e.

    y = x W[e]ᵀ + s (x A[e]ᵀ) B[e]ᵀ, A (experts, rank, in), B (experts, out, rank).
    """

    rank_of_b: ClassVar = -1

    @classmethod
    def shapes(cls, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        rows, columns = base_shape(base)
        (experts,) = base.weight.shape[:-2]
        return {"lora_a": (experts, rank, columns), "lora_b": (experts, rows, rank)}

    @staticmethod
    def to_factors(first: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
        """Swap the matrices: L is B and R is A."""
        return second, first

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return each row's output from its expert: (..., in) → (..., out).

        Args:
            x: The input.
            indices: The expert of each row.
            sorted_indices: Whether ``indices`` is sorted, which makes the products faster.
        """
        z = self.dropout(x)
        for matrix in self.lora_matrices():
            transposed = matrix.swapaxes(-1, -2).astype(x.dtype)
            z = mx.gather_mm(z, transposed, rhs_indices=indices, sorted_indices=sorted_indices)
        return self.base(x, indices, sorted_indices=sorted_indices) + self.scale * z


def uniform(shape: tuple[int, ...], fan_in: int) -> mx.array:
    """Return random numbers, uniform in ±1/√fan-in.

    This is how mlx-lm initializes A; other libraries differ by a constant factor.
    """
    bound = 1 / math.sqrt(fan_in)
    return mx.random.uniform(-bound, bound, shape)


LAYERS = {LINEARS: LoRALinear, EMBEDDINGS: LoRAEmbedding, EXPERTS: LoRASwitchLinear}
