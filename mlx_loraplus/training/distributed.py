"""Distributed training: MLX's collectives, and what the processes of a run have to agree on.

With data parallelism, the batches are the same as on one machine. Each of N processes holds the
whole model and takes every N-th row of each batch. The gradients, losses and token counts of a step
are summed over all processes once, so that every process makes the step that a single process would
make. With tensor parallelism, each process holds a part of every weight and takes all rows.

Processes communicate through collectives (``mx.distributed``: ring, JACCL, NCCL or MPI, whichever
``mlx.launch`` started). Every process must call the same collectives in the same order, so all
decisions are made together.

If a process ends, its connections close, and the next collective fails in the other processes. If a
process hangs, ``World.watch`` closes this process's own connections, with the same effect.
"""

import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import ConfigError, DeviceError, LoRAPlusError, PeerError, join_problems
from ..failures import failure_of, failures_in_one_line
from .rank_helpers import (
    describe_differences,
    digest_of,
    join_by_rank,
    limit_blas_threads,
    names_backend,
    open_sockets,
    shut_down,
    split_by_size,
)

BUFFER = 32 << 20  # bytes per collective: few messages, and little extra memory
GRACE = 20.0  # seconds for a process to end after its connections are closed


class World:
    """The processes of a run, as seen by one of them.

    Args:
        group: All processes; None for this process alone.
        parallel: Whether the processes divide each batch's rows (data) or the weights (tensor).

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
        is_main: Whether this is the process that writes files and prints.
        data_shards: The number of shards that a batch is divided into.
        shard_index: The index of the shard that this process trains on.
        row_slice: The rows of that shard, as a slice of a batch.
        is_tensor_parallel: Whether the weights are divided, so that every forward pass
            communicates.
    """

    def __init__(
        self,
        group: mx.distributed.Group | None = None,
        parallel: Literal["data", "tensor"] = "data",
    ):
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self.is_main = self.rank == 0
        self.data_shards = self.size if parallel == "data" else 1
        self.shard_index = self.rank % self.data_shards
        self.row_slice = slice(self.shard_index, None, self.data_shards)
        self.is_tensor_parallel = parallel == "tensor" and self.size > 1
        self._waiting: float | None = None  # when the current collective began, for ``watch``

    @classmethod
    def join(cls, parallel: Literal["data", "tensor"] = "data") -> Self:
        """Connect to the processes that ``mlx.launch`` or ``--launch`` started, if there are any.

        Raises:
            ConfigError: The other processes can't be reached.
        """
        return cls(_connect()[0], parallel)

    def sum_shards(self, tree: Any) -> Any:
        """Return a tree's arrays summed over the processes with different rows; see ``sum_all``."""
        return tree if self.data_shards == 1 else self.sum_all(tree)

    def sum_all(self, tree: Any) -> Any:
        """Return a tree's arrays summed over all processes, evaluated and bitwise equal on all.

        Raises:
            PeerError: Another process is lost.
        """
        names, leaves = zip(*tree_flatten(tree), strict=True)

        # Evaluate first, so that an error of this process is not mistaken for a lost peer.
        self.compute(leaves)

        flat = [leaf.astype(mx.float32).reshape(-1) for leaf in leaves]
        summed: list[tuple[str, mx.array]] = []
        for name, leaf, total in zip(names, leaves, self._all_sum(flat), strict=True):
            summed.append((name, total.reshape(leaf.shape).astype(leaf.dtype)))
        return tree_unflatten(summed)

    def any_rank(
        self, flags: Sequence[bool], trained: Mapping[str, mx.array] | None = None
    ) -> list[bool]:
        """Return for each flag whether it is set on any process.

        If ``trained`` is given, the processes also compare digests of these arrays.

        Raises:
            LoRAPlusError: On all processes, if the arrays are not bitwise equal.
            PeerError: Another process is lost.
        """
        if self.size == 1:
            return list(flags)

        # One message holds a byte per flag, then the digest.
        digest = b"" if trained is None else digest_of(trained)
        rows = self._gather(np.frombuffer(bytes(flags) + digest, np.uint8))
        self._check_digests(rows[:, len(flags) :])
        return [bool(column.any()) for column in rows[:, : len(flags)].T]

    def _check_digests(self, digests: np.ndarray) -> None:
        """Raise an error on all processes if a row differs from the first."""
        is_different = (digests != digests[0]).any(axis=1)
        if not is_different.any():
            return

        ranks = " and ".join(str(rank) for rank in np.flatnonzero(is_different))
        raise self._agreed(
            LoRAPlusError(
                f"the trained parameters on rank {ranks} differ from those on rank 0: the machines"
                " compute differently, or memory is faulty; --resume continues from the last"
                " checkpoint, which rank 0 wrote"
            )
        )

    def gather(self, text: str) -> list[str]:
        """Return every process's text, by rank."""
        if self.size == 1:
            return [text]

        data = np.frombuffer(text.encode(), np.uint8)
        sizes = self._gather(np.array([data.size], np.int32)).flatten().tolist()
        # All messages have the same size, and none is empty.
        padded = np.zeros(max(sizes) + 1, np.uint8)
        padded[: data.size] = data
        rows = self._gather(padded)
        return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]

    @contextmanager
    def sync_errors(self) -> Generator[None]:
        """Raise an error on all processes if the block fails on any of them.

        The message says what failed on which rank; the main process shows it.

        Raises:
            LoRAPlusError: The type is that of the error raised here. If only other processes
                failed, it is LoRAPlusError itself.
        """
        if self.size == 1:
            yield
            return

        problem: LoRAPlusError | None = None
        try:
            with failures_in_one_line():
                yield
        except LoRAPlusError as error:
            problem = error

        messages = self._gather_problems(problem)
        if not any(messages):
            return

        message = join_by_rank(messages)
        if problem is None:
            raise self._agreed(LoRAPlusError(message))
        raise self._agreed(type(problem)(message)) from problem.__cause__

    def _gather_problems(self, problem: LoRAPlusError | None) -> list[str]:
        """Return each process's problem as text, or ""; raise one that can't reach the others."""
        # After a process is lost, a collective may never end. If the weights are divided, the
        # others may wait in the middle of a forward pass, and notice only that this process ends.
        unheard = (PeerError, DeviceError) if self.is_tensor_parallel else (PeerError,)
        if isinstance(problem, unheard):
            raise problem

        # NCCL communicates on the GPU, which may have failed.
        try:
            return self.gather("" if problem is None else str(problem))
        except RuntimeError:
            if problem is None:
                raise
            raise problem from problem.__cause__

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Compare values that can be written as JSON, and name those that differ.

        Raises:
            ConfigError: On all processes, if any value differs between them.
        """
        everyone = [json.loads(text) for text in self.gather(json.dumps(facts))]
        problems = describe_differences(everyone)
        if problems:
            raise self._agreed(
                ConfigError(f"all processes must have equal values, but {join_problems(problems)}")
            )

    def broadcast(self, model: nn.Module) -> None:
        """Copy the main process's trainable parameters to all processes, bit-exactly."""
        if self.size == 1:
            return

        names, arrays = zip(*tree_flatten(model.trainable_parameters()), strict=True)
        sent = self._send([array.reshape(-1).view(mx.uint8) for array in arrays])

        received: list[tuple[str, mx.array]] = []
        for name, array, data in zip(names, arrays, sent, strict=True):
            received.append((name, data.view(array.dtype).reshape(array.shape)))
        model.load_weights(received, strict=False)

    @contextmanager
    def copied(self, folder: Path | None) -> Generator[Path | None]:
        """Yield the main process's folder on all processes, or None if it has none.

        The other processes get a temporary copy.
        """
        if self.size == 1:
            yield folder
            return

        # The main process sends the others the names and sizes of the files.
        files: list[Path] = []
        if folder is not None and self.is_main:
            files = sorted(folder.iterdir())
        listing = None
        if folder is not None and files:
            listing = (folder.name, [(file.name, file.stat().st_size) for file in files])
        listing = json.loads(self.gather(json.dumps(listing))[0])
        if listing is None:
            yield None
            return

        # Then it sends them one by one.
        folder_name, sizes = listing
        with tempfile.TemporaryDirectory() as home:
            copy = Path(home) / folder_name
            copy.mkdir()
            for number, (name, size) in enumerate(sizes):
                mine = mx.zeros(size, mx.uint8)
                if self.is_main:
                    mine = mx.array(np.fromfile(files[number], np.uint8))
                (received,) = self._send([mine])
                np.array(received).tofile(copy / name)
            yield folder if self.is_main else copy

    @contextmanager
    def watch(self, timeout: float) -> Generator[None]:
        """Close this process's connections if one collective takes longer than ``timeout`` seconds.

        MLX then fails in that collective, and the run ends as if a process had died. If MLX does
        not fail, because the backend does not use sockets, this process prints the error and
        exits.
        """
        if self.size == 1:
            yield
            return

        # Another thread watches, since this one is blocked inside the collective.
        over = threading.Event()

        def poll() -> None:
            while not over.wait(min(1.0, timeout / 4)):
                since = self._waiting
                if since is None or time.monotonic() - since <= timeout:
                    continue

                # MLX fails if its sockets are closed. If it uses no sockets, only an exit helps.
                shut_down(_connect()[1])
                if not over.wait(GRACE) and self._waiting == since:
                    sys.stderr.write(f"error: {self._lost()}\n")
                    os._exit(2)
                return

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _gather(self, mine: np.ndarray) -> np.ndarray:
        """Return every process's array as the rows of one array; all have the same size."""
        gathered = mx.distributed.all_gather(mx.array(mine), group=self.group)
        self._wait([gathered])
        return np.array(gathered).reshape(self.size, -1)

    def _send(self, mine: list[mx.array]) -> list[mx.array]:
        """Return the main process's bytes; the other processes add zeros to them."""
        if not self.is_main:
            mine = [mx.zeros_like(data) for data in mine]
        return self._all_sum(mine)

    def _all_sum(self, flat: list[mx.array]) -> list[mx.array]:
        """Return flat arrays of one type summed over all processes, in few messages."""
        sums: list[mx.array] = []
        for first, last in split_by_size([array.nbytes for array in flat], BUFFER):
            part = flat[first:last]
            total = mx.distributed.all_sum(mx.concatenate(part), group=self.group)
            self._wait([total])

            # Cut the sum where the arrays were joined.
            ends = np.cumsum([array.size for array in part])
            sums += mx.split(total, ends[:-1].tolist())
        return sums

    def _agreed(self, error: LoRAPlusError) -> LoRAPlusError:
        """Mark an error that all processes raise, so that only the main process shows it."""
        error.reported = not self.is_main
        return error

    def compute(self, tree: Any) -> None:
        """Evaluate arrays that the model computes.

        Raises:
            PeerError: A process is lost, and the weights are divided.
        """
        with self.computing():
            mx.eval(tree)

    def computing(self) -> AbstractContextManager[None]:
        """Return the context for evaluating the model; it raises what ``compute`` raises."""
        return self._with_others(computing=True) if self.is_tensor_parallel else nullcontext()

    def _wait(self, arrays: Sequence[mx.array]) -> None:
        """Evaluate the results of a collective."""
        with self._with_others():
            mx.eval(arrays)

    @contextmanager
    def _with_others(self, *, computing: bool = False) -> Generator[None]:
        """Report MLX's errors as a lost process; if computing, only those of its communication."""
        self._waiting = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if failure_of(error) is not None or (computing and not names_backend(error)):
                raise
            raise PeerError(f"{self._lost()} ({' '.join(str(error).split())})") from None
        finally:
            self._waiting = None

    def _lost(self) -> str:
        return (
            f"rank {self.rank} of {self.size}: another process has ended, hangs or can't be "
            "reached, so this process stops; --resume continues from the newest checkpoint, if "
            "there is one, with any number of processes"
        )


ALONE = World()


@cache
def _connect() -> tuple[mx.distributed.Group, frozenset[int]]:
    """Connect to the other processes, once; return the group and the sockets that it opened."""
    before = open_sockets()
    rank = os.environ.get("MLX_RANK", "0")

    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"rank {rank} can't reach the other processes ({reason}): check the addresses and "
            "free ports in the host file, and that every host runs the same command"
        ) from None

    if group.size() == 1 and rank != "0":
        raise ConfigError(
            f"rank {rank} found no peers: this MLX build lacks the backend that mlx.launch"
            " selected; try --backend ring"
        )

    # Processes on the same host share its cores.
    host = socket.gethostname()
    limit_blas_threads(processes=World(group).gather(host).count(host))
    return group, frozenset(open_sockets() - before)
