"""The machine's memory: how much of it a run may use, and manners while it does."""

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import psutil

from .errors import ConfigError

PLAYED = "MLX_LORAPLUS_MEMORY"  # plays a Mac of this size, e.g. 16GB, for tests; allocations stay real
_CPU_SHARE = 0.9  # of the memory of a machine without Metal; the rest is the system's
_CACHE_SHARE = 1 / 8  # of the working set, for MLX's cache of freed arrays


@dataclass(frozen=True)
class Machine:
    """A machine as a run sees it, in bytes."""

    memory: int
    working_set: int  # may be used at most: what Metal recommends, which leaves room for the system
    free: int  # that no other process uses now
    metal: bool  # it is a Mac, or plays one: activations are in the model's own type there, and float32 elsewhere

    @property
    def budget(self) -> int:
        """Bytes that a run may use now."""
        return min(self.working_set, self.free)

    def cache(self, peak: int) -> int:
        """Return the bytes of freed arrays that MLX keeps beside a run's peak: min(working set / 8, what is left).

        They are no part of the peak, since MLX gives them back before it runs out. Without Metal it keeps none.
        """
        return max(0, min(int(_CACHE_SHARE * self.working_set), self.budget - peak)) if self.metal else 0

    def __str__(self) -> str:
        """Return it in one line."""
        kind = f"a Mac with {self.memory / 2**30:.0f} GB" if self.metal else f"{self.memory / 1e9:.1f} GB of memory"
        busy = "" if self.free >= self.working_set else f", {self.free / 1e9:.1f} GB of it not in use by others now"
        return f"{kind}: {self.working_set / 1e9:.1f} GB for a run{busy}"


def this_machine() -> Machine:
    """Return the machine at hand, or the Mac that it plays."""
    if played := os.environ.get(PLAYED):
        return play(played)
    seen, recommended = psutil.virtual_memory(), _recommended()
    return Machine(
        memory=seen.total,
        working_set=recommended or int(_CPU_SHARE * seen.total),
        free=seen.available + mx.get_active_memory() + mx.get_cache_memory(),
        metal=recommended is not None,
    )


def _recommended() -> int | None:
    """Return the working set that Metal recommends, or None without Metal."""
    working_set = mx.device_info().get("max_recommended_working_set_size")
    return working_set if mx.metal.is_available() and isinstance(working_set, int) else None


def play(memory: str) -> Machine:
    """Return a Mac with so much memory, e.g. ``16GB``, of which Metal recommends what macOS has it recommend.

    That is two thirds below 36 GB and three quarters from there on; newer systems allow more.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB?|GiB)?", memory, re.IGNORECASE)
    if not size or not 1 <= float(size[1]) <= 4096:
        raise ConfigError(f"memory {memory!r} is no size of a Mac: give one such as 16GB")
    total = int(float(size[1]) * 2**30)
    working_set = total * 2 // 3 if total < 36 * 2**30 else total * 3 // 4
    return Machine(total, working_set, total, metal=True)


def gb(size: float) -> str:
    """Return bytes as text."""
    if size < 1e7:
        return f"{size / 1e6:.2f} MB"
    return f"{size / 1e9:.2f} GB" if size < 1e11 else f"{size / 1e9:.0f} GB"


@contextmanager
def bounded_memory() -> Generator[None]:
    """Wire what Metal recommends, bound MLX's cache and memory, and put everything back. Does nothing without Metal.

    Where macOS does not wire memory for a process (before 15), MLX leaves it as it is.
    """
    working_set = _recommended()
    if working_set is None:
        yield
        return
    wired, cache = mx.set_wired_limit(working_set), mx.set_cache_limit(int(_CACHE_SHARE * working_set))
    memory = mx.set_memory_limit(working_set)
    try:
        yield
    finally:
        mx.synchronize()  # the limits must not move under a running step
        mx.set_wired_limit(wired)
        mx.set_cache_limit(cache)
        mx.set_memory_limit(memory)
