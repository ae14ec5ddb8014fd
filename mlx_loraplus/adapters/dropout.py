"""Dropout whose mask can be drawn twice: a block that is computed again on the way back must see the same one."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

_shared_keys: list[mx.array] = []


@contextmanager
def drawing_from(key: mx.array) -> Iterator[None]:
    """Draw the masks of every ``Dropout`` inside the context from ``key``, (2,) uint32, not from MLX's global state."""
    _shared_keys.append(key)
    try:
        yield
    finally:
        _shared_keys.pop()


class Dropout(nn.Module):
    """y = x * mask / (1 - p) while training, x otherwise; mask ~ Bernoulli(1 - p), p in [0, 1)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def __call__(self, x: mx.array, share: tuple[int, int] = (0, 1)) -> mx.array:
        """Return y, of x's shape and type; of (rank, processes), x is the rank's part of a last axis."""
        if self.p == 0 or not self.training:
            return x
        key = None
        if _shared_keys:
            _shared_keys[-1], key = mx.random.split(_shared_keys[-1])
        (rank, processes), columns = share, x.shape[-1]
        mask = mx.random.bernoulli(1 - self.p, (*x.shape[:-1], processes * columns), key=key)
        if processes > 1:
            mask = mask[..., rank * columns : (rank + 1) * columns]
        return x * (mask * (1 / (1 - self.p))).astype(x.dtype)
