"""Pictures of runs in files and notebooks, drawn by matplotlib; ``charts.py`` draws pages."""

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..files import replacing
from .history import Run

_MAX_MARKERS = 50  # a curve with more points is a plain line
_LINE_STYLES = ("-", "--")
_LOSSES = {"loss": "training", "valid_loss": "validation"}


class Plot(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure in the format of ``path``'s suffix. Raises as ``replacing`` does."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def plot_losses(run: Run) -> Figure:
    """Return a figure of training and validation loss over steps."""
    # Fixed margins: a layout that measures the labels would double the time.
    figure = Plot(figsize=(7, 4))
    figure.subplots_adjust(left=0.13, right=0.98, bottom=0.13, top=0.97)
    draw_losses(figure.subplots(), run)
    return figure


def draw_losses(axes: Axes, run: Run) -> None:
    """Draw training and validation loss over steps."""
    for style, (name, label) in zip(_LINE_STYLES, _LOSSES.items(), strict=True):
        points = run.losses(name)
        if not points:
            continue

        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) <= _MAX_MARKERS else ""
        axes.plot(steps, values, style, label=label, marker=marker, markersize=3)

    finish_axes(axes, "steps", log=True)
    label_y(axes, f"loss {loss_unit(run)}")


def label_y(axes: Axes, label: str) -> None:
    """Label the y axis, and say whether it is logarithmic."""
    is_log = axes.get_yscale() == "log"
    axes.set_ylabel(f"{label}, log scale" if is_log else label)


def loss_unit(run: Run) -> str:
    """Return the unit of a run's losses, to follow the word "loss"."""
    objective = run.config.objective
    return f"per {objective.unit}" if objective.has_preferences else "(nats per token)"


def finish_axes(axes: Axes, unit: str, *, log: bool) -> None:
    """Label the x axis and add a grid and a legend.

    With ``log``, the y axis is logarithmic if its values span more than a factor of ten.
    """
    # A logarithmic axis needs positive values.
    values = _finite_values(axes)
    if log and values and max(values) > 10 * min(values) > 0:
        _use_log_scale(axes, decades=float(np.log10(max(values) / min(values))))

    # A single curve is named by the caption and needs no legend.
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=unit != "minutes"))
    axes.set_xlabel(unit)
    axes.grid(alpha=0.2)
    if len(axes.lines) > 1:
        axes.legend()


def _finite_values(axes: Axes) -> list[float]:
    values: list[float] = []
    for line in axes.lines:
        data = np.asarray(line.get_ydata(), float)
        values += data[np.isfinite(data)].tolist()
    return values


def _use_log_scale(axes: Axes, decades: float) -> None:
    """Make the y axis logarithmic, with about five ticks in plain numbers."""
    if decades < 1.5:
        ticks = (1, 2, 5)  # of each decade
    elif decades < 3:
        ticks = (1, 3)
    else:
        ticks = (1,)

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=ticks, numticks=6))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
