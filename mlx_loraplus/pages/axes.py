"""The axes of charts: where a value is drawn, and which values get a label."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_SMALL, _LARGE, _HUGE = 1e-3, 1e5, 1e10  # beyond these, numbers are shortened
_ALL_DIGITS = 17  # tell any two numbers apart


@dataclass(frozen=True)
class Axis:
    """Maps values to positions in the drawing; ``ticks`` are the values that get a label."""

    low: float
    high: float
    start: float  # position of ``low``
    stop: float
    ticks: Sequence[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        fraction = (value - low) / (high - low)
        return round(self.start + fraction * (self.stop - self.start), 1)


def fit_y_axis(values: Sequence[float], bottom: float, top: float, *, log: bool) -> Axis:
    """Return the y axis for values, logarithmic if they span more than a factor of ten."""
    low, high = min(values), max(values)
    if log and high > 10 * low > 0:
        margin = (high / low) ** 0.03
        low, high = low / margin, high * margin
        return Axis(low, high, bottom, top, log_ticks(low, high), log=True)
    return linear_axis(low, high, bottom, top)


def linear_axis(low: float, high: float, start: float, stop: float, *, tight: bool = False) -> Axis:
    """Return an axis from ``low`` to ``high`` with about five round ticks.

    Args:
        low: The smallest value.
        high: The largest value.
        start: The position of ``low``.
        stop: The position of ``high``.
        tight: Whether the axis has no margins. From one whole number to another, such as from step
            to step, its ticks are whole numbers, too.
    """
    # Values that are all equal get a range around them. Numbers below zero appear only if needed.
    if high == low:
        margin = 0.5 if tight else abs(low) * 0.1 or 1.0
    else:
        margin = 0.0 if tight else (high - low) * 0.05
    first, last = low - margin, high + margin
    if first < 0 <= low:
        first = 0.0

    # The distance of the ticks is 1, 2 or 5 times a power of ten.
    rough = (last - first) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    distance = min((power * each for each in (1, 2, 5, 10)), key=lambda each: abs(each - rough))
    if tight and float(low).is_integer() and float(high).is_integer():
        distance = max(1.0, distance)

    # The ticks are multiples of the distance; 1e-9 allows for rounding.
    least = math.ceil(first / distance - 1e-9)
    most = math.floor(last / distance + 1e-9)
    ticks = [number * distance for number in range(least, most + 1)]
    return Axis(first, last, start, stop, ticks)


def log_ticks(low: float, high: float) -> list[float]:
    """Return about five ticks of a logarithmic axis: 1, 2 and 5, or fewer, of each decade."""
    decades = math.log10(high / low)
    if decades < 1.7:
        digits = (1, 2, 5)
    elif decades < 3:
        digits = (1, 3)
    else:
        digits = (1,)

    # Over very many decades, some are skipped.
    every = math.ceil(decades / 6)
    ticks: list[float] = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        if power % every == 0:
            ticks += [digit * 10.0**power for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def tick_labels(axis: Axis) -> list[str]:
    """Return the labels of an axis's ticks, all in one form, such as 60k and 140k."""
    sizes = [abs(tick) for tick in axis.ticks if tick]
    largest, smallest = max(sizes, default=0.0), min(sizes, default=0.0)

    # Small numbers with exponents, unless they are on the way to large ones.
    digits = _digits_of(axis.ticks)
    if axis.log and smallest < _SMALL and largest <= 0.1:
        return [scientific(tick, digits) for tick in axis.ticks]
    if axis.log or largest < _SMALL or largest >= _HUGE:
        return [short_number(tick, digits) for tick in axis.ticks]

    # Large numbers are in thousands or millions.
    scale, unit = 1.0, ""
    if largest >= _LARGE:
        scale, unit = (1e6, "M") if largest >= 1e6 else (1e3, "k")
    return [_plain(tick / scale, digits) + unit * bool(tick) for tick in axis.ticks]


def _digits_of(ticks: Sequence[float]) -> int:
    """Return how many digits tell ticks apart; rounding to them moves no tick visibly."""
    visible = min((after - before for before, after in pairwise(ticks)), default=math.inf) / 10
    for digits in (4, 6, 10, 13):
        if all(abs(float(f"{tick:.{digits}g}") - tick) <= visible for tick in ticks):
            return digits
    return _ALL_DIGITS


def _plain(value: float, digits: int) -> str:
    """Return a number without an exponent, with all digits before the point."""
    if abs(value) < 1000:
        return f"{value:,.{digits}g}"
    decimals = max(0, digits - len(f"{abs(value):.0f}"))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def short_number(value: float, digits: int = 4) -> str:
    """Return a number as a short label."""
    if value == 0 or _SMALL <= abs(value) < _LARGE:
        return _plain(value, digits)
    return scientific(value, digits)


def scientific(value: float, digits: int) -> str:
    """Return a number with an exponent, such as 3e-4."""
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    return f"{float(mantissa):.{digits}g}e{int(power)}"
