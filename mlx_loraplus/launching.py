"""``--launch N``: one command starts N processes on this machine.

The processes are started like those of ``mlx.launch -n N``, with two differences: the first process
owns the terminal, so its live display works, and Ctrl-C reaches all processes. They communicate
through MLX's ring or, with CUDA, through NCCL, and then each has a GPU of its own.
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

from ._runtime import check_backend, has_cuda
from .errors import ConfigError, LoRAPlusError, join_problems
from .interrupted_imports import LAUNCHED

GRACE = 15.0  # seconds for the other processes to end after one has failed
_POLL = 0.1  # seconds
Process = subprocess.Popen[bytes]


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run the train command as ``count`` connected processes, and wait for all of them.

    Ctrl-C, SIGTERM and SIGHUP (the terminal was closed) are passed on to every process.

    Returns:
        0 if all processes succeeded, else the largest of their exit codes.

    Raises:
        ConfigError: ``count`` is below 1, or above the number of GPUs with CUDA.
        LoRAPlusError: A process was killed.
    """
    check_processes(count)

    with tempfile.NamedTemporaryFile("w", suffix=".json") as hosts:
        ports = free_ports(count)
        if has_cuda():
            environments = nccl_environments(pick_gpus(count, visible_gpus()), ports[0])
        else:
            json.dump([[f"127.0.0.1:{port}"] for port in ports], hosts)
            hosts.flush()
            environments = ring_environments(count, hosts.name)
        processes = [_start(environment, arguments) for environment in environments]

        # Pass signals on, and wait. The finally clause kills what is left after an error.
        def pass_on(number: int, _: object) -> None:
            send(processes, signal.Signals(number))

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, pass_on)

        try:
            return wait(processes)
        finally:
            send(processes, signal.SIGKILL)


def check_processes(count: int) -> None:
    """Check that this machine can run so many processes.

    Raises:
        ConfigError: ``count`` is below 1, or above the number of GPUs with CUDA.
    """
    if count < 1:
        raise ConfigError(f"--launch must be a number of processes, 1 or more, not {count}")
    if has_cuda():
        pick_gpus(count, visible_gpus())


def check_batch_size(batch_size: int | str, processes: int) -> None:
    """Check that every process that shares the batches has an example of each.

    Raises:
        ConfigError: A batch has fewer examples than there are processes.
    """
    if isinstance(batch_size, int) and batch_size < processes:
        raise ConfigError(
            f"--batch-size {batch_size} leaves some of {processes} processes without an example:"
            f" give --batch-size {processes} or more (it counts the examples of all processes"
            " together), or start fewer processes"
        )


def ring_environments(count: int, hosts: str) -> list[dict[str, str]]:
    """Return the variables from which MLX's ring learns each process's rank and the host file."""
    return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": hosts} for rank in range(count)]


def nccl_environments(gpus: Sequence[str], port: int) -> list[dict[str, str]]:
    """Return the variables from which NCCL learns each process's rank, GPU and meeting point.

    They are those that ``mlx.launch --backend nccl`` sets.

    Args:
        gpus: The GPU of each process, by its number or name in ``CUDA_VISIBLE_DEVICES``.
        port: A free port of this machine.
    """
    environments: list[dict[str, str]] = []
    for rank, gpu in enumerate(gpus):
        environments.append(
            {
                "MLX_RANK": str(rank),
                "MLX_WORLD_SIZE": str(len(gpus)),
                "NCCL_HOST_IP": "127.0.0.1",
                "NCCL_PORT": str(port),
                "CUDA_VISIBLE_DEVICES": gpu,
            }
        )
    return environments


def visible_gpus() -> list[str]:
    """Return the GPUs that CUDA gives to this process, as ``CUDA_VISIBLE_DEVICES`` names them.

    Raises:
        BackendError: MLX can't start.
    """
    # Another process asks, because CUDA takes memory on a GPU in every process that asks.
    code = "import mlx.core as mx; print(mx.device_count(mx.gpu))"
    asked = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        check_backend()  # raises the reason
        return []

    # CUDA ignores names from the first unknown one on, so there may be more names than GPUs.
    count = int(asked.stdout)
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(number) for number in range(count)])[:count]


def pick_gpus(count: int, gpus: Sequence[str]) -> list[str]:
    """Return a GPU for each process.

    Raises:
        ConfigError: There are fewer GPUs than processes.
    """
    if count > len(gpus):
        remedy = f"give --launch {len(gpus)}" if len(gpus) > 1 else "leave --launch out"
        raise ConfigError(
            f"--launch {count} needs {count} GPUs, one for each process, but MLX finds"
            f" {len(gpus)}: {remedy}"
        )
    return list(gpus[:count])


def _start(environment: dict[str, str], arguments: Sequence[str]) -> Process:
    """Start one process of the train command."""
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "mlx_loraplus.train", *arguments],
        env=os.environ | environment | {LAUNCHED: "1"},
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
            f"some of the {len(processes)} processes were killed: {join_problems(ends)}; --resume"
            " continues from the last checkpoint, if there is one"
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
