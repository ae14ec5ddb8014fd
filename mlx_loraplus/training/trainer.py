"""The loop: batches in, a trained adapter out, readable from top to bottom."""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..adapters.tensor_parallel import gradient_shares
from ..config import RunConfig
from ..data.batches import Batch, Batches, in_order, trimmed
from ..data.tokenize import Example
from ..device import bounded_memory
from ..errors import LoRAPlusError, PeerError
from ..kernels.cross_entropy import Loss, make_loss, make_score
from ..kernels.head import TrunkAndHead
from ..kernels.patch import grad_checkpointing, memory_efficient
from ..runs.state import BAD_BATCH, Event, Outcome, Progress, StepStats
from .compiled import CompiledByShape
from .distributed import ALONE, World
from .interrupts import explain_oom, interruptible, write_bad_batch
from .optimizer import LoRAPlus

Tree = dict[str, Any]
Sums = tuple[mx.array, Tree]  # of the loss, and its gradients
Accumulate = Callable[[tuple[mx.array, ...], Sums | None], Sums]
Update = Callable[[mx.array, Tree, mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Schedule:
    """How long a run is: ``steps`` windows of up to ``window`` batches, ``batches`` in all."""

    steps: int
    batches: int
    window: int


def schedule_of(config: RunConfig, per_epoch: int) -> Schedule:
    """Return the schedule that iters or epochs ask for.

    The last window of whole epochs may be short; it is not dropped.
    """
    window = config.grad_accumulation_steps
    epochs = Fraction(config.epochs or 1).limit_denominator(10**6)  # 0.07 is 7/100, not a bit more
    batches = config.iters * window if config.iters else max(1, math.ceil(epochs * per_epoch))
    return Schedule(steps=-(-batches // window), batches=batches, window=window)


def train(
    model: nn.Module,
    split: TrunkAndHead | None,
    optimizer: LoRAPlus,
    batches: Batches,
    valid: Sequence[Example],
    length: Schedule,
    config: RunConfig,
    *,
    grad_checkpoint: bool,
    report: Callable[[Event], None],
    save: Callable[[], None],
    progress: Progress | None = None,
    world: World = ALONE,
) -> Outcome:
    """Train the adapters of ``model`` in place.

    Args:
        model: A model with adapters.
        split: Its trunk and head, from ``split_model``.
        optimizer: With its state made.
        batches: What to learn from.
        valid: What to validate on, before the first step, every ``steps_per_eval`` and after the
            last; may be empty.
        length: From ``schedule_of``.
        config: Cadences, compiling and when to stop.
        grad_checkpoint: Whether to checkpoint every block.
        report: Called with an event, a flat dictionary ready for JSON, at each cadence.
        save: Called between steps: at each ``steps_per_save``, at each best validation, and at
            the end.
        progress: Where to go on from, kept up to date in place; by default the start.
        world: The processes that train together, all of which call this; by default this one alone.

    Returns:
        Why it ended. A run that was interrupted or ran out of time has neither validated nor
        reported because of that, so that going on gives the same history as never having stopped.

    Raises:
        LoRAPlusError: Too many steps in a row were not finite, or memory ran out.
        PeerError: Another process is lost; the last whole step was saved.
    """
    progress = Progress() if progress is None else progress
    compiled = should_compile(config)
    accumulate, update = make_step(model, make_loss(split), optimizer, compiled=compiled)
    parts: list[Batch] = []  # this process's, of the step at work
    shapes: set[tuple[tuple[int, ...], ...]] = set()
    session = time.perf_counter()
    mx.reset_peak_memory()

    def validate() -> bool:
        if not valid:
            return False
        started = time.perf_counter()
        found = score(model, split, valid, config.data.batch_size, world)
        event = {
            "step": progress.step,
            "valid_loss": found.loss,
            "valid_accuracy": found.accuracy,
        }
        report(event | {"valid_seconds": time.perf_counter() - started})
        model.train()
        return progress.step > 0 and progress.validated(found.loss)

    def skip(reason: str) -> None:
        progress.skipped, progress.skipped_in_a_row = (
            progress.skipped + 1,
            progress.skipped_in_a_row + 1,
        )
        report({"step": progress.step, "skipped": progress.skipped, "reason": reason})
        if progress.skipped_in_a_row == config.max_skipped_steps:
            progress.skipped_in_a_row = 0
            save()
            file = Path(config.adapter_path) / BAD_BATCH
            if world.is_main:
                write_bad_batch(
                    file,
                    progress.step,
                    reason,
                    [batches[n] for n in window_of(progress.step, length)],
                )
            raise LoRAPlusError(
                f"{config.max_skipped_steps} steps in a row were not finite, the last is step"
                f" {progress.step} ({reason}): train anew with a lower --learning-rate or"
                f" --lr-ratio; its batch is in {file}, and --resume goes on behind it"
            )

    def train_step(number: int) -> StepStats:
        """Make a step, or none if a process is lost on the way."""
        started = time.perf_counter()
        mx.random.seed(seed_of(config.seed, number, world.part))
        shares = [batches.rows_of(n)[world.share] for n in window_of(number, length)]
        # An uneven batch leaves some processes without rows.
        parts[:] = [batches.collate(rows) for rows in shares if rows]
        if not compiled:
            parts[:] = map(trimmed, parts)
        shapes.update((part.tokens.shape, part.targets.shape) for part in parts)
        sums = None
        for part in parts:
            world.compute(sums)
            sums = accumulate(arrays_of(part), sums)
        if sums is None:
            sums = mx.array(0.0), tree_map(mx.zeros_like, model.trainable_parameters())
        counts = np.array(
            [[0, 0, 0], *([part.supervised, part.useful, part.tokens.size] for part in parts)]
        ).sum(0)
        (total, gradients), counts = world.sum((sums, mx.array(counts, mx.float32)))
        if world.is_tensor_parallel:
            gradients = world.add(gradient_shares(model, gradients, world.size))
        total, norm = update(total, gradients, counts[0])
        mx.eval(model.trainable_parameters(), optimizer.state, total, norm)
        supervised, useful, padded = map(int, counts.tolist())
        loss, slope = np.array([total.item(), norm.item()]).tolist()
        return StepStats(loss, slope, supervised, useful, padded, time.perf_counter() - started)

    with (
        bounded_memory(),
        memory_efficient(model),
        grad_checkpointing(model) if grad_checkpoint else nullcontext(),
        interruptible() as stop_requested,
        explain_oom(parts, config, grad_checkpoint=grad_checkpoint),
        world.watch(config.distributed_timeout),
        saved_if_lost(progress, save),
    ):
        if progress.step == 0:
            validate()
        model.train()
        ended = progress.ended(length.steps, config)
        while ended is None:
            made = train_step(progress.step + 1)
            progress.step += 1
            progress.seconds += made.seconds
            if math.isfinite(made.loss) and math.isfinite(made.norm):
                progress.skipped_in_a_row = 0
                progress.window.append(made)
            else:
                skip(f"loss {made.loss}, gradient norm {made.norm}")
            last = progress.step == length.steps
            due = progress.step % config.steps_per_report == 0 or last
            if progress.window and due:
                summary = summarize(progress.window, optimizer.rates)
                report({"step": progress.step, **summary, "shapes": len(shapes)})
                progress.window.clear()
            best = (progress.step % config.steps_per_eval == 0 or last) and validate()
            ended = progress.ended(length.steps, config)
            late = (
                config.max_minutes is not None
                and time.perf_counter() - session > 60 * config.max_minutes
            )
            trained = dict(tree_flatten(model.trainable_parameters())) if due else None
            stopped, late = world.any_rank([stop_requested(), late], trained)
            if ended is None and (stopped or late):
                ended = "interrupted" if stopped else "out of time"
            if best or ended or progress.step % config.steps_per_save == 0:
                save()
    model.eval()
    return ended


def window_of(step: int, length: Schedule) -> range:
    """Return the numbers of the batches that make a step, the first of which is 1."""
    return range((step - 1) * length.window, min(step * length.window, length.batches))


def seed_of(seed: int, step: int, part: int) -> int:
    """Return the seed of a step's dropout; processes with different rows draw different masks."""
    return int(np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0])


@contextmanager
def saved_if_lost(progress: Progress, save: Callable[[], None]) -> Generator[None]:
    """Save the last complete step if another process is lost.

    A step is made only after all processes have taken part in it.
    """
    try:
        yield
    except PeerError:
        if progress.step:
            save()
        raise


def make_step(
    model: nn.Module, loss: Loss, optimizer: LoRAPlus, *, compiled: bool
) -> tuple[Accumulate, Update]:
    """Return ``accumulate(arrays, carried)`` and ``update(total, gradients, tokens)``.

    The first adds a batch's summed loss and gradients to ``carried``, a pair (None at a window's
    start), and returns the pair. The second updates the model by the mean over the window's
    supervised tokens, an array, and returns (summed loss, gradient norm). If one of these is not
    finite, the step has changed nothing.
    """
    loss_and_gradients = nn.value_and_grad(model, loss)

    def accumulate(arrays: tuple[mx.array, ...], carried: Sums | None) -> Sums:
        new = loss_and_gradients(model, *arrays)
        return new if carried is None else tree_map(mx.add, carried, new)

    def update(total: mx.array, gradients: Tree, tokens: mx.array) -> tuple[mx.array, mx.array]:
        mean = tree_map(lambda gradient: gradient / tokens, gradients)
        return total, optimizer.update(model, mean, usable=mx.isfinite(total))

    if not compiled:
        return accumulate, update
    state = [model.state, optimizer.state, mx.random.state]
    return CompiledByShape(accumulate, state), CompiledByShape(update, state)


def should_compile(config: RunConfig) -> bool:
    """Return whether to compile the step.

    auto compiles only on a GPU: on a CPU, MLX builds every kernel with the C++ compiler first.
    """
    return config.compile == "on" or (config.compile == "auto" and mx.default_device() == mx.gpu)


@dataclass(frozen=True)
class EvalResult:
    """How well a model predicts the supervised tokens.

    Attributes:
        loss: Mean per token, in nats.
        accuracy: Share of the tokens that the model ranks first.
    """

    loss: float
    accuracy: float


def score(
    model: nn.Module,
    split: TrunkAndHead | None,
    examples: Sequence[Example],
    batch_size: int,
    world: World = ALONE,
) -> EvalResult:
    """Score a model on all supervised tokens of ``examples``, shared among the processes."""
    model.eval()
    score_batch = make_score(split)
    total, tokens = mx.zeros(2), 0
    for batch in in_order(examples, -(-batch_size // world.data_shards), world.share):
        total = total + score_batch(model, *arrays_of(batch))
        world.compute(total)
        tokens += batch.supervised
    loss, right, tokens = world.sum(mx.concatenate([total, mx.array([float(tokens)])])).tolist()
    return EvalResult(loss / tokens, right / tokens)


def arrays_of(batch: Batch) -> tuple[mx.array, ...]:
    """Return a batch's arrays as the loss takes them; a packed batch also has segments."""
    arrays = (batch.tokens, batch.positions, batch.targets, batch.weights, batch.segments)
    return tuple(mx.array(array) for array in arrays if array is not None)


def summarize(window: Sequence[StepStats], rates: Mapping[str, float]) -> Event:
    """Return a report of the steps since the last one, with the rates of the last step."""
    names = ("loss", "supervised", "useful", "padded", "seconds")
    loss, supervised, useful, padded, seconds = (
        sum(getattr(made, name) for made in window) for name in names
    )
    return {
        "loss": loss / supervised,
        "grad_norm": max(made.norm for made in window),
        "supervised_tokens": supervised,
        "useful_tokens": useful,
        "padding": 1 - useful / padded,
        "seconds": seconds,
        "tokens_per_second": useful / seconds,
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "active_memory_gb": mx.get_active_memory() / 1e9,
        "cache_memory_gb": mx.get_cache_memory() / 1e9,
    } | {f"rate_{group.removeprefix('lora_')}": rate for group, rate in rates.items()}
