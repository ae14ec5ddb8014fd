"""Modules of the base that train in full: norms, embeddings, heads.

Their numbers become float32, since a step of 1e-6 would vanish in a bfloat16; what they return
keeps the base's type. They stay in their place under their own names.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class FullyTrained:
    """Marks a module that trains in full."""


def train_in_full(module: nn.Module) -> None:
    """Unfreeze ``module``, its numbers in float32."""
    unmarked: Any = module
    unmarked.dtype_of_base = next(iter(own_arrays(module).values())).dtype
    module.set_dtype(mx.float32)
    module.__class__ = _fully_trained(type(module))
    module.unfreeze()


def end_training(module: nn.Module) -> None:
    """Undo ``train_in_full``, but for what was learned."""
    marked: Any = module
    module.set_dtype(marked.dtype_of_base)
    module.__class__ = type(module).__mro__[2]
    module.freeze()


def own_arrays(module: nn.Module) -> dict[str, mx.array]:
    """Return a module's arrays by name."""
    return dict(tree_flatten(module.parameters()))  # pyright: ignore[reportArgumentType, reportReturnType]


@cache
def _fully_trained(kind: Any) -> type[nn.Module]:
    """Return a subclass of ``kind`` whose outputs have the type they had before."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> mx.array:  # noqa: N807
        return kind.__call__(self, *args, **kwargs).astype(self.dtype_of_base)

    def as_linear(self: Any, x: mx.array) -> mx.array:
        return kind.as_linear(self, x).astype(x.dtype)

    body: dict[str, Any] = {"__call__": __call__} | (
        {"as_linear": as_linear} if hasattr(kind, "as_linear") else {}
    )
    return type(kind.__name__, (FullyTrained, kind), body)
