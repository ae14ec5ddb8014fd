"""The two functions that a training step calls: sum a batch's gradients, and update the model."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .compiled import CompiledByShape, Traces
from .optimizer import LoRAPlus

Tree = dict[str, Any]
Sums = tuple[mx.array, Tree]
"""The summed loss and its gradients. For preferences, the loss is followed by statistics."""
Accumulate = Callable[[tuple[mx.array, ...], Sums | None], Sums]
Update = Callable[[mx.array, Tree, mx.array], tuple[mx.array, mx.array]]


def make_step(
    model: nn.Module,
    loss: Callable[..., Any],
    optimizer: LoRAPlus,
    *,
    compiled: bool,
    traces: Traces | None = None,
) -> tuple[Accumulate, Update]:
    """Return ``accumulate(arrays, carried)`` and ``update(total, gradients, count)``.

    ``accumulate`` adds a batch's summed loss and gradients to the pair ``carried``, and returns the
    sums. ``carried`` is None for the first batch of a step. ``update`` divides the summed gradients
    by ``count``, the number of supervised tokens or of pairs in the step, and updates the model. It
    returns (summed loss, gradient norm). If one of these is not finite, the model is unchanged.

    If ``loss`` also returns statistics, as for pairs of answers, they follow the loss in the sums.

    Args:
        model: The model.
        loss: Called with the model and a batch's arrays.
        optimizer: The optimizer, which holds the trainable parameters.
        compiled: Whether to compile both functions.
        traces: What keeps the compiled functions of ``accumulate``; by default a new ``Traces``.
            ``update`` has its own, so that many shapes of batches can't take its place.
    """
    loss_and_gradients = nn.value_and_grad(model, loss)

    def accumulate(arrays: tuple[mx.array, ...], carried: Sums | None) -> Sums:
        value, gradients = loss_and_gradients(model, *arrays)
        if not isinstance(value, mx.array):
            summed, stats = value
            value = mx.concatenate([summed[None], stats])
        new = (value, gradients)
        return new if carried is None else tree_map(mx.add, carried, new)

    def update(total: mx.array, gradients: Tree, count: mx.array) -> tuple[mx.array, mx.array]:
        mean = tree_map(lambda gradient: gradient / count, gradients)
        return total, optimizer.update(model, mean, usable=mx.isfinite(total).all())

    if not compiled:
        return accumulate, update
    state = [model.state, optimizer.state, mx.random.state]
    return (
        CompiledByShape(accumulate, state, traces or Traces()),
        CompiledByShape(update, state, Traces(1)),
    )
