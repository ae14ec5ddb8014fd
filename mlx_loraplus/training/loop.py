"""The loop: batches in, a trained adapter out, readable from top to bottom."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..config import RunConfig
from ..data.batches import Batch, Batches, in_order
from ..data.templates import Example
from ..errors import LoRAPlusError
from ..machine import bounded_memory
from .faults import explained_memory, stop_requests, write_bad_batch
from .lean import lean
from .loss import Loss, make_loss, make_score
from .optimizer import LoRAPlus
from .recompute import recomputing
from .split import Split

Event = dict[str, Any]


@dataclass(frozen=True)
class Length:
    """How long a run is: ``updates`` windows of up to ``window`` batches, ``batches`` in all."""

    updates: int
    batches: int
    window: int


Outcome = Literal["finished", "stopped early", "interrupted", "out of time"]


@dataclass
class Progress:
    """Where a run stands, besides its arrays: with these it goes on as if it had never stopped."""

    update: int = 0
    window: list[dict[str, float]] = field(default_factory=list)
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
    batches = config.iters * window if config.iters else max(1, math.ceil((config.epochs or 1) * per_epoch))
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

    Returns:
        Why it ended. A run that was interrupted or ran out of time has neither validated nor reported because of that,
        so that going on gives the same history as never having stopped.

    Raises:
        LoRAPlusError: Too many updates in a row were not finite, or memory ran out.
    """
    progress = Progress() if progress is None else progress
    step = make_step(model, make_loss(split), optimizer, compiled=should_compile(config))
    parts: list[Batch] = []  # of the update at work
    shapes: set[tuple[Any, ...]] = set()
    session = time.perf_counter()
    mx.reset_peak_memory()

    def validate() -> bool:
        if not valid:
            return False
        started = time.perf_counter()
        found = score(model, split, valid, config.data.batch_size)
        model.train()
        event = {"update": progress.update, "valid_loss": found.loss, "valid_accuracy": found.accuracy}
        report(event | {"valid_seconds": time.perf_counter() - started})
        return progress.update > 0 and progress.validated(found.loss)

    def skip(reason: str) -> None:
        progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, progress.skipped_in_a_row + 1
        report({"update": progress.update, "skipped": progress.skipped, "reason": reason})
        if progress.skipped_in_a_row == config.max_skipped_updates:
            progress.skipped_in_a_row = 0
            save()
            file = write_bad_batch(Path(config.adapter_path), progress.update, reason, parts)
            raise LoRAPlusError(
                f"{config.max_skipped_updates} updates in a row were not finite, the last is update {progress.update} "
                f"({reason}): train anew with a lower --learning-rate or --lr-ratio; its batch is in {file}, and "
                "--resume goes on behind it"
            )

    with (
        bounded_memory(),
        lean(model),
        recomputing(model) if recompute else nullcontext(),
        stop_requests() as stop_requested,
        explained_memory(parts, config, recompute=recompute),
    ):
        if progress.update == 0:
            validate()
        model.train()
        ended = progress.ended(length.updates, config)
        while ended is None:
            started = time.perf_counter()
            progress.update += 1
            first = (progress.update - 1) * length.window
            parts[:] = [batches[n] for n in range(first, min(first + length.window, length.batches))]
            tokens = sum(part.supervised for part in parts)
            carried = None
            for part in parts[:-1]:
                carried = step(arrays_of(part), carried, None)
                mx.eval(carried)
            total, norm = step(arrays_of(parts[-1]), carried, mx.array(float(tokens)))
            mx.eval(model.trainable_parameters(), optimizer.state, total, norm)
            shapes |= {(part.tokens.shape, part.targets.shape) for part in parts}
            seconds = time.perf_counter() - started
            progress.seconds += seconds
            if math.isfinite(total.item()) and math.isfinite(norm.item()):
                progress.skipped_in_a_row = 0
                progress.window.append(
                    {
                        "loss": total.item(),
                        "supervised": tokens,
                        "useful": sum(part.useful for part in parts),
                        "padded": sum(part.tokens.size for part in parts),
                        "norm": norm.item(),
                        "seconds": seconds,
                    }
                )
            else:
                skip(f"loss {total.item()}, gradient norm {norm.item()}")
            last = progress.update == length.updates
            if progress.window and (progress.update % config.steps_per_report == 0 or last):
                summary = {**summarize(progress.window), **rates_of(optimizer), "shapes": len(shapes)}
                report({"update": progress.update, **summary})
                progress.window.clear()
            best = (progress.update % config.steps_per_eval == 0 or last) and validate()
            ended = progress.ended(length.updates, config)
            if ended is None and stop_requested():
                ended = "interrupted"
            elif ended is None and config.max_minutes and time.perf_counter() - session > 60 * config.max_minutes:
                ended = "out of time"
            if best or ended or progress.update % config.steps_per_save == 0:
                save()
    model.eval()
    return ended


def make_step(model: nn.Module, loss: Loss, optimizer: LoRAPlus, *, compiled: bool) -> Callable[..., tuple[Any, ...]]:
    """Return ``step(arrays, carried, tokens)``.

    It adds a batch's summed loss and gradients to ``carried`` (None at a window's start). With ``tokens`` None it
    returns both; with the window's supervised tokens, an array, it updates the model by the mean over these tokens and
    returns (summed loss, gradient norm). If one of these is not finite, the update has changed nothing.
    """
    loss_and_gradients = nn.value_and_grad(model, loss)

    def step(arrays: tuple[mx.array, ...], carried: tuple[Any, ...] | None, tokens: mx.array | None) -> tuple[Any, ...]:
        new = loss_and_gradients(model, *arrays)
        total, gradients = new if carried is None else tree_map(mx.add, carried, new)
        if tokens is None:
            return total, gradients
        mean = tree_map(lambda gradient: gradient / tokens, gradients)
        return total, optimizer.update(model, mean, usable=mx.isfinite(total))

    if not compiled:
        return step
    state = [model.state, optimizer.state, mx.random.state]
    return mx.compile(step, inputs=state, outputs=state)


def should_compile(config: RunConfig) -> bool:
    """Tell whether the step is compiled; auto: only on a GPU, since on a CPU every kernel goes through g++ first."""
    return config.compile == "on" or (config.compile == "auto" and mx.default_device() == mx.gpu)


@dataclass(frozen=True)
class Score:
    """How well a model foretells: mean loss per supervised token, in nats, and the share of them it ranks first."""

    loss: float
    accuracy: float


def score(model: nn.Module, split: Split | None, examples: Sequence[Example], batch_size: int) -> Score:
    """Score a model on all supervised tokens of ``examples``."""
    model.eval()
    score_batch = make_score(split)
    total, tokens = mx.zeros(2), 0
    for batch in in_order(examples, batch_size):
        total = total + score_batch(model, *arrays_of(batch))
        mx.eval(total)
        tokens += batch.supervised
    loss, right = np.array(total).tolist()
    return Score(loss / tokens, right / tokens)


def arrays_of(batch: Batch) -> tuple[mx.array, ...]:
    """Return what the loss takes of a batch: tokens, positions, targets, weights, and segments where it is packed."""
    arrays = (batch.tokens, batch.positions, batch.targets, batch.weights, batch.segments)
    return tuple(mx.array(array) for array in arrays if array is not None)


def summarize(window: Sequence[Event]) -> Event:
    """Sum up the updates since the last report."""
    sums = {name: sum(item[name] for item in window) for name in ("loss", "supervised", "useful", "padded", "seconds")}
    return {
        "loss": sums["loss"] / sums["supervised"],
        "grad_norm": max(item["norm"] for item in window),
        "supervised_tokens": sums["supervised"],
        "useful_tokens": sums["useful"],
        "padding": 1 - sums["useful"] / sums["padded"],
        "seconds": sums["seconds"],
        "tokens_per_second": sums["useful"] / sums["seconds"],
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "active_memory_gb": mx.get_active_memory() / 1e9,
        "cache_memory_gb": mx.get_cache_memory() / 1e9,
    }


def rates_of(optimizer: LoRAPlus) -> Event:
    """Return the rates of the last update as ``rate_lora_a``, ``rate_lora_b`` and so on."""
    return {f"rate_{group.removeprefix('lora_')}": rate for group, rate in optimizer.rates.items()}
