"""One command becomes several processes on this machine, started as ``mlx.launch -n N --backend ring`` starts them.

Unlike under ``mlx.launch``, the first of them has the terminal itself, so its picture moves, and Ctrl-C goes to all.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack

from .errors import ConfigError, LoRAPlusError, join_problems

GRACE = 15.0  # seconds in which the others end by themselves once one has failed


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run the train command as ``count`` processes that find each other, and wait for them.

    Ctrl-C, SIGTERM and a closed terminal are passed on to all.

    Returns:
        0 if all ended well, else an exit code of one that failed.

    Raises:
        ConfigError: ``count`` is below 1.
        LoRAPlusError: One was killed.
    """
    if count < 1:
        raise ConfigError(f"--launch takes a number of processes, 1 or more, not {count}")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hosts:
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(count)], hosts)
        hosts.flush()
        processes = [
            subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "mlx_loraplus.train", *arguments],
                env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": hosts.name},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C comes once, from here: a second one acts at once
            )
            for rank in range(count)
        ]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: send(processes, signal.Signals(number)))
        try:
            return wait(processes)
        finally:
            send(processes, signal.SIGKILL)


def wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; end those that hang once one has failed, the first, which writes, only by asking it to stop."""
    failed = asked = None
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if failed is None and any(process.returncode for process in processes):
            failed = time.monotonic()
        if failed is None or time.monotonic() - failed < GRACE:
            continue
        if asked is None:
            asked = time.monotonic()
            send(processes, signal.SIGTERM)
        elif processes[0].returncode is not None and time.monotonic() - asked > GRACE:
            send(processes, signal.SIGKILL)
    if killed := {rank: process.returncode for rank, process in enumerate(processes) if process.returncode < 0}:
        ends = join_problems([f"rank {rank} by {signal.Signals(-code).name}" for rank, code in killed.items()])
        raise LoRAPlusError(f"not all of the {len(processes)} processes ended by themselves: {ends}")
    return max(process.returncode for process in processes)


def send(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    """Send a signal to those that have not ended."""
    for process in processes:
        process.send_signal(number)


def free_ports(count: int) -> list[int]:
    """Return so many ports that nobody listens on."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
