"""Dropout with reproducible masks, so that recomputing a block uses the same masks."""

from collections.abc import Generator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

_shared_keys: list[mx.array] = []  # one for each open context, the innermost last


@contextmanager
def drawing_from(key: mx.array) -> Generator[None]:
    """Draw the masks of every ``Dropout`` from ``key`` within the context.

    Elsewhere the masks come from MLX's global random state.

    Args:
        key: A random key, (2,) uint32.
    """
    _shared_keys.append(key)
    try:
        yield
    finally:
        _shared_keys.pop()


class Dropout(nn.Module):
    """Dropout: y = x * mask / (1 - p) while training, y = x otherwise.

    The mask is Bernoulli(1 - p), with p in [0, 1).
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def __call__(self, x: mx.array, shard: tuple[int, int] = (0, 1)) -> mx.array:
        """Return y, with the shape and type of x.

        Args:
            x: The input, (..., columns).
            shard: (rank of this process, number of processes), if the processes divide the last
                axis of x.
        """
        if self.p == 0 or not self.training:
            return x

        # Within a context, each call takes a new key.
        key = None
        if _shared_keys:
            _shared_keys[-1], key = mx.random.split(_shared_keys[-1])

        # Every process draws the whole mask, so that the masks are the same as in a single process.
        rank, processes = shard
        columns = x.shape[-1]
        shape = (*x.shape[:-1], processes * columns)
        mask = mx.random.bernoulli(1 - self.p, shape, key=key)
        if processes > 1:
            first = rank * columns
            mask = mask[..., first : first + columns]

        factor = mask * (1 / (1 - self.p))
        return x * factor.astype(x.dtype)


def train_without_dropout(model: nn.Module) -> None:
    """Switch a model to training mode with dropout off, to compute gradients that can be compared.

    In evaluation mode, mlx-lm computes some layers with Metal kernels that have no gradient.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, Dropout | nn.Dropout):
            module.eval()
