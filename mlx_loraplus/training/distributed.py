"""Several processes train one model: MLX's collectives, and what the processes have to agree on.

Each process holds the whole model and takes every size-th row of the batches of one machine. An update's gradients,
losses and supervised tokens are summed over the processes once, so all make the update that one alone would make. They
meet in a collective (``mx.distributed``: ring, JACCL, NCCL or MPI, whatever ``mlx.launch`` started), and every process
comes to the same collectives in the same order: so whatever one decides, all decide. Alone, a team costs nothing.

A process that dies ends its connections, and MLX fails in the others' next collective. One that hangs does not: then
``Team.watch`` ends this process's own connections, and the failure is the same.
"""

import ctypes
import hashlib
import json
import os
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import ConfigError, LoRAPlusError, PeerError, join_problems

BUFFER = 32 << 20  # bytes summed over the processes at once: few messages, and little memory beside the gradients
GRACE = 20.0  # seconds for a process to end by itself once its connections are gone


class Team:
    """The processes of a run, as one of them sees them.

    Args:
        group: Of all processes; None for this one alone.
        parallel: Whether they share each batch's rows (data) or the base's weights (tensor).

    Attributes:
        rank: Of this process, from 0.
        size: How many there are.
        leads: Whether this is the process that writes and speaks.
        shares: Into how many parts a batch's rows are dealt.
        part: Which of them is this process's.
        share: Its rows, as a slice of a batch's.
        splits_weights: Whether the model itself needs the other processes for all that it computes.
    """

    def __init__(self, group: mx.distributed.Group | None = None, parallel: Literal["data", "tensor"] = "data"):
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self.leads = self.rank == 0
        self.shares = self.size if parallel == "data" else 1
        self.part = self.rank % self.shares
        self.share = slice(self.part, None, self.shares)
        self.splits_weights = parallel == "tensor" and self.size > 1
        self._waiting: float | None = None  # since when

    @classmethod
    def join(cls, parallel: Literal["data", "tensor"] = "data") -> Self:
        """Meet the processes that ``mlx.launch`` or ``--launch`` started beside this one; alone there is none.

        Raises:
            ConfigError: They can't be reached.
        """
        return cls(_connect()[0], parallel)

    def sum(self, tree: Any) -> Any:
        """Return as ``add`` a tree's arrays summed over the processes that share rows."""
        return tree if self.shares == 1 else self.add(tree)

    def add(self, tree: Any) -> Any:
        """Return a tree's arrays summed over all processes, evaluated and the same to the bit on all.

        Raises:
            PeerError: A process is lost.
        """
        names, leaves = zip(*tree_flatten(tree), strict=True)
        self.compute(leaves)  # so that no failure of computing them is taken for one of the others
        sums = self._all_sum([leaf.astype(mx.float32).reshape(-1) for leaf in leaves])
        shaped = [total.reshape(leaf.shape).astype(leaf.dtype) for total, leaf in zip(sums, leaves, strict=True)]
        return tree_unflatten(list(zip(names, shaped, strict=True)))

    def agree(self, flags: Sequence[bool], trained: Mapping[str, mx.array] | None = None) -> list[bool]:
        """Tell of each flag whether it is up on any process; compare what trains by a digest, where it is given.

        Raises:
            LoRAPlusError: On all processes, if the arrays are not equal to the bit.
            PeerError: A process is lost.
        """
        if self.size == 1:
            return list(flags)
        mine = bytes(flags) + (b"" if trained is None else digest_of(trained))
        rows = self._gather(np.frombuffer(mine, np.uint8))
        digests = rows[:, len(flags) :]
        if odd := [str(rank) for rank, digest in enumerate(digests) if not np.array_equal(digest, digests[0])]:
            raise self._agreed(
                LoRAPlusError(
                    f"what trains is not the same any more on rank {' and '.join(odd)} as on rank 0: the machines do "
                    "not compute alike, or memory is faulty; --resume goes on from the last checkpoint, rank 0's"
                )
            )
        return [bool(column.any()) for column in rows[:, : len(flags)].T]

    def gather(self, text: str) -> list[str]:
        """Return every process's text, by rank."""
        if self.size == 1:
            return [text]
        data = np.frombuffer(text.encode(), np.uint8)
        sizes = self._gather(np.array([data.size], np.int32)).flatten().tolist()
        padded = np.zeros(max(sizes) + 1, np.uint8)  # there are no empty messages
        padded[: data.size] = data
        return [row[:size].tobytes().decode() for row, size in zip(self._gather(padded), sizes, strict=True)]

    @contextmanager
    def together(self) -> Generator[None]:
        """Let all processes fail where one does, with what is wrong on which of them; the first tells it.

        Raises:
            LoRAPlusError: Of this process's kind, or of none where only others failed.
        """
        if self.size == 1:
            yield
            return
        problem = None
        try:
            yield
        except LoRAPlusError as error:
            problem = error
        told = self.gather("" if problem is None else str(problem))
        if not any(told):
            return
        lines = [f"rank {rank}: {line}" for rank, line in enumerate(told) if line]
        message = told[0] if len(set(told)) == 1 else join_problems(lines)
        raise self._agreed((LoRAPlusError if problem is None else type(problem))(message)) from None

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Compare facts, ready for JSON, and name those that differ.

        Raises:
            ConfigError: On all processes, if any fact is not the same on all.
        """
        told = [json.loads(text) for text in self.gather(json.dumps(facts))]
        problems = []
        for name in facts:
            ranks: dict[str, list[str]] = {}
            for rank, mine in enumerate(told):
                ranks.setdefault(json.dumps(mine.get(name)), []).append(str(rank))
            if len(ranks) > 1:
                values = ", ".join(f"{value:.40} on rank {' and '.join(where)}" for value, where in ranks.items())
                problems.append(f"{name} is {values}")
        if problems:
            raise self._agreed(ConfigError(f"the processes must be the same, but {join_problems(problems)}"))

    def broadcast(self, model: nn.Module) -> None:
        """Give what trains of every process's model the first one's values, to the bit."""
        if self.size == 1:
            return
        names, arrays = zip(*tree_flatten(model.trainable_parameters()), strict=True)
        sent = self._send([array.reshape(-1).view(mx.uint8) for array in arrays])
        same = [data.view(array.dtype).reshape(array.shape) for data, array in zip(sent, arrays, strict=True)]
        model.load_weights(list(zip(names, same, strict=True)), strict=False)

    @contextmanager
    def copied(self, folder: Path | None) -> Generator[Path | None]:
        """Yield the first process's folder, or None, on all: the others get a copy that is removed afterwards."""
        if self.size == 1:
            yield folder
            return
        files = sorted(folder.iterdir()) if folder is not None and self.leads else []
        listing = (folder.name, [(file.name, file.stat().st_size) for file in files]) if files and folder else None
        listing = json.loads(self.gather(json.dumps(listing))[0])
        if listing is None:
            yield None
            return
        with tempfile.TemporaryDirectory() as home:
            copy = Path(home) / listing[0]
            copy.mkdir()
            for number, (name, size) in enumerate(listing[1]):
                mine = mx.array(np.fromfile(files[number], np.uint8)) if self.leads else mx.zeros(size, mx.uint8)
                np.array(self._send([mine])[0]).tofile(copy / name)
            yield folder if self.leads else copy

    @contextmanager
    def watch(self, timeout: float) -> Generator[None]:
        """End this process's connections once it has waited ``timeout`` seconds in one collective.

        Then MLX fails there, and the run ends as if a process had died. Where the backend keeps no sockets of its own
        that can be ended, the process ends with the line that it would have told.
        """
        if self.size == 1:
            yield
            return
        over = threading.Event()

        def look() -> None:
            while not over.wait(min(1.0, timeout / 4)):
                since = self._waiting
                if since is not None and time.monotonic() - since > timeout:
                    _hang_up()
                    if not over.wait(GRACE) and self._waiting == since:
                        sys.stderr.write(f"error: {self._lost()}\n")
                        os._exit(2)
                    return

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _gather(self, mine: np.ndarray) -> np.ndarray:
        """Return every process's array, all of one size, as the rows of one array."""
        gathered = mx.distributed.all_gather(mx.array(mine), group=self.group)
        self._wait([gathered])
        return np.array(gathered).reshape(self.size, -1)

    def _send(self, mine: list[mx.array]) -> list[mx.array]:
        """Return the first process's bytes: added up with zeros."""
        return self._all_sum(mine if self.leads else [mx.zeros_like(data) for data in mine])

    def _all_sum(self, flat: list[mx.array]) -> list[mx.array]:
        """Return flat arrays of one type summed over all processes, in few messages."""
        sums: list[mx.array] = []
        for first, last in _runs([array.nbytes for array in flat], BUFFER):
            buffer = mx.distributed.all_sum(mx.concatenate(flat[first:last]), group=self.group)
            self._wait([buffer])
            sums += mx.split(buffer, np.cumsum([array.size for array in flat[first : last - 1]]).tolist())
        return sums

    def _agreed(self, error: LoRAPlusError) -> LoRAPlusError:
        """Return an error that all processes raise, for the first to tell."""
        error.told = not self.leads
        return error

    def compute(self, tree: Any) -> None:
        """Evaluate what the model computes.

        Raises:
            PeerError: A process is lost, and the model needs it.
        """
        with self.computing():
            mx.eval(tree)

    def computing(self) -> AbstractContextManager[None]:
        """Let the model compute inside the context; where its weights are divided, that is waiting for the others.

        Raises:
            PeerError: A process is lost, and the model needs it.
        """
        return self._with_others() if self.splits_weights else nullcontext()

    def _wait(self, arrays: Sequence[mx.array]) -> None:
        """Evaluate what collectives return."""
        with self._with_others():
            mx.eval(arrays)

    @contextmanager
    def _with_others(self) -> Generator[None]:
        """Take what fails inside the context for the loss of another process."""
        self._waiting = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise PeerError(f"{self._lost()} ({' '.join(str(error).split())})") from None
        finally:
            self._waiting = None

    def _lost(self) -> str:
        return (
            f"rank {self.rank} of {self.size}: another process has ended, hangs or can't be reached any more, so this "
            "one stops; --resume goes on from the newest checkpoint, with as many processes as you like"
        )


ALONE = Team()


@cache
def _connect() -> tuple[mx.distributed.Group, frozenset[int]]:
    """Meet the other processes, once; return the group and the sockets of its connections."""
    before = _sockets()
    rank = os.environ.get("MLX_RANK", "0")
    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"rank {rank} can't reach the other processes ({' '.join(str(error).split())}): check the addresses and "
            "free ports in the host file, and that every host runs the same command"
        ) from None
    if group.size() == 1 and rank != "0":
        raise ConfigError(f"rank {rank} is alone: this MLX has no backend for how mlx.launch started it; try another")
    _share_cores(Team(group))
    return group, frozenset(_sockets() - before)


def digest_of(arrays: Mapping[str, mx.array]) -> bytes:
    """Return a digest of arrays' bits."""
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.digest()


def _share_cores(team: Team) -> None:
    """Give the processes on one host their share of its cores: OpenBLAS is slow beyond measure where they fight."""
    here = team.gather(socket.gethostname()).count(socket.gethostname())
    if here > 1 and sys.platform == "linux" and "OPENBLAS_NUM_THREADS" not in os.environ:
        with suppress(AttributeError):  # MLX has another BLAS
            ctypes.CDLL(None).openblas_set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))


def _sockets() -> set[int]:
    """Return this process's open sockets."""
    found = set()
    for number in range(3, 1024):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                found.add(number)
    return found


def _hang_up() -> None:
    """End the connections to the other processes."""
    for number in _connect()[1] & _sockets():
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            connection.shutdown(socket.SHUT_RDWR)


def _runs(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Cut a sequence into runs (first, last + 1) of at most ``most`` in sum, or of one item that is larger."""
    runs, first, total = [], 0, 0
    for number, size in enumerate(sizes):
        if number > first and total + size > most:
            runs.append((first, number))
            first, total = number, 0
        total += size
    return [*runs, (first, len(sizes))]
