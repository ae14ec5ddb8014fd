"""Runs side by side: the settings that differ, what came of each, and their curves by updates, tokens and minutes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

from .config import CompareConfig
from .errors import ConfigError, OutputError
from .places import write_atomically
from .settings import settings_of
from .shown import Shown
from .training.history import Run
from .training.plots import Plot, as_svg, finish_axes, write_picture
from .training.report import figures, page, plain, summary, table

_RESULTS = {"updates", "validation loss", "training loss", "spent", "peak memory", "outcome"}
_UNTOLD = {"adapter_path", "resume", "overwrite", "rates"}  # places, and what other settings tell
_CURVES = {"valid_loss": "validation loss", "loss": "training loss"}
_COLUMN = 20  # characters
_FORMATS = (".html", ".png", ".svg")
_UNITS = {"updates": ("update", 1), "tokens": ("useful_tokens", 1), "minutes": ("seconds", 60)}  # what, so many in one


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """What ``compare_runs`` found. ``print`` it, or show it in a notebook."""

    runs: list[Run]
    rows: list[tuple[str, list[str]]]  # a setting that differs or a result, and the text of each run

    @property
    def names(self) -> list[str]:
        """The runs' folders, by their last part where that tells them apart."""
        short = [run.name for run in self.runs]
        return short if len(set(short)) == len(short) else [str(run.folder) for run in self.runs]

    def plot(self, name: str = "valid_loss") -> Any:
        """Return a matplotlib figure of the runs' "valid_loss" or "loss" by updates, tokens and minutes."""
        figure = Plot(figsize=(10, 3.6), layout="constrained")
        for axes, unit in zip(figure.subplots(1, 3, sharey=True), _UNITS, strict=True):
            self._draw(axes, name, unit)
            if axes is not figure.axes[0] and (legend := axes.get_legend()):
                legend.remove()  # once is enough
        figure.axes[0].set_ylabel(f"{_CURVES[name]} (nats per token)")
        return figure

    def _draw(self, axes: Axes, name: str, unit: str) -> None:
        what, many = _UNITS[unit]
        for label, run in zip(self.names, self.runs, strict=True):
            if points := run.losses(name):
                updates, values = zip(*points, strict=True)
                places = updates if what == "update" else run.spent(updates, what) / many
                axes.plot(places, values, ".-", label=label, markersize=4)
        finish_axes(axes, unit, log=True)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """Yield a table, a column a run, or lines where the columns would be narrow."""
        columns = Table("", *(Column(Text(name, overflow="fold")) for name in self.names))
        for name, cells in self.rows:
            columns.add_row(name, *(Text(cell, overflow="fold") for cell in cells))
        if options.max_width >= _COLUMN * len(columns.columns):
            yield columns
            return
        for name, cells in self.rows:
            yield Text(name, "bold", overflow="fold")
            yield from (Text(f"  {run}: {cell}", overflow="fold") for run, cell in zip(self.names, cells, strict=True))

    def _repr_html_(self) -> str:
        pictures = [
            (f"{label} by {unit}", as_svg(self._draw, name, unit))
            for name, label in _CURVES.items()
            if any(run.losses(name) for run in self.runs)
            for unit in _UNITS
        ]
        return table([(name, *cells) for name, cells in self.rows], ("", *self.names)) + figures(pictures)


def compare_runs(*runs: str | Path | Run) -> Comparison:
    """Put runs side by side.

    Args:
        runs: Folders of runs, ended or not, or what ``finetune`` returned.

    Raises:
        OutputError: A folder holds no run that this version can read.

    Example:
        >>> compare_runs("lora", "lora_plus").plot()
    """
    if not runs:
        raise ConfigError("there is nothing to compare: give the folders of runs")
    found = [run if isinstance(run, Run) else Run.load(run) for run in runs]
    told = [
        {name: plain(value) for name, value in settings_of(run.config).items()}
        | dict(summary(run))
        | {"outcome": run.outcome}
        for run in found
    ]
    rows: list[tuple[str, list[str]]] = []
    for name in dict.fromkeys(itertools.chain(*told)):
        cells = [each.get(name, "") for each in told]
        if name in _RESULTS or (name not in _UNTOLD and len(set(cells)) > 1):
            rows.append((name, cells))
    return Comparison(found, rows)


def check_save_path(config: CompareConfig) -> None:
    """Raise OutputError where the curves can't be saved, before anything is read."""
    if config.save_path is None:
        return
    path = Path(config.save_path)
    if path.suffix not in _FORMATS:
        raise OutputError(f"save_path {path} must end in {', '.join(_FORMATS)}")
    if path.is_dir():
        raise OutputError(f"save_path {path} is a folder: give a file in it")
    if path.exists() and not config.overwrite:
        raise OutputError(f"{path} is there already: give another --save-path, or --overwrite")


def save(comparison: Comparison, save_path: str) -> None:
    """Write a comparison as a page, or its validation curves (training curves without them) as a picture."""
    path = Path(save_path)
    if path.suffix == ".html":
        parts: Sequence[str] = (f"<h1>{escape(' / '.join(comparison.names))}</h1>", comparison._repr_html_())  # pyright: ignore[reportPrivateUsage]
        write_atomically(path, page("runs side by side", parts))
        return
    name = "valid_loss" if any(run.losses("valid_loss") for run in comparison.runs) else "loss"
    write_picture(comparison.plot(name), path)
