"""Modules of the base that train in full: norms, embeddings, heads.

Their parameters become float32, because a step of 1e-6 would be rounded away in bfloat16. Their
outputs keep the base's type. The modules keep their paths in the model.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class FullyTrained:
    """Marks a module that trains in full."""


def train_in_full(module: nn.Module) -> None:
    """Unfreeze ``module`` and convert its parameters to float32."""
    marked: Any = module
    first = next(iter(own_arrays(module).values()))
    marked.dtype_of_base = first.dtype
    module.set_dtype(mx.float32)

    # Change the class in place, because a wrapper would change the paths of the parameters.
    module.__class__ = _fully_trained(type(module))
    module.unfreeze()


def end_training(module: nn.Module) -> None:
    """Undo ``train_in_full``, but keep the trained values."""
    marked: Any = module
    module.set_dtype(marked.dtype_of_base)

    # In the method resolution order, the original class follows the subclass and FullyTrained.
    module.__class__ = type(module).__mro__[2]
    module.freeze()


def own_arrays(module: nn.Module) -> dict[str, mx.array]:
    """Return a module's arrays by name."""
    arrays: Any = tree_flatten(module.parameters())
    return dict(arrays)


def arrays_by_path(modules: Mapping[str, nn.Module]) -> dict[str, mx.array]:
    """Return the arrays of modules by their full names."""
    arrays: dict[str, mx.array] = {}
    for path, module in modules.items():
        for name, array in own_arrays(module).items():
            arrays[f"{path}.{name}"] = array
    return arrays


@cache
def _fully_trained(kind: Any) -> type[nn.Module]:
    """Return a subclass of ``kind`` whose outputs have the same types as before."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> mx.array:  # noqa: N807
        return kind.__call__(self, *args, **kwargs).astype(self.dtype_of_base)

    def as_linear(self: Any, x: mx.array) -> mx.array:
        return kind.as_linear(self, x).astype(x.dtype)

    methods: dict[str, Any] = {"__call__": __call__}
    if hasattr(kind, "as_linear"):
        methods["as_linear"] = as_linear
    return type(kind.__name__, (FullyTrained, kind), methods)
