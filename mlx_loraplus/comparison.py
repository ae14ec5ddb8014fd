"""Runs side by side: the settings that differ, what came of each, and their curves by updates, tokens and minutes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from .config import CompareConfig
from .errors import ConfigError, OutputError
from .places import write_atomically
from .settings import settings_of
from .training.history import Run
from .training.plots import Curve, comparison_figure, comparison_pictures
from .training.report import figures, page, plain, summary, table

_PLACES = {"adapter_path", "resume", "overwrite"}
_CURVES = {"valid_loss": "validation loss", "loss": "training loss"}
_TOLD = ("train", "valid", "adapter", "length", "memory")  # of the card, if the runs differ in it
_COLUMN = 20  # characters
_FORMATS = (".html", ".png", ".svg")


@dataclass(frozen=True, repr=False)
class Comparison:
    """What ``compare_runs`` found. ``print`` it, or show it in a notebook."""

    runs: list[Run]
    rows: list[tuple[str, list[str]]]  # a setting that differs or a result, and the text of each run

    @property
    def names(self) -> list[str]:
        """The runs' folders, by their last part where that tells them apart."""
        short = [run.folder.name for run in self.runs]
        return short if len(set(short)) == len(short) else [str(run.folder) for run in self.runs]

    def curves(self, name: str) -> list[Curve]:
        """Return each run's ``name``, "valid_loss" or "loss", with the updates, tokens and minutes of its values."""
        curves: list[Curve] = []
        for label, run in zip(self.names, self.runs, strict=True):
            if points := run.losses(name):
                updates, values = zip(*points, strict=True)
                minutes = (run.spent(updates, "seconds") / 60).tolist()
                tokens = run.spent(updates, "useful_tokens").tolist()
                curves.append((label, {"updates": updates, "tokens": tokens, "minutes": minutes}, values))
        return curves

    def plot(self, name: str = "valid_loss") -> Any:
        """Return a matplotlib figure of the runs' "valid_loss" or "loss" by updates, tokens and minutes."""
        return comparison_figure(self.curves(name), f"{_CURVES[name]} (nats per token)")

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """Yield a table, a column a run, or lines where the columns would be narrow."""
        columns = Table("", *self.names)
        for name, cells in self.rows:
            columns.add_row(name, *(Text(cell, overflow="fold") for cell in cells))
        if options.max_width >= _COLUMN * len(columns.columns):
            yield columns
            return
        for name, cells in self.rows:
            yield Text(name, "bold", overflow="fold")
            yield from (Text(f"  {run}: {cell}", overflow="fold") for run, cell in zip(self.names, cells, strict=True))

    def __str__(self) -> str:
        """Return the table as text."""
        console = Console(width=120, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        found = ((label, self.curves(name)) for name, label in _CURVES.items())
        pictures = [picture for label, curves in found if curves for picture in comparison_pictures(curves, label)]
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
    settings = [{name: plain(value) for name, value in settings_of(run.config).items()} for run in found]
    rows = [
        (name, cells)
        for name in settings[0]
        if name not in _PLACES and len(set(cells := [each[name] for each in settings])) > 1
    ]
    results = [dict(summary(run)) | {"outcome": run.outcome} for run in found]
    names = dict.fromkeys(name for each in results for name in each)
    for name in names:
        cells = [each.get(name, "") for each in results]
        if name not in ("model", "rates") and (name not in _TOLD or len(set(cells)) > 1):
            rows.append((name, cells))
    return Comparison(found, rows)


def check_save_path(config: CompareConfig) -> None:
    """Raise OutputError where the curves can't be saved, before anything is read."""
    if config.save_path is None:
        return
    path = Path(config.save_path)
    if path.suffix not in _FORMATS:
        raise OutputError(f"save_path {path} must end in {', '.join(_FORMATS)}")
    if path.is_dir() or (path.exists() and not config.overwrite):
        raise OutputError(f"{path} is there already: give another --save-path, or --overwrite")


def save(comparison: Comparison, save_path: str) -> None:
    """Write a comparison as a page, or its validation curves (training curves without them) as a picture."""
    path = Path(save_path)
    if path.suffix == ".html":
        parts: Sequence[str] = (f"<h1>{escape(' / '.join(comparison.names))}</h1>", comparison._repr_html_())  # pyright: ignore[reportPrivateUsage]
        write_atomically(path, page("runs side by side", parts))
        return
    name = "valid_loss" if any(run.losses("valid_loss") for run in comparison.runs) else "loss"
    picture = io.BytesIO()
    comparison.plot(name).savefig(picture, format=path.suffix[1:])
    write_atomically(path, picture.getvalue())
