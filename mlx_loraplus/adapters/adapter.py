"""The base class of all adapters: a frozen base layer and a low-rank change of its weight."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .base_layers import WHOLE
from .dropout import Dropout

Projections = tuple[mx.array, mx.array]
"""Two frozen float32 matrices that all layers share: (largest in, rank), (rank, largest out)."""


class SavedActivations(NamedTuple):
    """How many arrays a layer saves for the backward pass, by their width."""

    inputs: int  # as wide as the layer's input
    outputs: int  # as wide as its output
    rank: int  # as wide as the rank


class Adapter(nn.Module):
    """A frozen base layer and a change s L R of its weight W.

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

        # Whether the base belongs to the adapter and is saved with it, as after LoftQ.
        self.owns_base = False

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
