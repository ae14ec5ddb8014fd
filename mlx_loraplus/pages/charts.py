"""Charts for pages: curves and maps as SVG elements that a page can style.

A live page is rewritten after every report, so its charts must cost milliseconds. matplotlib needs
about 0.2 s for each picture; it draws those of ``matplotlib_plots.py``, which are saved or shown
once.

The page's style sheet (``page.html.jinja``) gives the lines their colours. Curves differ in their
dashes as well.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from .axes import Axis, fit_y_axis, linear_axis, log_ticks, short_number, tick_labels

# The size of a chart's drawing area and the space around it, in units of the view box.
_WIDTH, _HEIGHT = 400, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 40
_SCALE_WIDTH = 82  # of a map's colour scale with its numbers, such as 0.00566
_LETTER = 7.6  # approximate width of a letter
_LOG = " (log scale)"
_BAR = 24  # height of a bar with the space around it
_MAX_MARKERS = 50  # a curve with more points is a plain line
_MAX_POINTS = 400  # a curve with more points keeps the extremes of each group of points
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "10 4")
_VIRIDIS = (
    "440154", "482878", "3e4a89", "31688e", "26828e",
    "1f9e89", "35b779", "6ece58", "b5de2b", "fde725",
)  # fmt: skip

Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """A picture of a page: its caption, an SVG element, and the labels of its curves."""

    caption: str
    svg: str
    labels: Sequence[str] = ()

    def samples(self) -> list[tuple[str, str]]:
        """Return each label with a sample of its curve as an SVG element; none for one curve."""
        if len(self.labels) < 2:
            return []
        samples: list[tuple[str, str]] = []
        for number, label in enumerate(self.labels):
            line = f'<path {_style(number)} d="M0 5h24"/>'
            samples.append((f'<svg class="sample" viewBox="0 0 24 10">{line}</svg>', label))
        return samples


@dataclass(frozen=True)
class Curve:
    """A named line through points (x, y); points that are not finite are left out."""

    label: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Mark:
    """A place on the x axis that gets a dashed line and a label."""

    x: float
    label: str


def line_chart(
    caption: str,
    curves: Sequence[Curve],
    x_label: str,
    *,
    log: bool = False,
    log_x: bool = False,
    marks: Sequence[Mark] = (),
) -> Chart:
    """Return a chart of curves.

    Args:
        caption: What the chart shows.
        curves: At least one, with at least one finite point.
        x_label: The unit of x.
        log: Whether the y axis is logarithmic if its values span more than a factor of ten.
        log_x: Whether the x axis is logarithmic; all x are positive.
        marks: Places on the x axis; those outside the curves are left out.
    """
    # Leave out what can't be drawn.
    shown: list[Curve] = []
    for curve in curves:
        finite = [point for point in curve.points if math.isfinite(point[1])]
        shown.append(Curve(curve.label, _thin(finite)))

    # Fit the axes to the values.
    xs = [x for curve in shown for x, _ in curve.points]
    ys = [y for curve in shown for _, y in curve.points]
    left, right = _LEFT, _WIDTH - _RIGHT
    if log_x and min(xs) < max(xs):
        x_axis = Axis(min(xs), max(xs), left, right, log_ticks(min(xs), max(xs)), log=True)
    else:
        x_axis = linear_axis(min(xs), max(xs), left, right, tight=True)
    y_axis = fit_y_axis(ys, _HEIGHT - _BOTTOM, _TOP, log=log)

    # Say which axes are logarithmic. The label of the y axis is the caption.
    described = caption
    if y_axis.log:
        caption += _LOG
    if x_axis.log:
        x_label += _LOG

    # Draw from back to front.
    parts = [_draw_axes(x_axis, y_axis, x_label)]
    for number, curve in enumerate(shown):
        parts.append(_draw_curve(curve, number, x_axis, y_axis))
    drawn = [mark for mark in marks if min(xs) <= mark.x <= max(xs)]
    parts += _draw_marks(drawn, x_axis)
    labels = "".join(f"; {mark.label}" for mark in drawn)
    svg = _svg(f"{described}: {_describe(shown)}{labels}", parts)
    return Chart(caption, svg, [curve.label for curve in shown])


def heat_map(
    caption: str,
    values: np.ndarray,
    bands: Sequence[tuple[str, int]],
    columns: Sequence[tuple[float, str]],
    x_label: str,
    limits: tuple[float, float] | None = None,
) -> Chart:
    """Return a map of values, with row 0 at the bottom.

    Args:
        caption: What the map shows.
        values: The values, (rows, columns); cells that are not finite stay empty.
        bands: (label, number of rows) of neighbouring rows, from the bottom.
        columns: (position in columns, label) of each tick on the x axis.
        x_label: The unit of x.
        limits: The range of the colours. Default: the range of the values.
    """
    # Reserve space for the longest label on the left, and for the colour scale on the right.
    left = 12 + _LETTER * max(len(label) for label, _ in bands)
    right, bottom = _WIDTH - _SCALE_WIDTH, _HEIGHT - _BOTTOM
    finite = values[np.isfinite(values)]
    low, high = limits or (float(finite.min()), float(finite.max()))

    # The cells are one image, because they may be many thousands.
    height = bottom - _TOP
    parts = [_image(_colours(values[::-1], low, high), left, _TOP, right - left, height)]
    parts += _draw_bands(bands, left, right, rows=values.shape[0])
    for position, label in columns:
        x = left + position / values.shape[1] * (right - left)
        parts.append(_text(x, bottom + 16, label, "middle"))
    parts.append(_text((left + right) / 2, _HEIGHT - 4, x_label, "middle"))

    # The colour scale.
    scale = np.linspace(1, 0, 64)[:, None] * (high - low) + low
    parts.append(_image(_colours(scale, low, high), right + 8, _TOP, 10, height))
    parts.append(_text(right + 22, _TOP + 9, short_number(high, digits=3), "start"))
    parts.append(_text(right + 22, bottom, short_number(low, digits=3), "start"))
    return Chart(
        caption, _svg(f"{caption}: from {short_number(low)} to {short_number(high)}", parts)
    )


def bar_chart(caption: str, bars: Sequence[tuple[str, float, str]], limit: float) -> Chart:
    """Return bars that each begin where the one before it ends, and their sum as the last bar.

    Args:
        caption: What the chart shows.
        bars: (label, value ≥ 0, value as text) of each bar; the last one is the sum of the others.
        limit: A value that the sum should not exceed. A vertical line marks it.
    """
    left = 12 + _LETTER * max(len(label) for label, _, _ in bars)
    right = _WIDTH - 12 - _LETTER * max(len(text) for _, _, text in bars)
    total, height = bars[-1][1], _BAR * len(bars)
    scale = (right - left) / (max(total, limit) or 1.0)

    # Each bar has its label on the left and its value on the right.
    parts: list[str] = []
    before = 0.0
    for row, (label, value, text) in enumerate(bars):
        is_sum = row == len(bars) - 1
        x, y = left + (0.0 if is_sum else before * scale), row * _BAR
        mark = "mark-5" if is_sum else "mark-1"
        size = f'width="{value * scale:.1f}" height="{_BAR - 6}"'
        parts.append(f'<rect class="{mark}" x="{x:.1f}" y="{y + 3}" {size}/>')
        parts.append(_text(left - 6, y + _BAR / 2 + 4, label, "end"))
        parts.append(_text(_WIDTH - 4, y + _BAR / 2 + 4, text, "end"))
        before += value

    parts.append(f'<path class="limit" d="M{left + limit * scale:.1f} 0V{height}"/>')
    described = ", ".join(f"{label} {text}" for label, _, text in bars)
    return Chart(caption, _svg(f"{caption}: {described}", parts, height))


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    """Return at most ``_MAX_POINTS`` points, which include the extremes of each group of points."""
    if len(points) <= _MAX_POINTS:
        return points

    kept: list[Point] = [points[0]]
    for group in np.array_split(np.arange(1, len(points) - 1), _MAX_POINTS // 2 - 1):
        heights = [points[index][1] for index in group]
        extremes = {int(group[np.argmin(heights)]), int(group[np.argmax(heights)])}
        kept += [points[index] for index in sorted(extremes)]
    return [*kept, points[-1]]


def _draw_axes(x_axis: Axis, y_axis: Axis, x_label: str) -> str:
    """Return the grid, the labels of the ticks and the label of the x axis."""
    parts: list[str] = []
    for tick, label in zip(y_axis.ticks, tick_labels(y_axis), strict=True):
        y = y_axis(tick)
        parts.append(f'<path class="grid" d="M{x_axis.start} {y}H{x_axis.stop}"/>')
        parts.append(_text(x_axis.start - 6, y + 4, label, "end"))

    # A label that would touch the one before is left out.
    end = -math.inf
    for tick, label in zip(x_axis.ticks, tick_labels(x_axis), strict=True):
        x = x_axis(tick)
        parts.append(f'<path class="grid" d="M{x} {y_axis.start}V{y_axis.stop}"/>')
        half = _LETTER * len(label) / 2
        place = min(x, _WIDTH - half)
        if place - half >= end + _LETTER / 2:
            parts.append(_text(place, y_axis.start + 17, label, "middle"))
            end = place + half

    parts.append(_text((x_axis.start + x_axis.stop) / 2, _HEIGHT - 4, x_label, "middle"))
    return "".join(parts)


def _draw_curve(curve: Curve, number: int, x_axis: Axis, y_axis: Axis) -> str:
    """Return a curve, with a marker at each point if there are few."""
    places = [(x_axis(x), y_axis(y)) for x, y in curve.points]
    line = "L".join(f"{x} {y}" for x, y in places)
    thin = "" if len(places) <= _MAX_MARKERS else " thin"
    parts = [f'<path {_style(number, thin)} d="M{line}"/>'] if len(places) > 1 else []

    if len(places) <= _MAX_MARKERS:
        for (x, y), (step, value) in zip(places, curve.points, strict=True):
            title = escape(f"{curve.label} {value:.4g} at {short_number(step)}")
            mark = f'<circle class="mark-{number % 5 + 1}" cx="{x}" cy="{y}" r="2.5">'
            parts.append(f"{mark}<title>{title}</title></circle>")
    return "".join(parts)


def _draw_marks(marks: Sequence[Mark], x_axis: Axis) -> list[str]:
    """Return a dashed line for each mark; each label is in a row of its own, so none overlap."""
    parts: list[str] = []
    for row, mark in enumerate(marks):
        # The label is on the side that has more space.
        x = x_axis(mark.x)
        is_left = x < (x_axis.start + x_axis.stop) / 2
        anchor, beside = ("start", 5) if is_left else ("end", -5)
        parts.append(f'<path class="limit" d="M{x} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        label = _text(x + beside, _TOP + 12 + 16 * row, mark.label, anchor)
        parts.append(f'<g class="label">{label}</g>')
    return parts


def _style(number: int, thin: str = "") -> str:
    """Return the attributes of a curve's line; ``thin`` is a further class."""
    dashes = _DASHES[number % len(_DASHES)]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'class="curve-{number % 5 + 1}{thin}"{dashed}'


def _draw_bands(
    bands: Sequence[tuple[str, int]], left: float, right: float, rows: int
) -> list[str]:
    """Return each band's label at its middle, and a line between bands."""
    parts: list[str] = []
    bottom, height = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP
    done = 0
    for label, count in bands:
        middle = bottom - (done + count / 2) / rows * height
        parts.append(_text(left - 5, middle + 4, label, "end"))
        done += count
        if done < rows:
            y = round(bottom - done / rows * height, 1)
            parts.append(f'<path class="border" d="M{left:.1f} {y}H{right}"/>')
    return parts


def _colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the colour of each value, (rows, columns, 4) bytes; transparent if not finite."""
    stops = np.array([list(bytes.fromhex(colour)) for colour in _VIRIDIS], float)
    fraction = (values - low) / ((high - low) or 1.0)
    places = np.clip(np.nan_to_num(fraction), 0, 1) * (len(stops) - 1)

    channels = [np.interp(places, np.arange(len(stops)), stops[:, each]) for each in range(3)]
    channels.append(np.where(np.isfinite(values), 255.0, 0.0))
    return np.stack(channels, axis=-1).astype(np.uint8)


def _image(colours: np.ndarray, x: float, y: float, width: float, height: float) -> str:
    """Return an image with sharp cells."""
    file = io.BytesIO()
    Image.fromarray(colours).save(file, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<image class="cells" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height:.1f}"'
        f' preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
    )


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _describe(curves: Sequence[Curve]) -> str:
    """Return the first and last value of each curve, for people who can't see the chart."""
    sentences: list[str] = []
    for curve in curves:
        if curve.points:
            first, last = curve.points[0][1], curve.points[-1][1]
            sentences.append(f"{curve.label} from {first:.4g} to {last:.4g}")
    return "; ".join(sentences)


def _svg(description: str, parts: Sequence[str], height: int = _HEIGHT) -> str:
    """Return an SVG element that fills the space that the page gives it.

    The description is for people who can't see it.
    """
    label = escape(description)
    head = f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {height}">'
    return head + "".join(parts) + "</svg>"
