"""The range test: raise the learning rate at every step, until the loss rises.

Losses are compared with those of the untrained model on the same batches, because two batches
differ more than two rates do. Other methods were compared with it at equal cost; they are in
``scripts/study/rate_methods.py``.

Source: Smith, arXiv 1506.01186.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .rate_probe import FORWARD, Probe

SPAN = 100.0
"""The rates that are tried lie between the default / SPAN and the default · SPAN."""
_SMOOTHED = 3  # steps
_DIVERGED = 0.5  # a rise of the loss by this fraction ends the range test


@dataclass(frozen=True)
class TriedRate:
    """A rate that was tried.

    Attributes:
        rate: The rate.
        change: The change of the loss against the untrained model; nan if it was not finite.
    """

    rate: float
    change: float


@dataclass(frozen=True)
class Finding:
    """What a method found.

    Attributes:
        critical: The critical rate, or None if the method found none.
        tried: The rates that were tried.
    """

    critical: float | None
    tried: tuple[TriedRate, ...]


@dataclass(frozen=True)
class RateMethod:
    """A way to find a learning rate.

    It trains a fresh adapter for a number of steps' work. Only eta is searched: lambda keeps its
    value, because LoRA+ is equivalent to LoRA with a larger scale.

    Attributes:
        name: The name that users see.
        find: find(probe, steps, default): ``steps`` is the work in steps of the run, and
            ``default`` the rate around which rates are tried.
        factor: The run's rate, divided by the critical rate.
    """

    name: str
    find: Callable[[Probe, float, float], Finding]
    factor: float


def range_test(probe: Probe, steps: float, default: float) -> Finding:
    """Raise the rate at every step, and return the rate at which the loss was lowest.

    The loss is a mean over neighbouring steps. It rises again where the rates are too high.
    """
    count = max(2, int(steps / (1 + FORWARD)))
    rates = np.geomspace(default / SPAN, default * SPAN, count)
    untrained = probe.losses(count)

    # The loss before a step shows the effect of the rate before it.
    tried: list[TriedRate] = []
    for number, rate in enumerate(rates):
        change = probe.step(float(rate)) - untrained[number]
        if number:
            tried.append(TriedRate(float(rates[number - 1]), float(change)))
        if not change < _DIVERGED * abs(untrained[number]):
            break

    # Smooth the changes. A mean belongs to the rate in the middle of its steps.
    changes = np.array([each.change for each in tried])
    width = min(_SMOOTHED, len(changes))
    if not width:
        return Finding(None, tuple(tried))
    smoothed = np.convolve(changes, np.full(width, 1 / width), "valid")
    middle = width // 2
    inner = [each.rate for each in tried[middle : middle + len(smoothed)]]
    return Finding(lowest_rate(inner, smoothed), tuple(tried))


RANGE_TEST = RateMethod("range test", range_test, factor=0.5)
"""The factor is provisional; a low rate is safer than a high one. See ``scripts/study/rate``."""


def lowest_rate(rates: list[float], changes: np.ndarray) -> float | None:
    """Return the rate at which the loss falls most, interpolated; None if it never falls.

    It is the minimum of a parabola over log(rate) through the lowest point and its neighbours.
    """
    known = np.where(np.isfinite(changes), changes, np.inf)
    best = int(np.argmin(known))
    if not known[best] < 0:
        return None
    if not 0 < best < len(rates) - 1 or not np.isfinite(known[best - 1 : best + 2]).all():
        return rates[best]

    before, lowest, after = known[best - 1 : best + 2].tolist()
    bend = before - 2 * lowest + after
    shift = 0.5 * (before - after) / bend if bend > 0 else 0.0
    distance = math.log(rates[best + 1] / rates[best])
    return rates[best] * math.exp(shift * distance)
