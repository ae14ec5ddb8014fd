"""Several runs side by side: the settings that differ, results, and loss curves.

The curves are drawn over steps, tokens and minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

from ..config import CompareConfig
from ..errors import ConfigError, OutputError
from ..files import write_atomically
from ..rich_display import RichDisplay
from ..settings import settings_of
from .charts import Chart, Curve, line_chart
from .history import Run
from .pages import HTMLTable, Section, render_page, render_sections
from .plots import Plot, finish_axes, write_picture
from .report import plain, summary

_RESULTS = {"steps", "validation loss", "training loss", "spent", "peak memory", "outcome"}
_HIDDEN = {"adapter_path", "resume", "overwrite", "rates"}  # paths, or repeated by other settings
_CURVES = {"valid_loss": "validation loss", "loss": "training loss"}
_COLUMN_WIDTH = 20  # characters; if columns are narrower, lines are printed instead
_FORMATS = (".html", ".png", ".svg")


class _XAxis(NamedTuple):
    """What a curve's x axis counts."""

    unit: str
    spent: str | None  # the event key to add up; None for the steps themselves
    divisor: int  # the number of steps, tokens or seconds in one unit


_X_AXES = (
    _XAxis("steps", None, 1),
    _XAxis("tokens", "useful_tokens", 1),
    _XAxis("minutes", "seconds", 60),
)


@dataclass(frozen=True, repr=False)
class Comparison(RichDisplay):
    """The result of ``compare_runs``. ``print`` it, or show it in a notebook."""

    runs: list[Run]
    rows: list[tuple[str, list[str]]]  # a setting that differs or a result, and each run's text

    @property
    def names(self) -> list[str]:
        """The folders' names, or their whole paths if two names are the same."""
        short = [run.name for run in self.runs]
        if len(set(short)) == len(short):
            return short
        return [str(run.folder) for run in self.runs]

    def plot(self, name: str = "valid_loss") -> Any:
        """Return a matplotlib figure of "valid_loss" or "loss" over steps, tokens, minutes."""
        figure = Plot(figsize=(10, 3.6), layout="constrained")
        panels = figure.subplots(1, len(_X_AXES), sharey=True)

        for axes, x_axis in zip(panels, _X_AXES, strict=True):
            self._draw(axes, name, x_axis)

        # One legend and one label serve all panels.
        for axes in panels[1:]:
            if legend := axes.get_legend():
                legend.remove()
        panels[0].set_ylabel(f"{_CURVES[name]} (nats per token)")
        return figure

    def _draw(self, axes: Axes, name: str, x_axis: _XAxis) -> None:
        """Draw every run's curve."""
        for curve in self._curves(name, x_axis):
            x, y = zip(*curve.points, strict=True)
            axes.plot(x, y, ".-", label=curve.label, markersize=4)

        finish_axes(axes, x_axis.unit, log=True)

    def _curves(self, name: str, x_axis: _XAxis) -> list[Curve]:
        """Return the curve of every run that has one."""
        curves: list[Curve] = []
        for label, run in zip(self.names, self.runs, strict=True):
            points = run.losses(name)
            if points and x_axis.spent is not None:
                steps, values = zip(*points, strict=True)
                x = run.spent(steps, x_axis.spent) / x_axis.divisor
                points = list(zip(x.tolist(), values, strict=True))
            if points:
                curves.append(Curve(label, points))
        return curves

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """Yield a table with one column per run, or lines if the terminal is too narrow."""
        # Text keeps rich from reading names such as [a] as markup.
        columns = [Column(Text(name, overflow="fold")) for name in self.names]
        if options.max_width >= _COLUMN_WIDTH * (1 + len(columns)):
            table = Table("", *columns)
            for name, cells in self.rows:
                table.add_row(name, *(Text(cell, overflow="fold") for cell in cells))
            yield table
            return

        # The terminal is too narrow for a table.
        for name, cells in self.rows:
            yield Text(name, "bold", overflow="fold")
            for run, cell in zip(self.names, cells, strict=True):
                yield Text(f"  {run}: {cell}", overflow="fold")

    def sections(self) -> list[Section]:
        """Return the table and the curves as parts of an HTML page."""
        # One chart per curve and x axis; curves that no run has are left out.
        charts: list[Chart] = []
        for name, label in _CURVES.items():
            if not self._has(name):
                continue
            for x_axis in _X_AXES:
                caption = f"{label} by {x_axis.unit}"
                curves = self._curves(name, x_axis)
                charts.append(line_chart(caption, curves, x_axis.unit, log=True))

        rows = [(name, *cells) for name, cells in self.rows]
        return [Section(table=HTMLTable(rows, ("", *self.names)), charts=charts)]

    def save(self, path: Path) -> None:
        """Write a page, or a picture of the validation curves (if none, the training curves)."""
        if path.suffix == ".html":
            heading = " / ".join(self.names)
            write_atomically(path, render_page("runs side by side", heading, self.sections()))
            return

        name = "valid_loss" if self._has("valid_loss") else "loss"
        write_picture(self.plot(name), path)

    def _has(self, name: str) -> bool:
        """Return whether any run has a curve of this name."""
        return any(run.losses(name) for run in self.runs)

    def _repr_html_(self) -> str:
        return render_sections(self.sections())


def compare_runs(*runs: str | Path | Run) -> Comparison:
    """Compare runs side by side.

    Args:
        runs: Folders of runs, finished or not, or results of ``finetune``.

    Raises:
        ConfigError: No run is given.
        OutputError: A folder holds no run that this version can read.

    Example:
        >>> compare_runs("lora", "lora_plus").plot()
    """
    if not runs:
        raise ConfigError("there is nothing to compare: give the folders of runs")
    loaded = [run if isinstance(run, Run) else Run.load(run) for run in runs]
    facts = [_facts_of(run) for run in loaded]

    # Results are always shown; a setting only if the runs differ in it.
    rows: list[tuple[str, list[str]]] = []
    for name in _names_of(facts):
        cells = [each.get(name, "") for each in facts]
        differs = name not in _HIDDEN and len(set(cells)) > 1
        if name in _RESULTS or differs:
            rows.append((name, cells))
    return Comparison(loaded, rows)


def _facts_of(run: Run) -> dict[str, str]:
    """Return a run's settings and results as text."""
    settings = {name: plain(value) for name, value in settings_of(run.config).items()}
    return settings | dict(summary(run)) | {"outcome": run.outcome}


def _names_of(facts: Sequence[dict[str, str]]) -> list[str]:
    """Return every name once, in the order of its first use."""
    names: dict[str, None] = {}
    for each in facts:
        names.update(dict.fromkeys(each))
    return list(names)


def check_save_path(config: CompareConfig) -> None:
    """Check that the curves can be saved, before any run is read.

    Raises:
        OutputError: The suffix is unknown, or the file exists and ``overwrite`` is off.
    """
    if config.save_path is None:
        return

    path = Path(config.save_path)
    if path.suffix not in _FORMATS:
        raise OutputError(f"save_path {path} must end in {', '.join(_FORMATS)}")
    if path.is_dir():
        raise OutputError(f"save_path {path} is a folder: give a file in it")
    if path.exists() and not config.overwrite:
        raise OutputError(f"{path} exists already: give another --save-path, or --overwrite")


def save(comparison: Comparison, save_path: str) -> None:
    """Write a comparison to a file; the file's suffix selects the format."""
    comparison.save(Path(save_path))
