"""Find the fastest way to compute a run's step, by timing steps of the run's largest batch.

One choice is varied at a time: the kinds of attention, cross-entropy and gated delta rule, the
slices of the vocabulary, gradient checkpointing, and whether the step is compiled. A way is kept if
it is faster than the best one before it and fits in memory. No new way is tried after ``SECONDS``.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..config import TrainConfig
from ..data.batches import Batch, Batches, arrays_of, trimmed
from ..device import bounded_memory, gb, kept_random_state
from ..failures import is_lost, reason_text
from ..kernels.choices import SMALLEST_SLICE, StepChoices
from ..kernels.patch import grad_checkpointing, memory_efficient
from .compiled import should_compile
from .make_step import make_step
from .objectives import make_objective
from .trainer import TrainState

SECONDS = 30.0
SLICES = (SMALLEST_SLICE, 16 * 2**20, 64 * 2**20)
REPEATS = 3
# A smaller relative difference is noise.
NOISE = 0.02
# The number of batches that are searched for the largest one.
_SEARCHED = 20_000


@dataclass(frozen=True)
class StepWay:
    """One way to compute a step; the results of all ways differ only by rounding.

    Attributes:
        choices: The kernels' choices.
        grad_checkpoint: Whether blocks are checkpointed.
        compiled: Whether the step is compiled.
    """

    choices: StepChoices
    grad_checkpoint: bool
    compiled: bool

    def __str__(self) -> str:
        checkpointing = "checkpointing" if self.grad_checkpoint else "no checkpointing"
        return (
            f"{self.choices}, {self.choices.slice_bytes // 2**20} MiB slices, {checkpointing},"
            f" {'compiled' if self.compiled else 'eager'}"
        )


@dataclass(frozen=True)
class StepTiming:
    """A way, and what its step took.

    Attributes:
        way: The way.
        seconds: Time of the fastest step, or None if it failed.
        peak: Bytes at the peak, or None if it failed.
        failure: Why it failed.
    """

    way: StepWay
    seconds: float | None = None
    peak: int | None = None
    failure: str = ""

    def fits(self, budget: int) -> bool:
        """Return whether the step succeeded and needs at most ``budget`` bytes."""
        return self.peak is not None and self.peak <= budget

    def __str__(self) -> str:
        if self.seconds is None or self.peak is None:
            return f"{self.way}: failed ({self.failure})"
        return f"{self.way}: {self.seconds:.3g} s/step, {gb(self.peak)}"


@dataclass(frozen=True)
class TuningResult:
    """The best way, and all timings.

    Attributes:
        best: The timing of the best way.
        timings: All timings, in order.
        rows: Rows of the batch.
        length: Tokens of its rows.
        is_complete: Whether all ways were tried in time.
    """

    best: StepTiming
    timings: tuple[StepTiming, ...]
    rows: int
    length: int
    is_complete: bool = True


@dataclass(frozen=True)
class OpenChoices:
    """What may be varied besides the kernels' choices that every model has.

    The user left the first two open.

    Attributes:
        grad_checkpoint: The values to try; empty to keep the first one.
        compiled: The values to try; empty to keep the first one.
        delta_rule: Whether the model has a gated delta rule, so that both ways are tried.
    """

    grad_checkpoint: tuple[bool, ...] = ()
    compiled: tuple[bool, ...] = ()
    delta_rule: bool = False


def way_of(state: TrainState, config: TrainConfig) -> StepWay:
    """Return the way in which a run computes its step."""
    compiled = should_compile(config) if state.compiled is None else state.compiled
    return StepWay(state.choices, state.grad_checkpoint, compiled)


def tune_step(
    state: TrainState,
    batch: Batch,
    start: StepWay,
    freedom: OpenChoices,
    budget: int,
) -> TuningResult:
    """Time the ways to compute a step, and return the best one.

    The model, the optimizer and the random state are the same afterwards, bit-exactly.

    Args:
        state: What is trained.
        batch: The batch to time, the largest of the run.
        start: The first way.
        freedom: The choices that may be varied.
        budget: The bytes that the step may use.
    """
    with unchanged(state) as kept, bounded_memory():

        def measure(way: StepWay) -> StepTiming:
            timing = time_step(state, batch, way)
            if timing.peak is None:
                return timing
            return replace(timing, peak=timing.peak - kept + _accumulated(state))

        best, timings, is_complete = search_ways(start, freedom, measure, budget)
        mx.clear_cache()
    rows, length = batch.tokens.shape
    return TuningResult(best, tuple(timings), rows, length, is_complete)


def _accumulated(state: TrainState) -> int:
    """Return the bytes of the gradients that a run carries from batch to batch of a step."""
    if state.schedule.batches_per_step == 1:
        return 0
    return _bytes_of(state.model.trainable_parameters())


def _bytes_of(arrays: Any) -> int:
    """Return the bytes of a tree of arrays."""
    leaves: Any = tree_flatten(arrays)
    return sum(array.nbytes for _, array in leaves)


def search_ways(
    start: StepWay,
    freedom: OpenChoices,
    measure: Callable[[StepWay], StepTiming],
    budget: int,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[StepTiming, list[StepTiming], bool]:
    """Vary one choice at a time.

    Args:
        start: The first way.
        freedom: The choices that may be varied.
        measure: Times one way.
        budget: The bytes that the step may use.
        clock: Returns the time in seconds.

    Returns:
        The best timing, all timings, and whether all ways were tried in time.
    """
    began = clock()
    best = measure(start)
    timings = [best]

    # Each function returns variants of the best way so far.
    for vary in (
        lambda way: [replace(way, choices=way.choices.other_attention())],
        lambda way: [replace(way, choices=way.choices.other_cross_entropy())],
        lambda way: [replace(way, choices=rule) for rule in _other_rules(way, freedom)],
        _other_slices,
        lambda way: [replace(way, grad_checkpoint=value) for value in freedom.grad_checkpoint],
        lambda way: [replace(way, compiled=value) for value in freedom.compiled],
    ):
        for way in vary(best.way):
            if way in [timing.way for timing in timings]:
                continue
            if clock() - began > SECONDS:
                return best, timings, False

            timing = measure(way)
            timings.append(timing)
            if _is_better(timing, best, budget):
                best = timing
    return best, timings, True


def _other_rules(way: StepWay, freedom: OpenChoices) -> list[StepChoices]:
    """Return the way's choices with the other kind of delta rule, if the model has one."""
    return [way.choices.other_delta_rule()] if freedom.delta_rule else []


def _other_slices(way: StepWay) -> list[StepWay]:
    """Return the way with each size of the slices."""
    return [replace(way, choices=replace(way.choices, slice_bytes=size)) for size in SLICES]


def _is_better(timing: StepTiming, best: StepTiming, budget: int) -> bool:
    """Return whether a way is better than the best one so far: it fits, and it is faster."""
    if timing.seconds is None or timing.peak is None:
        return False
    if best.seconds is None or best.peak is None:
        return True

    # If neither fits, the smaller one is better.
    if not timing.fits(budget):
        return not best.fits(budget) and timing.peak < best.peak
    if not best.fits(budget):
        return True

    # Checkpointing computes more, so it can only seem to be faster.
    if timing.way.grad_checkpoint and not best.way.grad_checkpoint:
        return False
    return timing.seconds < (1 - NOISE) * best.seconds


def time_step(state: TrainState, batch: Batch, way: StepWay) -> StepTiming:
    """Time one way on one batch; a RuntimeError of MLX, such as a lack of memory, is recorded.

    The model and the optimizer are updated.

    Raises:
        RuntimeError: The GPU failed, so that it can't compute another way.
    """
    mx.clear_cache()
    gates = None if state.probes is None else state.probes.gated_mlps
    checkpointing = grad_checkpointing(state.model) if way.grad_checkpoint else nullcontext()
    try:
        with memory_efficient(state.model, gates, way.choices), checkpointing:
            return _time_repeatedly(state, batch, way)
    except RuntimeError as problem:
        if is_lost(problem):
            raise
        return StepTiming(way, failure=reason_text(problem)[:100])


def _time_repeatedly(state: TrainState, batch: Batch, way: StepWay) -> StepTiming:
    """Return the time of the fastest of several steps, and their peak."""
    loss = make_objective(state.trunk_and_head, state.objective, way.choices)
    accumulate, update = make_step(state.model, loss, state.optimizer, compiled=way.compiled)
    arrays = arrays_of(batch if way.compiled else trimmed(batch))
    count = mx.array(float(batch.pairs or batch.target_count))

    def step() -> float:
        started = time.perf_counter()
        total, norm = update(*accumulate(arrays, None), count)
        mx.eval(state.model.trainable_parameters(), state.optimizer.state, total, norm)
        return time.perf_counter() - started

    # The first step of a shape runs eagerly, and the second one is traced.
    step()
    if way.compiled:
        step()

    # Stop early if the steps are long.
    mx.reset_peak_memory()
    seconds = [step()]
    while len(seconds) < REPEATS and sum(seconds) < SECONDS / 30:
        seconds.append(step())
    return StepTiming(way, min(seconds), mx.get_peak_memory())


@contextmanager
def unchanged(state: TrainState) -> Generator[int]:
    """Restore the model, the optimizer and the random state after the block, bit-exactly.

    Yields:
        The bytes of the arrays that are kept to be restored, while the block trains copies.
    """
    model, optimizer = state.model, state.optimizer
    parameters = model.parameters()
    moments = optimizer.arrays()
    mx.eval(moments)
    was_training = model.training

    with kept_random_state():
        model.train()
        try:
            yield _bytes_of(model.trainable_parameters()) + _bytes_of(moments)
        finally:
            # A step that failed while it was traced leaves unusable arrays even in frozen layers.
            model.update(parameters)
            optimizer.restore(moments)
            model.train(was_training)


def largest_batch(batches: Batches, row_slice: slice) -> Batch:
    """Return the batch of the first epoch, or a process's part of it, that has the most tokens."""
    best: list[np.ndarray] = []
    most = (0, 0)
    for number in range(min(batches.per_epoch, _SEARCHED)):
        rows = batches.rows_of(number)[row_slice]
        if not rows:
            continue
        count, length, targets = batches.shape_of(rows)
        if (count * length, targets) > most:
            best, most = rows, (count * length, targets)
    return batches.collate(best)
