"""One step: sum the loss and its gradients over batches, then update the model."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..config import TrainConfig
from ..data.batches import Batch
from ..device import on_gpu
from .compiled import CompiledByShape
from .optimizer import LoRAPlus

Tree = dict[str, Any]
Sums = tuple[mx.array, Tree]
"""The summed loss and its gradients. For pairs of answers, the loss is followed by statistics."""
Accumulate = Callable[[tuple[mx.array, ...], Sums | None], Sums]
Update = Callable[[mx.array, Tree, mx.array], tuple[mx.array, mx.array]]


def make_step(
    model: nn.Module, loss: Callable[..., Any], optimizer: LoRAPlus, *, compiled: bool
) -> tuple[Accumulate, Update]:
    """Return ``accumulate(arrays, carried)`` and ``update(total, gradients, count)``.

    ``accumulate`` adds a batch's summed loss and gradients to the pair ``carried``, and returns the
    sums. ``carried`` is None at the start of a window. ``update`` divides the summed gradients by
    ``count``, the number of supervised tokens or of pairs in the window, and updates the model. It
    returns (summed loss, gradient norm). If one of these is not finite, the model is unchanged.

    If ``loss`` also returns statistics, as for pairs of answers, they follow the loss in the sums.
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
    return CompiledByShape(accumulate, state), CompiledByShape(update, state)


def make_kl_step(
    model: nn.Module, kl_sum: Callable[..., mx.array], *, compiled: bool
) -> Callable[[tuple[mx.array, ...]], mx.array]:
    """Return ``measure(arrays)``, which calls ``kl_sum`` with the model and a batch's arrays."""

    def measure(arrays: tuple[mx.array, ...]) -> mx.array:
        return kl_sum(model, *arrays)

    return CompiledByShape(measure, [model.state, mx.random.state]) if compiled else measure


def should_compile(config: TrainConfig) -> bool:
    """Return whether to compile the step.

    auto compiles only on a GPU: on a CPU, MLX builds every kernel with the C++ compiler first.
    """
    return config.compile == "on" or (config.compile == "auto" and on_gpu())


def arrays_of(batch: Batch) -> tuple[mx.array, ...]:
    """Return a batch's arrays as the loss takes them.

    A packed batch also has segments. A batch of preferences has the log-probabilities of the
    reference, and labels if its answers are labeled.
    """
    arrays = (
        batch.tokens,
        batch.positions,
        batch.targets,
        batch.weights,
        batch.segments,
        batch.reference,
        batch.labels,
    )
    return tuple(mx.array(array) for array in arrays if array is not None)
