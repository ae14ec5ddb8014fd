"""What happens to a run: requests to stop, memory that runs out, batches that are not finite."""

import json
import math
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import RunConfig
from ..data.batches import Batch
from ..device import gb, this_machine
from ..errors import LoRAPlusError
from ..files import write_atomically


@contextmanager
def interruptible() -> Generator[Callable[[], bool]]:
    """Turn Ctrl-C, SIGTERM and a closed terminal into a request that the loop reads between steps.

    A second one acts as it did before. An exception inside a traced step would leave the model
    broken.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    before = {
        number: handler
        for number, handler in before.items()
        if handler not in (signal.SIG_IGN, None)
    }  # nohup

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


@contextmanager
def explain_oom(
    parts: Sequence[Batch], config: RunConfig, *, grad_checkpoint: bool
) -> Generator[None]:
    """Turn MLX's failed allocations into what to lower, with numbers.

    Metal ends the process where a command buffer runs out of memory, and Linux kills it: then only
    the checkpoints help. What MLX tells is a buffer that can't be had, or more of them than Metal's
    resource limit. ``parts`` are the batches at work, and may change; with ``grad_checkpoint``
    blocks are checkpointed already.

    Raises:
        LoRAPlusError: For such a failure; other errors pass.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not any(
            sign in told
            for sign in ("llocate", "Resource limit", "Insufficient Memory", "out of memory")
        ):
            raise
        shapes = [part.tokens.shape for part in parts] or [
            (config.data.batch_size, config.data.max_seq_length)
        ]
        rows, length = max(shapes, key=math.prod)
        limit = mx.device_info().get("resource_limit")
        lower = [] if grad_checkpoint else ["--grad-checkpoint on (with --resume the run goes on)"]
        lower += (
            [f"--batch-size below {config.data.batch_size}"] if config.data.batch_size > 1 else []
        )
        lower += [f"--max-seq-length below {length:,}"]
        raise LoRAPlusError(
            f"memory ran out on a batch of {rows} rows x {length:,} tokens: MLX holds"
            f" {gb(mx.get_active_memory())}, had {gb(mx.get_peak_memory())} at most, keeps"
            f" {gb(mx.get_cache_memory())} for"
            f" reuse{f', and Metal allows {limit:,} buffers' if limit else ''}"
            f" ({told or 'MemoryError'}); set {', or '.join(lower)}"
        ) from error


def describe_cut(process: str, history: Sequence[dict[str, Any]]) -> str:
    """Say what is known of a session that ended without a word."""
    peak = max(
        (event["peak_memory_gb"] for event in history if "peak_memory_gb" in event), default=0.0
    )
    return (
        f"the session before (process {process}) was cut off: killed, or out of memory (peak"
        f" {peak:.2f} GB of {this_machine().memory / 1e9:.0f} GB; --grad-checkpoint on takes less)"
    )


def write_bad_batch(path: Path, step: int, reason: str, batches: Sequence[Batch]) -> None:
    """Write the batches of a step that was not finite, with the places of their rows, as JSON."""
    told = [
        {
            "rows": batch.sources,
            "tokens": batch.tokens.tolist(),
            "targets": batch.targets[batch.weights > 0].tolist(),
        }
        for batch in batches
    ]
    write_atomically(path, json.dumps({"step": step, "reason": reason, "batches": told}).encode())
