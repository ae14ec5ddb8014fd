"""The loop: batches in, a trained adapter out, readable from top to bottom."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..config import RunConfig
from ..data.batches import Batch, Batches, in_order
from ..data.templates import Example
from ..errors import LoRAPlusError
from .lean import lean
from .loss import Loss, make_loss
from .optimizer import LoRAPlus
from .recompute import recomputing
from .split import Split
from .unified_memory import bounded_memory

Event = dict[str, Any]


@dataclass(frozen=True)
class Length:
    """How long a run is: ``updates`` windows of up to ``window`` batches, ``batches`` in all."""

    updates: int
    batches: int
    window: int


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
) -> bool:
    """Train the adapters of ``model`` in place.

    Args:
        model: A model with adapters.
        split: Its trunk and head, from ``split_model``.
        optimizer: With its state made.
        batches: What to learn from.
        valid: What to validate on, before the first update, every ``steps_per_eval`` and after the last; may be empty.
        length: From ``run_length``.
        config: Cadences and compiling.
        recompute: Checkpoint every block.
        report: Called with an event, a flat dictionary ready for JSON, at each cadence.
        save: Called at each ``steps_per_save`` and at the end.

    Returns:
        False if the run was interrupted: what it had then is saved all the same.

    Raises:
        LoRAPlusError: The loss is not finite; the last save is kept.
    """
    step = make_step(model, make_loss(split), optimizer, compiled=should_compile(config))
    window: list[Event] = []
    update, shapes = 0, set()
    mx.reset_peak_memory()

    def validate() -> None:
        if valid:
            started = time.perf_counter()
            value = mean_loss(model, split, valid, config.data.batch_size)
            report({"update": update, "valid_loss": value, "seconds": time.perf_counter() - started})

    checkpointing = recomputing(model) if recompute else nullcontext()
    with bounded_memory(), lean(model), checkpointing, stop_requests() as stop_requested:
        validate()
        model.train()
        for update in range(1, length.updates + 1):
            started = time.perf_counter()
            first = (update - 1) * length.window
            parts = [batches[n] for n in range(first, min(first + length.window, length.batches))]
            tokens = sum(part.supervised for part in parts)
            total, gradients = mx.array(0.0), None
            for part in parts[:-1]:
                value, gradients = step(arrays_of(part), gradients, None)
                total = total + value
                mx.eval(total, gradients)
            value, norm = step(arrays_of(parts[-1]), gradients, mx.array(float(tokens)))
            total = total + value
            mx.eval(model.trainable_parameters(), optimizer.state, total, norm)
            if not math.isfinite(total.item()) or not math.isfinite(norm.item()):
                raise LoRAPlusError(
                    f"the loss is not finite at update {update}: lower --learning-rate or --lr-ratio; "
                    f"{config.adapter_path} keeps what was saved before"
                )
            shapes |= {(part.tokens.shape, part.targets.shape) for part in parts}
            window.append(
                {
                    "loss": total.item(),
                    "supervised": tokens,
                    "useful": sum(part.useful for part in parts),
                    "padded": sum(part.tokens.size for part in parts),
                    "norm": norm.item(),
                    "seconds": time.perf_counter() - started,
                }
            )
            last = update == length.updates or stop_requested()
            if update % config.steps_per_report == 0 or last:
                report({"update": update, **summarize(window), **rates_of(optimizer), "shapes": len(shapes)})
                window.clear()
            if update % config.steps_per_eval == 0 or last:
                validate()
                model.train()
            if update % config.steps_per_save == 0 or last:
                save()
            if last:
                break
    model.eval()
    return update == length.updates


def make_step(model: nn.Module, loss: Loss, optimizer: LoRAPlus, *, compiled: bool) -> Callable[..., tuple]:
    """Return ``step(arrays, gradients, tokens)``.

    It adds a batch's gradients to ``gradients`` (None at a window's start). With ``tokens`` None it returns (summed
    loss, gradients); with the window's supervised tokens, an array, it updates the model by the mean over these tokens
    and returns (summed loss, gradient norm).
    """
    loss_and_gradients = nn.value_and_grad(model, loss)

    def step(arrays: tuple[mx.array, ...], gradients: dict | None, tokens: mx.array | None) -> tuple:
        value, new = loss_and_gradients(model, *arrays)
        gradients = new if gradients is None else tree_map(mx.add, gradients, new)
        if tokens is None:
            return value, gradients
        return value, optimizer.update(model, tree_map(lambda gradient: gradient / tokens, gradients))

    if not compiled:
        return step
    state = [model.state, optimizer.state, mx.random.state]
    return mx.compile(step, inputs=state, outputs=state)


def should_compile(config: RunConfig) -> bool:
    """Tell whether the step is compiled; auto: only on a GPU, since on a CPU every kernel goes through g++ first."""
    return config.compile == "on" or (config.compile == "auto" and mx.default_device() == mx.gpu)


def mean_loss(model: nn.Module, split: Split | None, examples: Sequence[Example], batch_size: int) -> float:
    """Return the mean loss per supervised token over all of ``examples``, in nats."""
    model.eval()
    loss = make_loss(split, learning=False)
    total, tokens = mx.array(0.0), 0
    for batch in in_order(examples, batch_size):
        total = total + loss(model, *arrays_of(batch))
        mx.eval(total)
        tokens += batch.supervised
    value: Any = total.item()
    return value / tokens


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
    }


def rates_of(optimizer: LoRAPlus) -> Event:
    """Return the rates of the last update as ``rate_lora_a``, ``rate_lora_b`` and so on."""
    return {f"rate_{group.removeprefix('lora_')}": rate for group, rate in optimizer.rates.items()}


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a request that the loop reads between updates; a second one acts at once.

    An exception inside a traced step would leave the model broken.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _: Any) -> None:
        requested.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
