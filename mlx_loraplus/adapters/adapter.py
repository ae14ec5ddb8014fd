"""What all kinds of adapters are: a frozen base, and a change of its weight."""

from collections.abc import Callable
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from .dropout import Dropout
from .layers import WHOLE

Projections = tuple[mx.array, mx.array]
"""Two float32 matrices that all layers share and none trains: (largest in, rank) and (rank, largest out)."""


class Adapter(nn.Module):
    """A frozen base and a change of its weight W, s times a product of low rank.

    A kind's layers are made of (base, rank, scale, dropout), or of (base, projections, dropout) if
    they ``draw`` some. They say ``groups``, ``shapes``, ``lora_matrices`` and ``__call__``, and
    ``merged`` where W + s L R is not all they do.
    """

    groups: ClassVar[
        dict[str, str]
    ] = {}  # each of its own parameters, A and B or their likes first → its LoRA+ group
    child: ClassVar[str] = "linear"  # where the base is, as in mlx-lm's layers
    kept: ClassVar[tuple[int, int, int]] = (
        1,
        1,
        0,
    )  # for the way back: times what it is given, returns, and its rank
    untrained: ClassVar[
        tuple[str, ...]
    ] = ()  # of these parameters as many numbers again, float32, that do not train
    draw: ClassVar[Callable[[list[tuple[int, int]], int], Projections] | None] = (
        None  # for layers of these (out, in)
    )

    def __init__(self, base: nn.Module, scale: float, dropout: float):
        super().__init__()
        self[self.child] = base
        self.scale = scale  # s
        self.dropout = Dropout(dropout)
        self._projections: Any = None
        # Or the base is not the model's own any more, and is saved with the adapter (LoftQ)
        self.owns_base = False

    @classmethod
    def shapes(cls, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the adapter's own parameters over ``base``."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """What the settings call it: the name of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def projections(self) -> Projections | None:
        """The matrices that it shares with the model's other adapters."""
        return self._projections

    @property
    def is_plain_lora(self) -> bool:
        """Whether W + s L R is all it does, as it is of other programs' LoRA."""
        return (type(self).merged, type(self).delta) == (Adapter.merged, Adapter.delta)

    @property
    def base(self) -> Any:
        """The layer below the adapter."""
        return self[self.child]

    def replace_base(self, base: nn.Module) -> None:
        """Put the adapter on another base, which becomes its own."""
        self[self.child], self.owns_base = base, True

    def lora_matrices(self) -> tuple[mx.array, mx.array]:
        """Return A and B in the shapes of ``lora_a`` and ``lora_b``: with ``scale`` they are the adapter as a LoRA."""
        raise NotImplementedError

    @staticmethod
    def to_factors(one: mx.array, other: mx.array) -> tuple[mx.array, mx.array]:
        """Return the L and R of A and B, and the A and B of L and R: it is its own inverse."""
        return other.T, one.T

    def factors(self) -> tuple[mx.array, mx.array]:
        """Return L (..., rows, rank) and R (..., rank, columns); s L R is the change of W (..., rows, columns)."""
        return self.to_factors(*self.lora_matrices())

    def delta(self, part: slice = WHOLE) -> mx.array:
        """Return s L R, the change of the base's weight, float32, or ``part`` of its rows (of its experts)."""
        left, right = self.factors()
        return self.scale * (left[part] @ (right if right.ndim == 2 else right[part]))

    def merged(self, weight: mx.array, part: slice = WHOLE) -> mx.array:
        """Return the weight that does alone what base and adapter do together, of the base's ``weight``, float32.

        Both may be a ``part`` of the rows (of the experts).
        """
        return weight + self.delta(part)


def base_of(layer: Any) -> Any:
    """Return the layer below an adapter, or a layer without one itself."""
    return layer.base if isinstance(layer, Adapter) else layer
