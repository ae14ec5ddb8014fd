"""Gradient checkpointing: keep each block's input only, and compute the block again on the way back.

mlx-lm patches the block's class for good, and draws other dropout masks when it computes a block again. Here each block
gets a class of its own for as long as the context lasts, and a random key that both passes share.
"""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..adapters.base import blocks_of
from ..adapters.dropout import drawing_from
from .lean import reclassed


@contextmanager
def recomputing(model: nn.Module) -> Generator[None]:
    """Checkpoint every block of ``model`` inside the context; nothing is left behind after it."""
    with reclassed([(block, _checkpointed(type(block))) for block in blocks_of(model)]):
        yield


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of ``kind`` whose call is checkpointed."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32) if self.training else mx.random.key(0)

        def run(parameters: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.update(parameters)
            with drawing_from(key):
                return kind.__call__(self, *args, **kwargs)

        return mx.checkpoint(run)(self.trainable_parameters(), args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": __call__})
