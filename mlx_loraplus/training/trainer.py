"""The training loop, from batches to a trained adapter, and the step that it repeats.

A step sums the loss and its gradients over its batches, and over the processes. It then updates the
model with their mean.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..adapters.tensor_parallel import gradient_shares
from ..config import ObjectiveConfig, TrainConfig
from ..data.batches import Batch, Batches, arrays_of, trimmed
from ..data.tokenize import Example
from ..device import bounded_memory, on_gpu
from ..kernels.choices import StepChoices, default_choices
from ..kernels.patch import grad_checkpointing, memory_efficient
from ..kernels.trunk_and_head import TrunkAndHead
from ..memory.measured import MeasuredStep
from ..models.derived_weights import start_inference
from ..runs.state import Event, Outcome, Progress, StepStats
from ..settings import fit_to_length
from .compiled import CompiledByShape, Traces, should_compile
from .distributed import ALONE, World
from .interrupts import explain_failure, saved_if_lost, too_many_skipped
from .kto import KLEstimate
from .make_step import Sums, make_step
from .model_probes import ModelProbes
from .objectives import make_objective, summed_stats
from .optimizer import LoRAPlus
from .schedule import Schedule, batches_of_step, seed_of
from .step_report import summarize
from .validation import validate

# The places of two counts in the sizes of a step; see ``TrainLoop.sum_batches``
SUPERVISED, PAIRS = 0, 3

# On a GPU, the newest checkpoint lacks at most this much and one step, because macOS may end the
# program.
SAVE_SECONDS = 600.0


@dataclass(frozen=True)
class TrainState:
    """What the training loop works on. The loop updates the model, optimizer and progress in place.

    Random numbers need no state: every step seeds them from the run's seed and the step's number.

    Attributes:
        model: The model with its adapters.
        trunk_and_head: The model's trunk and head, or None.
        optimizer: The optimizer with its state.
        batches: The training batches.
        schedule: The number of steps and batches.
        progress: How far the run has come.
        grad_checkpoint: Whether blocks are checkpointed.
        probes: The verdicts about the model; None to test the model when needed.
        choices: How a step is computed; by default, what suits the device best.
        compiled: Whether the step is compiled; None for what the config says.
        measured: What a step of the run's largest batch took, or None if not measured.
        objective: What is minimized.
        self_check: What the check of this machine found; empty without a check.
        rate_search: The search for the learning rate, for the history; None without one.
    """

    model: nn.Module
    trunk_and_head: TrunkAndHead | None
    optimizer: LoRAPlus
    batches: Batches
    schedule: Schedule
    progress: Progress = field(default_factory=Progress)
    grad_checkpoint: bool = False
    probes: ModelProbes | None = None
    choices: StepChoices = field(default_factory=default_choices)
    compiled: bool | None = None
    measured: MeasuredStep | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    self_check: str = ""
    rate_search: Event | None = None

    @property
    def can_checkpoint(self) -> bool:
        """Whether gradient checkpointing is off but could be switched on.

        A trial of a sweep has no probes, and a sweep has no such setting.
        """
        is_possible = self.probes is not None and self.probes.checkpoint_sound is not False
        return is_possible and not self.grad_checkpoint


def train(
    state: TrainState,
    valid: Sequence[Example],
    config: TrainConfig,
    *,
    report: Callable[[Event], None],
    save: Callable[[], None],
    world: World = ALONE,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train the adapters of a model in place.

    Args:
        state: What to train, and where to resume.
        valid: Scored at the start, every ``steps_per_eval`` steps and at the end. May be empty.
        config: How often to report, validate and save, whether to compile, and when to stop.
        report: Called with each event, a flat dictionary ready for JSON.
        save: Called between steps, and before or during validation: at each ``steps_per_save``, at
            each best validation, at the end, and on a GPU at least every ``SAVE_SECONDS``.
        world: The processes that train together; each calls this function.
        stop_requested: Returns whether to stop after the step; from ``interruptible``.

    Returns:
        Why the run ended. An interruption or the time limit causes no extra validation or report,
        so that a resumed run gets the same history as an uninterrupted one.

    Raises:
        LoRAPlusError: Too many steps in a row were not finite.
        DeviceError: Memory ran out, or the GPU failed. The model's arrays may be unusable.
        PeerError: Another process is lost; the last complete step was saved.
    """
    config = fit_to_length(config, state.schedule.steps)
    loop = TrainLoop(state, valid, config, report, save, world)
    gated_mlps = None if state.probes is None else state.probes.gated_mlps
    checkpointing = grad_checkpointing(state.model) if state.grad_checkpoint else nullcontext()
    with (
        bounded_memory(),
        memory_efficient(state.model, gated_mlps, state.choices),
        checkpointing,
        explain_failure(loop.step_batches, config, can_checkpoint=state.can_checkpoint),
        world.watch(config.distributed_timeout),
        saved_if_lost(state.progress, save),
    ):
        outcome = loop.run(stop_requested)
    start_inference(state.model)
    return outcome


class TrainLoop:
    """One session of training; the arguments are those of ``train``.

    Attributes:
        step_batches: This process's batches of the step that is being made, for an error message.
        traces: The compiled functions of the session.
    """

    def __init__(
        self,
        state: TrainState,
        valid: Sequence[Example],
        config: TrainConfig,
        report: Callable[[Event], None],
        save: Callable[[], None],
        world: World,
    ):
        self.state = state
        self.progress = state.progress
        self.valid, self.config, self.world = valid, config, world
        self.report, self.save = report, save
        self.step_batches: list[Batch] = []
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()
        self._saved, self._saved_step = time.perf_counter(), self.progress.step
        self._validation_seconds = 0.0  # of the last validation, with its answers
        # Padding makes shapes repeat, for compiled steps. Other steps remove it by ``trimmed``.
        self._compiled = should_compile(config) if state.compiled is None else state.compiled
        loss = make_objective(state.trunk_and_head, state.objective, state.choices)
        self.traces = Traces()
        self._accumulate, self._update = make_step(
            state.model, loss, state.optimizer, compiled=self._compiled, traces=self.traces
        )
        self.estimate_kl = KLEstimate(
            state.model,
            state.trunk_and_head,
            state.choices,
            state.objective,
            self.traces if self._compiled else None,
        )

    def run(self, stop_requested: Callable[[], bool]) -> Outcome:
        """Make steps until the run ends, and return why it ended."""
        started = time.perf_counter()
        mx.reset_peak_memory()
        progress, config, steps = self.progress, self.config, self.state.schedule.steps
        if progress.step == 0:
            self.validate()
        elif progress.owes_validation:
            self.validate()
            self.save_now()
        self.count_earlier_steps()
        self.state.model.train()

        ended = progress.ended(steps, config)
        while ended is None:
            # One step, which counts even if it was skipped.
            stats = self.step(progress.step + 1)
            progress.step += 1
            progress.seconds += stats.seconds
            if math.isfinite(stats.loss) and math.isfinite(stats.norm):
                progress.skipped_in_a_row = 0
                progress.window.append(stats)
            else:
                self.skip(f"loss {stats.loss}, gradient norm {stats.norm}")

            # Report and validate if due. The first step is reported, to show mistakes early.
            is_last = progress.step == steps
            reported = progress.step % (config.steps_per_report or 1) == 0
            report_due = reported or is_last or progress.step == 1
            if report_due and progress.window:
                self.report_steps()
            is_best = self.validation_due() and self.validate()

            # Decide whether to continue; all processes decide together.
            ended = progress.ended(steps, config)
            stopped, late, save_due = self._agree(stop_requested(), started, compare=report_due)
            if ended is None and (stopped or late):
                ended = "interrupted" if stopped else "out of time"
            if is_best or ended or save_due or progress.step % config.steps_per_save == 0:
                self.save_now()
        return ended

    def step(self, number: int) -> StepStats:
        """Make a step; if a process is lost during the step, the model is not updated."""
        started = time.perf_counter()
        state = self.state
        mx.random.seed(seed_of(self.config.seed, number, self.world.shard_index))
        self.read_batches(number)
        total, gradients, sizes = self.sum_batches()

        # Update with the mean over all supervised tokens, or over all pairs or labeled answers;
        # ``total`` stays the sum.
        count = sizes[PAIRS if state.objective.has_preferences else SUPERVISED]
        total, norm = self._update(total, gradients, count)
        del gradients  # so that their memory is reused while the update is computed
        mx.eval(state.model.trainable_parameters(), state.optimizer.state, total, norm)

        supervised, useful, padded, pairs = map(int, np.array(sizes))
        loss, *pair_sums = np.array(total).reshape(-1).tolist()
        return StepStats(
            loss=loss,
            norm=float(np.array(norm)),
            supervised=supervised,
            useful=useful,
            padded=padded,
            seconds=time.perf_counter() - started,
            pairs=pairs,
            pair_sums=tuple(pair_sums),
        )

    def read_batches(self, number: int) -> None:
        """Read this process's rows of the batches of a step."""
        numbers = batches_of_step(number, self.state.schedule)
        parts = [self.state.batches.rows_of(n)[self.world.row_slice] for n in numbers]

        # An uneven batch leaves some processes without rows. The list is changed in place, because
        # ``explain_failure`` reads it.
        self.step_batches[:] = [self.state.batches.collate(rows) for rows in parts if rows]
        if not self._compiled:
            self.step_batches[:] = map(trimmed, self.step_batches)
        self._shapes.update((each.tokens.shape, each.targets.shape) for each in self.step_batches)

    def sum_batches(self) -> tuple[mx.array, dict[str, Any], mx.array]:
        """Return the loss, its gradients and the batches' sizes, summed over all processes.

        The sizes count supervised tokens, useful tokens, tokens with padding, and pairs or answers.
        """
        state, world = self.state, self.world

        # Sum over the batches of this process, which may have none.
        baseline = self.estimate_kl(self.step_batches, world)  # only for kto; else ()
        sums: Sums | None = None
        for batch in self.step_batches:
            # Evaluate the previous batch first: the graphs of two batches would need more memory.
            world.compute(sums)
            sums = self._accumulate((*arrays_of(batch), *baseline), sums)
        sizes = np.zeros(4)
        for batch in self.step_batches:
            sizes += (batch.target_count, batch.token_count, batch.tokens.size, batch.pairs)

        # Sum over the processes.
        (total, gradients), summed_sizes = world.sum_shards(
            (sums or self.no_sums(), mx.array(sizes, mx.float32))
        )
        if world.is_tensor_parallel:
            gradients = world.sum_all(gradient_shares(state.model, gradients, world.size))
        return total, gradients, summed_sizes

    def no_sums(self) -> Sums:
        """Return the loss and the gradients of no batch: zeros."""
        gradients = tree_map(mx.zeros_like, self.state.model.trainable_parameters())
        stats = len(summed_stats(self.state.objective))
        return mx.zeros(1 + stats) if stats else mx.array(0.0), gradients

    def count_earlier_steps(self) -> None:
        """Count the steps of earlier sessions; see ``CompiledByShape.count_call``."""
        accumulate, update = self._accumulate, self._update
        if not isinstance(accumulate, CompiledByShape) or not isinstance(update, CompiledByShape):
            return

        for number in range(1, self.progress.step + 1):
            self.read_batches(number)
            baseline = self.estimate_kl.count_step(self.step_batches)
            for place, batch in enumerate(self.step_batches):
                carried = self.no_sums() if place else None
                accumulate.count_call((*arrays_of(batch), *baseline), carried)
            update.count_call(*self.no_sums(), mx.array(0.0))

    def validation_due(self) -> bool:
        """Return whether to validate after the last step that was made."""
        step = self.progress.step
        return step % (self.config.steps_per_eval or 1) == 0 or step == self.state.schedule.steps

    def validate(self) -> bool:
        """Validate, and return whether this is the best validation after a step."""
        if not self.valid:
            return False
        # If the checkpoint would become too old in the meantime, save the step before it is
        # validated. A run that is resumed from there begins with the validation.
        self.progress.owes_validation = True
        if self.save_due(self._validation_seconds):
            self.save_now()

        started = time.perf_counter()
        state, batch_size = self.state, self.config.data.batch_size
        loss, scores = validate(
            state.model,
            state.trunk_and_head,
            self.valid,
            batch_size,
            state.objective,
            self.world,
            state.choices,
        )
        seconds = time.perf_counter() - started

        # The report may generate answers, which takes long.
        if self.save_due():
            self.save_now()
        self.report({"step": self.progress.step, **scores, "valid_seconds": seconds})
        self._validation_seconds = time.perf_counter() - started
        self.progress.owes_validation = False

        # Return to training mode only now: a report may generate answers, in evaluation mode.
        state.model.train()
        return self.progress.step > 0 and self.progress.validated(loss)

    def report_steps(self) -> None:
        """Report the steps since the last report."""
        optimizer, objective = self.state.optimizer, self.state.objective
        summary = summarize(self.progress.window, optimizer.rates, objective)
        self.report({"step": self.progress.step, **summary, "shapes": len(self._shapes)})
        self.progress.window.clear()

    def skip(self, reason: str) -> None:
        """Report a step that was not finite, and stop after too many in a row.

        Raises:
            LoRAPlusError: Too many steps in a row were skipped.
        """
        progress, most = self.progress, self.config.max_skipped_steps
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self.report({"step": progress.step, "skipped": progress.skipped, "reason": reason})
        # A run that is resumed after this error may skip as many again.
        if progress.skipped_in_a_row % most:
            return

        # A resume continues with the validation, if it is due, or with the next step.
        progress.owes_validation = bool(self.valid) and self.validation_due()
        self.save()
        numbers = batches_of_step(progress.step, self.state.schedule)
        batches = [self.state.batches[n] for n in numbers] if self.world.is_main else []
        raise too_many_skipped(self.config, progress, reason, batches)

    def save_now(self) -> None:
        """Save the last step."""
        self.save()
        self._saved, self._saved_step = time.perf_counter(), self.progress.step

    def save_due(self, seconds: float = 0.0) -> bool:
        """Return whether the checkpoint lacks a step, and will be too old in ``seconds``."""
        age = time.perf_counter() - self._saved + seconds
        return on_gpu() and self.progress.step > self._saved_step and age >= SAVE_SECONDS

    def _agree(self, stopped: bool, started: float, *, compare: bool) -> list[bool]:
        """Return whether any process was asked to stop, is out of time, or has to save.

        With ``compare``, the processes also check that their trained parameters are equal.
        """
        minutes = self.config.max_minutes
        late = minutes is not None and time.perf_counter() - started > 60 * minutes
        trained = dict(tree_flatten(self.state.model.trainable_parameters())) if compare else None
        return self.world.any_rank([stopped, late, self.save_due()], trained)
