"""``--launch N``: one command starts N processes on this machine.

The processes are started like those of ``mlx.launch -n N --backend ring``, with two differences:
the first process owns the terminal, so its live display works, and Ctrl-C reaches all processes.
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

GRACE = 15.0  # seconds for the other processes to end after one has failed
_POLL = 0.1  # seconds
Process = subprocess.Popen[bytes]


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run the train command as ``count`` connected processes, and wait for all of them.

    Ctrl-C, SIGTERM and SIGHUP (the terminal was closed) are passed on to every process.

    Returns:
        0 if all processes succeeded, else the largest of their exit codes.

    Raises:
        ConfigError: ``count`` is below 1.
        LoRAPlusError: A process was killed.
    """
    if count < 1:
        raise ConfigError(f"--launch must be a number of processes, 1 or more, not {count}")

    with tempfile.NamedTemporaryFile("w", suffix=".json") as hosts:
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(count)], hosts)
        hosts.flush()
        processes = [_start(rank, hosts.name, arguments) for rank in range(count)]

        def pass_on(number: int, _: object) -> None:
            send(processes, signal.Signals(number))

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, pass_on)

        try:
            return wait(processes)
        finally:
            send(processes, signal.SIGKILL)


def _start(rank: int, hosts: str, arguments: Sequence[str]) -> Process:
    """Start one process of the train command."""
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "mlx_loraplus.train", *arguments],
        env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": hosts},
        stdin=subprocess.DEVNULL,
        # Ctrl-C must reach the process only once, from here. A second signal would end the
        # process immediately.
        start_new_session=True,
    )


def wait(processes: Sequence[Process]) -> int:
    """Wait for all processes. After one has failed, end the processes that hang.

    The first process writes the checkpoint, so it is asked to stop but not killed.
    """
    failed: float | None = None
    asked: float | None = None
    while any(process.poll() is None for process in processes):
        time.sleep(_POLL)

        # Once a process has failed, the others have GRACE seconds to notice.
        if failed is None and any(process.returncode for process in processes):
            failed = time.monotonic()
        if failed is None or time.monotonic() - failed < GRACE:
            continue

        # Then they are asked to stop. They are killed after the first process has ended.
        if asked is None:
            asked = time.monotonic()
            send(processes, signal.SIGTERM)
        elif processes[0].returncode is not None and time.monotonic() - asked > GRACE:
            send(processes, signal.SIGKILL)

    _check_killed(processes)
    return max(process.returncode for process in processes)


def _check_killed(processes: Sequence[Process]) -> None:
    """Check that no process was ended by a signal.

    Raises:
        LoRAPlusError: A signal ended a process.
    """
    ends: list[str] = []
    for rank, process in enumerate(processes):
        if process.returncode < 0:
            ends.append(f"rank {rank} by {signal.Signals(-process.returncode).name}")

    if ends:
        raise LoRAPlusError(
            f"some of the {len(processes)} processes were killed: {join_problems(ends)}"
        )


def send(processes: Sequence[Process], number: signal.Signals) -> None:
    """Send a signal to the processes that are still running."""
    for process in processes:
        process.send_signal(number)


def free_ports(count: int) -> list[int]:
    """Return ``count`` ports that no process listens on."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))

        # All sockets are open at once, so that no port is returned twice.
        return [each.getsockname()[1] for each in sockets]
