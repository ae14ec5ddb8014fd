"""Helpers for distributed training: digests, message sizes, BLAS threads, sockets."""

import ctypes
import hashlib
import json
import os
import socket
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import join_problems

_BACKENDS = ("[ring]", "[jaccl]", "nccl", "mpi")  # in the errors of MLX's communication
_MAX_DESCRIPTORS = 1024  # file descriptors that are searched for sockets


def digest_of(arrays: Mapping[str, mx.array]) -> bytes:
    """Return a digest of the arrays' bits."""
    digest = hashlib.sha256()
    for array in arrays.values():
        data = array.reshape(-1).view(mx.uint8)
        digest.update(np.array(data).tobytes())
    return digest.digest()


def join_by_rank(messages: Sequence[str]) -> str:
    """Return one message if all processes have the same problem, else one for each that has one."""
    if len(set(messages)) == 1:
        return messages[0]
    return join_problems([f"rank {rank}: {line}" for rank, line in enumerate(messages) if line])


def names_backend(error: RuntimeError) -> bool:
    """Return whether an error of MLX comes from its communication between processes."""
    return any(name in str(error).lower() for name in _BACKENDS)


def describe_differences(everyone: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a phrase for each value that is not the same on all processes."""
    problems: list[str] = []
    for name in everyone[0]:
        # Ranks with the same value are listed together.
        ranks: dict[str, list[str]] = {}
        for rank, theirs in enumerate(everyone):
            ranks.setdefault(json.dumps(theirs.get(name)), []).append(str(rank))

        if len(ranks) > 1:
            values = [
                f"{value:.40} on rank {' and '.join(where)}" for value, where in ranks.items()
            ]
            problems.append(f"{name} is {', '.join(values)}")
    return problems


def split_by_size(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Divide a sequence into ranges (first, last + 1) whose sizes add up to at most ``most``.

    An item that is larger than ``most`` gets its own range.
    """
    ranges: list[tuple[int, int]] = []
    first, total = 0, 0
    for number, size in enumerate(sizes):
        # Begin a new range if the item does not fit into this one.
        if number > first and total + size > most:
            ranges.append((first, number))
            first, total = number, 0
        total += size

    return [*ranges, (first, len(sizes))]


def limit_blas_threads(processes: int) -> None:
    """Divide this host's cores between its processes.

    OpenBLAS becomes many times slower if its threads compete for cores.
    """
    # The user's own limit takes precedence. The BLAS of macOS needs no limit.
    is_limited = "OPENBLAS_NUM_THREADS" in os.environ
    if processes == 1 or sys.platform != "linux" or is_limited:
        return

    cores = len(os.sched_getaffinity(0))
    with suppress(AttributeError):  # MLX uses another BLAS
        ctypes.CDLL(None).openblas_set_num_threads(max(1, cores // processes))


def open_sockets() -> set[int]:
    """Return the file descriptors of this process's open sockets."""
    found: set[int] = set()
    for number in range(3, _MAX_DESCRIPTORS):
        # Most numbers are not in use.
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                found.add(number)
    return found


def shut_down(sockets: Iterable[int]) -> None:
    """Shut down the connections among ``sockets`` that are still open."""
    for number in open_sockets().intersection(sockets):
        # The duplicate is closed here; the original belongs to MLX.
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            connection.shutdown(socket.SHUT_RDWR)
