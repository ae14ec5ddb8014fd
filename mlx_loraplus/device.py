"""What MLX computes on, how much of its memory a run may use, and the limits set for MLX."""

import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import psutil

from .errors import ConfigError

SIMULATED = "MLX_LORAPLUS_MEMORY"  # simulates a Mac of this size, e.g. 16GB; allocations stay real
_CPU_FRACTION = 0.9  # of the memory of a machine without a GPU; the system keeps the rest
_CUDA_FRACTION = 0.9  # of an NVIDIA GPU's memory; CUDA's context and libraries need the rest
_WIRED_FRACTION = 0.9
_CACHE_FRACTION = 1 / 8  # of the working set, for MLX's cache of freed arrays
_LARGE_MAC = 36 * 2**30  # bytes; from this size on, macOS recommends a larger fraction
# The most elements that an array may have on a GPU. Metal's kernels compute larger arrays wrongly.
# CUDA was not tried, so the limit holds there too.
MOST_ELEMENTS = 2**31 - 1


Backend = Literal["metal", "cuda", "cpu"]


def backend() -> Backend:
    """Return what MLX computes on."""
    if mx.default_device() != mx.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def on_gpu() -> bool:
    """Return whether MLX computes on a GPU, where bfloat16 and quantized weights are fast."""
    return backend() != "cpu"


@dataclass(frozen=True)
class Machine:
    """What a run computes on, and its memory in bytes."""

    backend: Backend
    memory: int  # of the GPU with CUDA, else of the whole machine
    working_set: int  # the limit for a run: what Metal recommends, or a fraction of the memory
    free: int  # not used by other processes now
    name: str = ""  # of the GPU with CUDA

    @property
    def has_gpu(self) -> bool:
        """Whether it has a GPU, which keeps activations in the model's type; a CPU uses float32."""
        return self.backend != "cpu"

    @property
    def budget(self) -> int:
        """Bytes that a run may use.

        macOS compresses and swaps the memory of other programs when a run needs it. So on a Mac,
        ``free`` is not a limit, but only a reason to warn.
        """
        return self.working_set if self.backend == "metal" else min(self.working_set, self.free)

    def cache(self, peak: int) -> int:
        """Return the size of MLX's cache of freed arrays, in bytes, for a run with this peak.

        It is min(working set / 8, budget - peak) on a GPU and 0 elsewhere. The cache does not
        count towards the peak, because MLX releases it before it runs out of memory.
        """
        if not self.has_gpu:
            return 0
        return max(0, min(int(_CACHE_FRACTION * self.working_set), self.budget - peak))

    def __str__(self) -> str:
        """Return a one-line description."""
        if self.backend == "metal":
            kind = f"a Mac with {self.memory / 2**30:.0f} GB"
        elif self.backend == "cuda":
            kind = f"{self.name} with {self.memory / 1e9:.1f} GB"
        else:
            kind = f"{self.memory / 1e9:.1f} GB of memory"

        busy = ""
        if self.free < self.working_set:
            busy = f", of which {self.free / 1e9:.1f} GB are free now"
        return f"{kind}: {self.working_set / 1e9:.1f} GB for a run{busy}"


def this_machine() -> Machine:
    """Return this machine, or the Mac that it simulates."""
    simulated = os.environ.get(SIMULATED)
    if simulated:
        return simulate_mac(simulated, f"the environment variable {SIMULATED}")

    system = psutil.virtual_memory()
    used = mx.get_active_memory() + mx.get_cache_memory()
    return machine_from(backend(), mx.device_info(), system.total, system.available, used)


def machine_from(
    backend: Backend, info: Mapping[str, Any], total: int, available: int, used: int
) -> Machine:
    """Return the machine that MLX and the system describe.

    Args:
        backend: What MLX computes on.
        info: ``mx.device_info()``. Metal gives ``max_recommended_working_set_size`` and CUDA gives
            ``total_memory`` and ``free_memory``, in bytes.
        total: The system's memory, in bytes.
        available: What the system can give to programs now, in bytes.
        used: What MLX holds in this process, in bytes; a run may use it.
    """
    if backend == "cuda":
        memory = info["total_memory"]
        working_set = int(_CUDA_FRACTION * memory)
        name = info.get("device_name", "a GPU")
        return Machine(backend, memory, working_set, info["free_memory"] + used, name)

    if backend == "metal":
        working_set = info["max_recommended_working_set_size"]
    else:
        working_set = int(_CPU_FRACTION * total)
    return Machine(backend, total, working_set, available + used)


def room_for_copy() -> int:
    """Return the bytes that a float32 copy of a model, or of its first blocks, may take now.

    It is half of what is free, because computing with the copy needs as much again.
    """
    machine = this_machine()
    return max(0, min(machine.budget, machine.free) - mx.get_active_memory()) // 2


def simulate_mac(memory: str, source: str = "--memory") -> Machine:
    """Return a simulated Mac.

    Its working set is two thirds of its memory if it has less than 36 GB, and three quarters
    otherwise, as macOS recommends. Newer versions of macOS recommend more.

    Args:
        memory: Its size, e.g. ``16GB``.
        source: Where the size was given, for the error.

    Raises:
        ConfigError: ``memory`` is not a size between 1 and 4096 GB.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB?|GiB)?", memory, re.IGNORECASE)
    if not size or not 1 <= float(size[1]) <= 4096:
        raise ConfigError(
            f"{source} is {memory!r:.40}, which is not the size of a Mac: give a size such as 16GB"
        )

    total = int(float(size[1]) * 2**30)
    working_set = total * 2 // 3 if total < _LARGE_MAC else total * 3 // 4
    return Machine("metal", total, working_set, total)


def gb(size: float) -> str:
    """Return a number of bytes as text."""
    if size < 1e7:
        return f"{size / 1e6:.2f} MB"
    if size < 1e11:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e9:.0f} GB"


def set_wired_limit() -> int | None:
    """Limit wired memory to 90% of what Metal recommends, and return the limit before.

    Wiring everything has made Macs with 48 GB restart. Before macOS 15, MLX ignores the limit.
    Wired memory exists only on a Mac; elsewhere the result is None.
    """
    if backend() != "metal":
        return None
    recommended: Any = mx.device_info()["max_recommended_working_set_size"]
    return mx.set_wired_limit(int(_WIRED_FRACTION * recommended))


@contextmanager
def bounded_memory() -> Generator[None]:
    """Limit MLX's memory, its cache and its wired memory on a GPU; restore the limits at the end.

    On a CPU this does nothing.
    """
    kind = backend()
    if kind == "cpu":
        yield
        return

    working_set = machine_from(kind, mx.device_info(), 0, 0, 0).working_set
    cache = mx.set_cache_limit(int(_CACHE_FRACTION * working_set))
    memory = mx.set_memory_limit(working_set)
    wired = set_wired_limit()

    try:
        yield
    finally:
        # The limits must not change while a step is running. If the GPU has failed, its error,
        # which was raised before, is raised again here.
        with suppress(RuntimeError):
            mx.synchronize()
        mx.set_cache_limit(cache)
        mx.set_memory_limit(memory)
        if wired is not None:
            mx.set_wired_limit(wired)


@contextmanager
def kept_random_state() -> Generator[None]:
    """Restore the state of MLX's random generator after the block."""
    high, low = mx.random.state[0].tolist()  # pyright: ignore[reportIndexIssue]
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)
