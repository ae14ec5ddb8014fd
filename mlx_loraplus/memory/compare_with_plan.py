"""Compare the memory of a run's first steps with its plan."""

from collections.abc import Callable, Iterable, Sequence

import mlx.nn as nn

from ..config import TrainConfig
from ..device import gb
from ..errors import ModelError
from .plan import memory_plan_of


def compare_with_plan(
    config: TrainConfig,
    model: nn.Module,
    shapes: Iterable[tuple[int, int]],
    peaks: Sequence[float],
    log: Callable[[str], None],
    *,
    checkpoint: bool,
) -> None:
    """Report if the measured peak differs by more than 15% from the plan for the same batches.

    Args:
        config: The run's settings.
        model: The model with its adapters.
        shapes: The (rows, length) of the batches so far.
        peaks: Peaks in bytes: those of validations first, then that of the steps.
        log: Called with the line to report.
        checkpoint: Whether blocks are checkpointed.
    """
    try:
        plan = memory_plan_of(config, model)
    except ModelError:
        return

    # If validation set the peak, the peak of the steps is unknown.
    if peaks[-1] <= max(peaks[:-1], default=0):
        return

    predicted = max(plan.memory(*shape, checkpoint=checkpoint).arrays for shape in shapes)
    if not 1 / 1.15 <= predicted / peaks[-1] <= 1.15:
        log(
            f"plan: the first steps took {gb(peaks[-1])}, but {gb(predicted)} was predicted; expect"
            " the same error for the largest batch"
        )
