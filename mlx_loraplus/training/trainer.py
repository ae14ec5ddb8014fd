"""The loop: batches in, a trained adapter out, readable from top to bottom."""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..adapters.tensor_parallel import gradient_shares
from ..config import RunConfig
from ..data.batches import Batch, Batches, in_order
from ..data.tokenize import Example
from ..device import bounded_memory
from ..errors import LoRAPlusError, PeerError
from ..kernels.cross_entropy import Loss, make_loss, make_score
from ..kernels.head import Split
from ..kernels.patch import lean, recomputing
from .distributed import ALONE, Team
from .interrupts import BAD_BATCH, explained_memory, stop_requests, write_bad_batch
from .optimizer import LoRAPlus

Event = dict[str, Any]
Tree = dict[str, Any]
Sums = tuple[mx.array, Tree]  # of the loss, and its gradients
Accumulate = Callable[[tuple[mx.array, ...], Sums | None], Sums]
Update = Callable[[mx.array, Tree, mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Length:
    """How long a run is: ``updates`` windows of up to ``window`` batches, ``batches`` in all."""

    updates: int
    batches: int
    window: int


Outcome = Literal["finished", "stopped early", "interrupted", "out of time", "failed"]


@dataclass(frozen=True)
class Made:
    """An update that was made, as the next report sums it up."""

    loss: float  # of all supervised tokens, in nats
    norm: float  # of the gradients, before clipping
    supervised: int  # tokens
    useful: int  # tokens that are no padding
    padded: int  # tokens with padding
    seconds: float


@dataclass
class Progress:
    """Where a run stands, besides its arrays: with these it goes on as if it had never stopped."""

    update: int = 0
    window: list[Made] = field(default_factory=list)
    """What is to be summed up in the next report."""
    best_update: int | None = None
    best_loss: float | None = None
    stale: int = 0
    """Validations since the best."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Spent in updates, over all sessions."""

    def validated(self, loss: float) -> bool:
        """Take note of a validation, and tell whether it was the best so far."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_update, self.best_loss, self.stale = self.update, loss, 0
            return True
        self.stale += 1
        return False

    def ended(self, updates: int, config: RunConfig) -> Outcome | None:
        """Tell whether nothing is left to train, and why."""
        if self.update >= updates:
            return "finished"
        return "stopped early" if config.patience is not None and self.stale >= config.patience else None


def run_length(config: RunConfig, per_epoch: int) -> Length:
    """Turn iters or epochs into updates; the last window of whole epochs may be short, but is not dropped."""
    window = config.grad_accumulation_steps
    epochs = Fraction(config.epochs or 1).limit_denominator(10**6)  # 0.07 is 7/100, not a bit more
    batches = config.iters * window if config.iters else max(1, math.ceil(epochs * per_epoch))
    return Length(updates=-(-batches // window), batches=batches, window=window)


def train(
    model: nn.Module,
    split: Split | None,
    optimizer: LoRAPlus,
    batches: Batches,
    valid: Sequence[Example],
    length: Length,
    config: RunConfig,
    *,
    recompute: bool,
    report: Callable[[Event], None],
    save: Callable[[], None],
    progress: Progress | None = None,
    team: Team = ALONE,
) -> Outcome:
    """Train the adapters of ``model`` in place.

    Args:
        model: A model with adapters.
        split: Its trunk and head, from ``split_model``.
        optimizer: With its state made.
        batches: What to learn from.
        valid: What to validate on, before the first update, every ``steps_per_eval`` and after the last; may be empty.
        length: From ``run_length``.
        config: Cadences, compiling and when to stop.
        recompute: Checkpoint every block.
        report: Called with an event, a flat dictionary ready for JSON, at each cadence.
        save: Called between updates: at each ``steps_per_save``, at each best validation, and at the end.
        progress: Where to go on from, kept up to date in place; by default the start.
        team: The processes that train together, all of which call this; by default this one alone.

    Returns:
        Why it ended. A run that was interrupted or ran out of time has neither validated nor reported because of that,
        so that going on gives the same history as never having stopped.

    Raises:
        LoRAPlusError: Too many updates in a row were not finite, or memory ran out.
        PeerError: Another process is lost; the last whole update was saved.
    """
    progress = Progress() if progress is None else progress
    accumulate, update = make_step(model, make_loss(split), optimizer, compiled=should_compile(config))
    parts: list[Batch] = []  # this process's, of the update at work
    shapes: set[tuple[tuple[int, ...], ...]] = set()
    session = time.perf_counter()
    mx.reset_peak_memory()

    def validate() -> bool:
        if not valid:
            return False
        started = time.perf_counter()
        found = score(model, split, valid, config.data.batch_size, team)
        event = {"update": progress.update, "valid_loss": found.loss, "valid_accuracy": found.accuracy}
        report(event | {"valid_seconds": time.perf_counter() - started})
        model.train()
        return progress.update > 0 and progress.validated(found.loss)

    def skip(reason: str) -> None:
        progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, progress.skipped_in_a_row + 1
        report({"update": progress.update, "skipped": progress.skipped, "reason": reason})
        if progress.skipped_in_a_row == config.max_skipped_updates:
            progress.skipped_in_a_row = 0
            save()
            file = Path(config.adapter_path) / BAD_BATCH
            if team.leads:
                write_bad_batch(file, progress.update, reason, [batches[n] for n in window_of(progress.update, length)])
            raise LoRAPlusError(
                f"{config.max_skipped_updates} updates in a row were not finite, the last is update {progress.update} "
                f"({reason}): train anew with a lower --learning-rate or --lr-ratio; its batch is in {file}, and "
                "--resume goes on behind it"
            )

    def train_update(number: int) -> Made:
        """Make an update, or none if a process is lost on the way."""
        started = time.perf_counter()
        mx.random.seed(seed_of(config.seed, number, team.part))
        shares = [batches.rows_of(n)[team.share] for n in window_of(number, length)]
        parts[:] = [batches.collate(rows) for rows in shares if rows]  # an uneven batch leaves some without
        shapes.update((part.tokens.shape, part.targets.shape) for part in parts)
        sums = None
        for part in parts:
            team.compute(sums)
            sums = accumulate(arrays_of(part), sums)
        if sums is None:
            sums = mx.array(0.0), tree_map(mx.zeros_like, model.trainable_parameters())
        counts = np.array([[0, 0, 0], *([part.supervised, part.useful, part.tokens.size] for part in parts)]).sum(0)
        (total, gradients), counts = team.sum((sums, mx.array(counts, mx.float32)))
        if team.splits_weights:
            gradients = team.add(gradient_shares(model, gradients, team.size))
        total, norm = update(total, gradients, counts[0])
        mx.eval(model.trainable_parameters(), optimizer.state, total, norm)
        supervised, useful, padded = map(int, counts.tolist())
        loss, slope = np.array([total.item(), norm.item()]).tolist()
        return Made(loss, slope, supervised, useful, padded, time.perf_counter() - started)

    with (
        bounded_memory(),
        lean(model),
        recomputing(model) if recompute else nullcontext(),
        stop_requests() as stop_requested,
        explained_memory(parts, config, recompute=recompute),
        team.watch(config.peer_timeout),
        saved_if_lost(progress, save),
    ):
        if progress.update == 0:
            validate()
        model.train()
        ended = progress.ended(length.updates, config)
        while ended is None:
            made = train_update(progress.update + 1)
            progress.update += 1
            progress.seconds += made.seconds
            if math.isfinite(made.loss) and math.isfinite(made.norm):
                progress.skipped_in_a_row = 0
                progress.window.append(made)
            else:
                skip(f"loss {made.loss}, gradient norm {made.norm}")
            last = progress.update == length.updates
            due = progress.update % config.steps_per_report == 0 or last
            if progress.window and due:
                summary = summarize(progress.window, optimizer.rates)
                report({"update": progress.update, **summary, "shapes": len(shapes)})
                progress.window.clear()
            best = (progress.update % config.steps_per_eval == 0 or last) and validate()
            ended = progress.ended(length.updates, config)
            late = config.max_minutes is not None and time.perf_counter() - session > 60 * config.max_minutes
            trained = dict(tree_flatten(model.trainable_parameters())) if due else None
            stopped, late = team.agree([stop_requested(), late], trained)
            if ended is None and (stopped or late):
                ended = "interrupted" if stopped else "out of time"
            if best or ended or progress.update % config.steps_per_save == 0:
                save()
    model.eval()
    return ended


def window_of(update: int, length: Length) -> range:
    """Return the numbers of the batches that make an update, the first of which is 1."""
    return range((update - 1) * length.window, min(update * length.window, length.batches))


def seed_of(seed: int, update: int, part: int) -> int:
    """Return what an update's dropout is drawn from; each process that has rows of its own draws its own masks."""
    return int(np.random.SeedSequence([seed, update, part]).generate_state(1, np.uint64)[0])


@contextmanager
def saved_if_lost(progress: Progress, save: Callable[[], None]) -> Generator[None]:
    """Save the last whole update where another process is lost: an update is made only once all have taken part."""
    try:
        yield
    except PeerError:
        if progress.update:
            save()
        raise


def make_step(model: nn.Module, loss: Loss, optimizer: LoRAPlus, *, compiled: bool) -> tuple[Accumulate, Update]:
    """Return ``accumulate(arrays, carried)`` and ``update(total, gradients, tokens)``.

    The first adds a batch's summed loss and gradients to ``carried``, a pair (None at a window's start), and returns
    the pair. The second updates the model by the mean over the window's supervised tokens, an array, and returns
    (summed loss, gradient norm). If one of these is not finite, the update has changed nothing.
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
    return mx.compile(accumulate, inputs=state, outputs=state), mx.compile(update, inputs=state, outputs=state)


def should_compile(config: RunConfig) -> bool:
    """Tell whether the step is compiled; auto: only on a GPU, since on a CPU every kernel goes through g++ first."""
    return config.compile == "on" or (config.compile == "auto" and mx.default_device() == mx.gpu)


@dataclass(frozen=True)
class Score:
    """How well a model foretells: mean loss per supervised token, in nats, and the share of them it ranks first."""

    loss: float
    accuracy: float


def score(
    model: nn.Module, split: Split | None, examples: Sequence[Example], batch_size: int, team: Team = ALONE
) -> Score:
    """Score a model on all supervised tokens of ``examples``, of which each process of ``team`` takes its share."""
    model.eval()
    score_batch = make_score(split)
    total, tokens = mx.zeros(2), 0
    for batch in in_order(examples, -(-batch_size // team.shares), team.share):
        total = total + score_batch(model, *arrays_of(batch))
        team.compute(total)
        tokens += batch.supervised
    loss, right, tokens = team.sum(mx.concatenate([total, mx.array([float(tokens)])])).tolist()
    return Score(loss / tokens, right / tokens)


def arrays_of(batch: Batch) -> tuple[mx.array, ...]:
    """Return what the loss takes of a batch: tokens, positions, targets, weights, and segments where it is packed."""
    arrays = (batch.tokens, batch.positions, batch.targets, batch.weights, batch.segments)
    return tuple(mx.array(array) for array in arrays if array is not None)


def summarize(window: Sequence[Made], rates: Mapping[str, float]) -> Event:
    """Sum up the updates since the last report, and name the rates of the last: rate_a, rate_b and so on."""
    names = ("loss", "supervised", "useful", "padded", "seconds")
    loss, supervised, useful, padded, seconds = (sum(getattr(made, name) for made in window) for name in names)
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
