"""Pictures of runs, drawn by matplotlib.

Text and lines in an SVG have the colour ``currentColor``, the page's own text colour, so that a
picture fits light and dark pages.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..files import replacing
from .history import Run
from .state import Event

_INK = "#123456"  # a placeholder, which as_svg replaces by currentColor
_PAGE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "legend.framealpha": 0,
    "font.family": "sans-serif",
}
_MAX_MARKERS = 50  # a curve with more points is a plain line
_MAX_BLOCK_LABELS = 8
_LINE_STYLES = ("-", "--", ":", "-.")
_LOSSES = {"loss": "training", "valid_loss": "validation"}
_NORMS = {"norm_a": "‖A‖", "norm_b": "‖B‖", "norm_change": "‖sBA‖ / ‖W‖"}
Picture = tuple[str, str]
"""A caption and an SVG element."""


class Plot(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


class _Series(NamedTuple):
    """Curves that share one picture."""

    caption: str
    names: Mapping[str, str]  # event key → label
    log: bool


@dataclass(frozen=True)
class _Layer:
    """A module's path, split into its kind and its place in the model."""

    kind: str  # the path without its numbers
    block: tuple[int, ...]  # the numbers

    @classmethod
    def of(cls, path: str) -> "_Layer":
        """Split a path such as ``layers.3.mlp.down_proj``."""
        parts = path.split(".")
        kind = ".".join(part for part in parts if not part.isdigit())
        return cls(kind, tuple(int(part) for part in parts if part.isdigit()))

    @staticmethod
    def short(kinds: Iterable[str]) -> list[str]:
        """Return the last part of each kind, e.g. ``down_proj``."""
        return [kind.rpartition(".")[2] for kind in kinds]


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure in the format of ``path``'s suffix. Raises as ``replacing`` does."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def draw_losses(axes: Axes, run: Run) -> None:
    """Draw training and validation loss over steps."""
    _draw_series(axes, run, _LOSSES, log=True)
    axes.set_ylabel("loss (nats per token)")


def run_pictures(run: Run) -> list[Picture]:
    """Return the pictures of a run: curves, and a map of each norm over steps and modules."""
    memory = {f"{kind}_memory_gb": kind for kind in ("peak", "active", "cache")}
    gradient = "Gradient norm before clipping, the largest since the last report"
    series = (
        _Series("Loss, nats per supervised token", _LOSSES, log=True),
        _Series("Learning rates", _rate_names(run), log=True),
        _Series(gradient, {"grad_norm": "norm"}, log=True),
        _Series("Speed, useful tokens a second", {"tokens_per_second": "tokens/s"}, log=False),
        _Series("Memory, GB", memory, log=False),
        _Series("Share of tokens that are padding", {"padding": "padding"}, log=False),
    )

    # Curves without a point are left out.
    pictures: list[Picture] = []
    for caption, names, log in series:
        if any(run.losses(name) for name in names):
            pictures.append((caption, as_svg(_draw_series, run, names, log)))

    for name, label in _NORMS.items():
        if run.losses(name):
            caption = f"{label} of each module, blocks upwards"
            pictures.append((caption, as_svg(_draw_norms, run, name)))
    return pictures


def _rate_names(run: Run) -> dict[str, str]:
    """Return every learning rate that the history has: ``rate_a`` → ``a``, and so on."""
    names: dict[str, str] = {}
    for event in run.history:
        for name in event:
            if name.startswith("rate_"):
                names[name] = name.removeprefix("rate_")
    return names


def fuse_pictures(layers: Mapping[str, Event]) -> list[Picture]:
    """Return maps of how well fusing kept each layer's change, over kinds and blocks.

    Args:
        layers: From ``fuse.json``.
    """
    pictures: list[Picture] = []
    for name, what in (("cosine", "Weights"), ("output_cosine", "Outputs")):
        if any(layer[name] is not None for layer in layers.values()):
            caption = f"{what}: cosine of the change made to the change meant"
            pictures.append((caption, as_svg(_draw_layers, layers, name)))
    return pictures


def as_svg(
    draw: Callable[..., None], *arguments: Any, size: tuple[float, float] = (4.4, 2.9)
) -> str:
    """Return what ``draw(axes, *arguments)`` draws, as an SVG element in the page's colour.

    The element has no width and height, so it fills the space that the page gives it.
    """
    file = io.StringIO()
    with mpl.rc_context(_PAGE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), *arguments)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})

    # Drop the XML header, then the two attributes of the opening tag.
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    tag, _, rest = svg.partition(">")
    kept = [part for part in tag.split(" ") if not part.startswith(("width=", "height="))]
    return " ".join(kept) + ">" + rest


def finish_axes(axes: Axes, unit: str, *, log: bool) -> None:
    """Label the x axis and add a grid and a legend.

    With ``log``, the y axis is logarithmic if its values span more than a factor of ten.
    """
    # A logarithmic axis needs positive values.
    values = _finite_values(axes)
    if log and values and max(values) > 10 * min(values) > 0:
        _use_log_scale(axes, decades=float(np.log10(max(values) / min(values))))

    # A single curve is named by the caption and needs no legend.
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
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


def _draw_series(axes: Axes, run: Run, names: Mapping[str, str], log: bool) -> None:
    """Draw one curve for each event key in ``names``."""
    for style, (name, label) in zip(cycle(_LINE_STYLES), names.items(), strict=False):
        points = run.losses(name)
        if not points:
            continue

        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) <= _MAX_MARKERS else ""
        axes.plot(steps, values, style, label=label, marker=marker, markersize=3)

    finish_axes(axes, "steps", log=log)


def _draw_norms(axes: Axes, run: Run, name: str) -> None:
    """Draw a norm of every module over steps, in one band per kind, with block 0 at the bottom."""
    steps, values = zip(*run.losses(name), strict=True)

    # Modules are sorted by kind, and by block within a kind.
    layers = [_Layer.of(path) for path in run.start["modules"]]
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    order = sorted(
        range(len(layers)), key=lambda row: (kinds.index(layers[row].kind), layers[row].block)
    )

    # A report's column extends halfway to its neighbours.
    middles = (np.array(steps[1:]) + steps[:-1]) / 2
    edges = [steps[0] - 0.5, *middles, steps[-1] + 0.5]
    norms = np.array(values)[:, order].T  # (modules, reports)
    picture = axes.pcolorfast(edges, np.arange(len(order) + 1), norms)
    axes.figure.colorbar(picture, ax=axes)

    # Each band is labelled at its middle and separated by a line.
    counts = [sum(layer.kind == kind for layer in layers) for kind in kinds]
    borders = np.cumsum([0, *counts])
    axes.set_yticks((borders[:-1] + borders[1:]) / 2, _Layer.short(kinds))
    for border in borders[1:-1]:
        axes.axhline(border, color=_INK, linewidth=0.8)
    axes.set_xlabel("steps")


def _draw_layers(axes: Axes, layers: Mapping[str, Event], name: str) -> None:
    """Draw a number between 0 and 1 of every layer: a row per kind, a column per block."""
    places = [_Layer.of(path) for path in layers]
    kinds = list(dict.fromkeys(place.kind for place in places))
    blocks = sorted({place.block for place in places})

    # Cells without a layer, or whose number was not measured, stay empty.
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for place, layer in zip(places, layers.values(), strict=True):
        if layer[name] is not None:
            grid[kinds.index(place.kind), blocks.index(place.block)] = layer[name]
    picture = axes.imshow(grid, aspect="auto", origin="lower", vmin=0, vmax=1)
    axes.figure.colorbar(picture, ax=axes)

    axes.set_yticks(range(len(kinds)), _Layer.short(kinds))
    labelled = range(0, len(blocks), -(-len(blocks) // _MAX_BLOCK_LABELS))
    axes.set_xticks(labelled, [_block_label(blocks[place]) for place in labelled])
    axes.set_xlabel("blocks")


def _block_label(block: Sequence[int]) -> str:
    return ".".join(map(str, block))
