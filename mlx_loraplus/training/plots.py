"""Pictures of runs, by matplotlib. As SVG their ink is the page's own colour, so that they fit light and dark pages."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..places import replacing
from .history import Run
from .loop import Event

_INK = "#123456"  # stands for the page's own colour, and becomes it in SVG
_PAGE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK,
    "ytick.color": _INK, "grid.color": _INK, "legend.framealpha": 0, "font.family": "sans-serif",
}  # fmt: skip
_DOTS = 50  # points, above which a curve is a line
_LOSSES = {"loss": "training", "valid_loss": "validation"}
Picture = tuple[str, str]
"""A caption and an SVG element."""


class Plot(Figure):
    """A figure that a notebook shows by itself, whether or not pyplot is at work there."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure in the format that ``path`` ends in. Raises as ``replacing`` does."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def draw_losses(axes: Axes, run: Run) -> None:
    """Draw training and validation loss against updates."""
    _draw_series(axes, run, _LOSSES, log=True)
    axes.set_ylabel("loss (nats per token)")


def run_pictures(run: Run) -> list[Picture]:
    """Return the pictures of a run: curves, and a map of each norm over the updates and modules."""
    rates = {name: name.removeprefix("rate_") for event in run.history for name in event if name.startswith("rate_")}
    memory = {f"{kind}_memory_gb": kind for kind in ("peak", "active", "cache")}
    pictures = [
        (caption, as_svg(_draw_series, run, names, log))
        for caption, names, log in (
            ("Loss, nats per supervised token", _LOSSES, True),
            ("Learning rates", rates, True),
            ("Gradient norm before clipping, the largest since the last report", {"grad_norm": "norm"}, True),
            ("Speed, useful tokens a second", {"tokens_per_second": "tokens/s"}, False),
            ("Memory, GB", memory, False),
            ("Share of tokens that are padding", {"padding": "padding"}, False),
        )
        if any(map(run.losses, names))
    ]
    for name, label in (("norm_a", "‖A‖"), ("norm_b", "‖B‖"), ("norm_change", "‖sBA‖ / ‖W‖")):
        if run.losses(name):
            pictures.append((f"{label} of each module, blocks upwards", as_svg(_draw_norms, run, name)))
    return pictures


def fuse_pictures(layers: Mapping[str, Event]) -> list[Picture]:
    """Return maps of what fuse.json tells of each layer: how much of its change is kept, over kinds and blocks."""
    return [
        (f"{what}: cosine of the change made to the change meant", as_svg(_draw_layers, layers, name))
        for name, what in (("cosine", "Weights"), ("output_cosine", "Outputs"))
        if any(layer[name] is not None for layer in layers.values())
    ]


def as_svg(draw: Callable[..., None], *arguments: Any, size: tuple[float, float] = (4.4, 2.9)) -> str:
    """Return what ``draw(axes, *arguments)`` draws as an SVG element, in a page's colour and as wide as its place."""
    file = io.StringIO()
    with mpl.rc_context(_PAGE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), *arguments)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    start, _, rest = svg[svg.index("<svg") :].replace(_INK, "currentColor").partition(">")
    return " ".join(part for part in start.split(" ") if not part.startswith(("width=", "height="))) + ">" + rest


def finish_axes(axes: Axes, unit: str, *, log: bool) -> None:
    """Name x and the curves; by ``log`` y is on a log axis, with about five ticks, if it spans more than tenfold."""
    values = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float) if np.isfinite(value)]
    if log and values and max(values) > 10 * min(values) > 0:
        decades = np.log10(max(values) / min(values))
        axes.set_yscale("log")
        ticks = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)  # of each decade
        axes.yaxis.set_major_locator(LogLocator(subs=ticks, numticks=6))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(unit)
    axes.grid(alpha=0.2)
    if len(axes.lines) > 1:
        axes.legend()


def _draw_series(axes: Axes, run: Run, names: Mapping[str, str], log: bool) -> None:
    for style, (name, label) in zip(cycle(("-", "--", ":", "-.")), names.items(), strict=False):
        if points := run.losses(name):
            marker = "o" if len(points) <= _DOTS else ""
            axes.plot(*zip(*points, strict=True), style, label=label, marker=marker, markersize=3)
    finish_axes(axes, "updates", log=log)


def _draw_norms(axes: Axes, run: Run, name: str) -> None:
    """Draw one of the norms of every module over the updates: a band for each kind of module, blocks upwards in it."""
    updates, values = zip(*run.losses(name), strict=True)
    kinds, blocks = _kinds_and_blocks(run.start["modules"])
    found = list(dict.fromkeys(kinds))
    order = sorted(range(len(kinds)), key=lambda row: (found.index(kinds[row]), blocks[row]))
    middles = (np.array(updates[1:]) + updates[:-1]) / 2
    edges = [updates[0] - 0.5, *middles, updates[-1] + 0.5]
    picture = axes.pcolorfast(edges, np.arange(len(order) + 1), np.array(values)[:, order].T)  # (modules, reports)
    axes.figure.colorbar(picture, ax=axes)
    sizes = np.cumsum([0, *(kinds.count(kind) for kind in found)])
    axes.set_yticks((sizes[:-1] + sizes[1:]) / 2, _ends(found))
    for edge in sizes[1:-1]:
        axes.axhline(edge, color=_INK, linewidth=0.8)
    axes.set_xlabel("updates")


def _draw_layers(axes: Axes, layers: Mapping[str, Event], name: str) -> None:
    """Draw a number between 0 and 1 of every layer: a row for each kind, a column for each block."""
    kinds, blocks = _kinds_and_blocks(layers)
    rows, columns = list(dict.fromkeys(kinds)), sorted(set(blocks))
    grid = np.full((len(rows), len(columns)), np.nan)
    for kind, block, layer in zip(kinds, blocks, layers.values(), strict=True):
        grid[rows.index(kind), columns.index(block)] = np.nan if layer[name] is None else layer[name]
    picture = axes.imshow(grid, aspect="auto", origin="lower", vmin=0, vmax=1)
    axes.figure.colorbar(picture, ax=axes)
    axes.set_yticks(range(len(rows)), _ends(rows))
    shown = range(0, len(columns), -(-len(columns) // 8))
    axes.set_xticks(shown, [".".join(map(str, columns[place])) for place in shown])
    axes.set_xlabel("blocks")


def _kinds_and_blocks(paths: Iterable[str]) -> tuple[list[str], list[tuple[int, ...]]]:
    """Return each path without its numbers, and these."""
    split = [path.split(".") for path in paths]
    kinds = [".".join(part for part in parts if not part.isdigit()) for parts in split]
    return kinds, [tuple(int(part) for part in parts if part.isdigit()) for parts in split]


def _ends(kinds: Sequence[str]) -> list[str]:
    return [kind.rpartition(".")[2] for kind in kinds]
