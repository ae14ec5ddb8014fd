"""The machine's memory: how much of it a run may use, and the limits set for MLX."""

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import psutil

from .errors import ConfigError

PLAYED = "MLX_LORAPLUS_MEMORY"  # simulates a Mac of this size, e.g. 16GB; allocations stay real
_CPU_SHARE = 0.9  # of the memory of a machine without Metal; the system keeps the rest
_WIRED_SHARE = 0.9
_CACHE_SHARE = 1 / 8  # of the working set, for MLX's cache of freed arrays
_LARGE_MAC = 36 * 2**30  # bytes; from this size on, macOS recommends a larger share


@dataclass(frozen=True)
class Machine:
    """A machine's memory, in bytes."""

    memory: int
    working_set: int  # the limit for a run: what Metal recommends, which leaves room for macOS
    free: int  # not used by other processes now
    metal: bool  # a real or simulated Mac: activations keep the model's dtype, elsewhere float32

    @property
    def budget(self) -> int:
        """Bytes that a run may use now."""
        return min(self.working_set, self.free)

    def cache(self, peak: int) -> int:
        """Return the size of MLX's cache of freed arrays, in bytes, for a run with this peak.

        It is min(working set / 8, budget - peak) on Metal and 0 elsewhere. The cache does not
        count towards the peak, because MLX releases it before it runs out of memory.
        """
        if not self.metal:
            return 0
        return max(0, min(int(_CACHE_SHARE * self.working_set), self.budget - peak))

    def __str__(self) -> str:
        """Return a one-line description."""
        if self.metal:
            kind = f"a Mac with {self.memory / 2**30:.0f} GB"
        else:
            kind = f"{self.memory / 1e9:.1f} GB of memory"

        busy = ""
        if self.free < self.working_set:
            busy = f", of which {self.free / 1e9:.1f} GB are free now"
        return f"{kind}: {self.working_set / 1e9:.1f} GB for a run{busy}"


def this_machine() -> Machine:
    """Return this machine, or the Mac that it simulates."""
    if simulated := os.environ.get(PLAYED):
        return simulate_mac(simulated)

    system = psutil.virtual_memory()
    recommended = _recommended()
    return Machine(
        memory=system.total,
        working_set=recommended or int(_CPU_SHARE * system.total),
        free=system.available + mx.get_active_memory() + mx.get_cache_memory(),
        metal=recommended is not None,
    )


def _recommended() -> int | None:
    """Return the working set that Metal recommends, or None without Metal."""
    working_set = mx.device_info().get("max_recommended_working_set_size")
    if mx.metal.is_available() and isinstance(working_set, int):
        return working_set
    return None


def simulate_mac(memory: str) -> Machine:
    """Return a simulated Mac.

    Its working set is two thirds of its memory if it has less than 36 GB, and three quarters
    otherwise, as macOS recommends. Newer versions of macOS recommend more.

    Args:
        memory: Its size, e.g. ``16GB``.

    Raises:
        ConfigError: ``memory`` is not a size between 1 and 4096 GB.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB?|GiB)?", memory, re.IGNORECASE)
    if not size or not 1 <= float(size[1]) <= 4096:
        raise ConfigError(f"memory {memory!r} is not the size of a Mac: give a size such as 16GB")

    total = int(float(size[1]) * 2**30)
    working_set = total * 2 // 3 if total < _LARGE_MAC else total * 3 // 4
    return Machine(total, working_set, total, metal=True)


def gb(size: float) -> str:
    """Return a number of bytes as text."""
    if size < 1e7:
        return f"{size / 1e6:.2f} MB"
    if size < 1e11:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e9:.0f} GB"


@contextmanager
def bounded_memory() -> Generator[None]:
    """Limit MLX's wired memory, cache and memory to what Metal recommends; restore them at the end.

    Wired memory gets 90% of it: wiring everything has made Macs with 48 GB restart. Without Metal
    this does nothing. Before macOS 15, MLX ignores the limit on wired memory.
    """
    working_set = _recommended()
    if working_set is None:
        yield
        return

    wired = mx.set_wired_limit(int(_WIRED_SHARE * working_set))
    cache = mx.set_cache_limit(int(_CACHE_SHARE * working_set))
    memory = mx.set_memory_limit(working_set)

    try:
        yield
    finally:
        mx.synchronize()  # the limits must not change while a step is running
        mx.set_wired_limit(wired)
        mx.set_cache_limit(cache)
        mx.set_memory_limit(memory)


@contextmanager
def kept_random_state() -> Generator[None]:
    """Restore the state of MLX's random generator after the block."""
    high, low = mx.random.state[0].tolist()  # pyright: ignore[reportIndexIssue]
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)
