"""What can interrupt a run: requests to stop, a device that fails, batches that are not finite."""

import json
import math
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import TrainConfig
from ..data.batches import Batch
from ..device import gb, this_machine
from ..errors import LoRAPlusError, PeerError, counted
from ..failures import MEMORY, Failure, described_failures
from ..files import write_atomically
from ..runs.advice import last_skipped_rows, remedy_for_skipped
from ..runs.state import BAD_BATCH, Progress


@contextmanager
def interruptible() -> Generator[Callable[[], bool]]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a request that the loop reads between steps.

    An exception inside a traced step would leave the model unusable. A second signal is handled as
    it was before this context.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return

    # Signals that are ignored stay ignored, as with nohup.
    handlers: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, None):
            handlers[number] = handler

    def request(number: int, _: Any) -> None:
        requested.set()
        signal.signal(number, handlers[number])

    for number in handlers:
        signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def explain_failure(
    batches: Sequence[Batch], config: TrainConfig, *, can_checkpoint: bool
) -> AbstractContextManager[None]:
    """Turn MLX's errors about memory and the GPU into what happened and which settings help.

    MLX raises an error if it can't get a buffer, if there are more buffers than Metal allows, and
    if the GPU's work fails. Linux kills a process that runs out of memory. In all cases, the run
    can only be resumed from a checkpoint.

    Args:
        batches: The batches of the current step; the list may change inside the context.
        config: The run's settings.
        can_checkpoint: Whether gradient checkpointing is off and could be switched on.

    Raises:
        DeviceError: The device failed. Other errors are raised unchanged.
    """

    def describe(failure: Failure, reason: str) -> str:
        # Find the largest batch of the step, or of the settings if no batch was read yet.
        shapes = [batch.tokens.shape for batch in batches]
        if not shapes:
            shapes = [(config.data.batch_size, config.data.max_seq_length)]
        rows, length = max(shapes, key=math.prod)

        # Advise smaller batches and, if memory ran out, gradient checkpointing.
        happened = f"{failure.what} on a batch of {counted(rows, 'row')} x {length:,} tokens"
        smaller = _smaller_batches(config, length)
        if failure is not MEMORY:
            return (
                f"{happened} ({reason}); {failure.remedy} (then continue with --resume), or start"
                f" again with {smaller}"
            )
        checkpoint = ""
        if can_checkpoint:
            checkpoint = "set --grad-checkpoint on (then continue with --resume), or "
        return f"{happened}: {_memory_in_use()} ({reason}); {checkpoint}start again with {smaller}"

    return described_failures(describe)


def _memory_in_use() -> str:
    """Return what MLX holds, and how many buffers Metal allows."""
    limit = mx.device_info().get("resource_limit")
    buffers = f", and Metal allows {limit:,} buffers" if limit else ""
    return (
        f"MLX uses {gb(mx.get_active_memory())}, used {gb(mx.get_peak_memory())} at most, and keeps"
        f" {gb(mx.get_cache_memory())} for reuse{buffers}"
    )


def _smaller_batches(config: TrainConfig, length: int) -> str:
    """Return the settings that make a step smaller; a resumed run can't change them."""
    shorter = f"--max-seq-length below {length:,}"
    if config.data.batch_size == 1:
        return shorter
    return f"--batch-size below {config.data.batch_size} or {shorter}"


def describe_cut(process: str, history: Sequence[dict[str, Any]]) -> str:
    """Return a line about a session that ended without recording the reason."""
    peaks = [event["peak_memory_gb"] for event in history if "peak_memory_gb" in event]
    peak = max(peaks, default=0.0)
    memory = this_machine().memory / 1e9
    return (
        f"the previous session (process {process}) was cut off: killed, or out of memory (peak"
        f" {peak:.2f} GB of {memory:.0f} GB; --grad-checkpoint on uses less)"
    )


def write_bad_batches(folder: Path, step: int, reason: str, batches: Sequence[Batch]) -> None:
    """Write the batches of a step that was not finite as JSON, with the sources of their rows."""
    described = [
        {
            "rows": batch.places,
            "tokens": batch.tokens.tolist(),
            "targets": batch.targets[batch.weights > 0].tolist(),
        }
        for batch in batches
    ]
    content = {"step": step, "reason": reason, "batches": described}
    write_atomically(folder / BAD_BATCH, json.dumps(content).encode())


def too_many_skipped(
    config: TrainConfig, progress: Progress, reason: str, batches: Sequence[Batch]
) -> LoRAPlusError:
    """Return the error that ends a run whose steps are not finite.

    The batches of the last step are written. Only the main process has batches here; on other
    processes, nothing is written.
    """
    folder = Path(config.adapter_path)
    if batches:
        write_bad_batches(folder, progress.step, reason, batches)

    # A resume helps only if single batches are bad.
    advice = (
        "train again with a lower --learning-rate or --lr-ratio; if only the rows of that step are"
        f" bad, which are in {folder / BAD_BATCH}, --resume continues with the next step"
    )
    if progress.mostly_skipped:
        advice = remedy_for_skipped(progress, last_skipped_rows(folder))
    most = config.max_skipped_steps
    skipped = "a step was" if most == 1 else f"{most} steps in a row were"
    return LoRAPlusError(
        f"{skipped} not finite; the last is step {progress.step} ({reason}): {advice}"
    )


@contextmanager
def saved_if_lost(progress: Progress, save: Callable[[], None]) -> Generator[None]:
    """Save the last complete step if another process is lost.

    A step changes the model only after all processes have contributed to it, so the model is still
    that of the last complete step.
    """
    try:
        yield
    except PeerError:
        if progress.step:
            save()
        raise
