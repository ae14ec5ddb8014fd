"""Several runs side by side: loss curves, results, the settings that differ, and answers.

The curves are drawn over steps, tokens and minutes. The best value of each result is marked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

from ..errors import ConfigError, counted
from ..files import write_atomically
from ..files.page_path import check_save_path
from ..pages.charts import Chart, Curve, line_chart
from ..pages.pages import (
    AnswerCard,
    Headline,
    HTMLTable,
    Section,
    ShownAnswer,
    render_notebook,
    render_page,
)
from ..pages.transcript import chat_of
from ..python_messages import speak_keywords
from ..rich_display import RichDisplay
from ..settings import settings_of
from .history import Run
from .matplotlib_plots import Plot, finish_axes, label_y, loss_unit, write_picture
from .report import plain, summary
from .report_answers import kept_step, shown_answer

_LOSSES = ("validation loss", "training loss")  # need the same objective
_COUNTS = ("examples", "tokens", "supervised")
_HIDDEN = {"adapter_path", "resume", "overwrite", "rates"}  # about the folder, or repeated
_CURVES = {"valid_loss": "validation loss", "loss": "training loss"}
_MAX_NAMES = 4  # of settings, in the headline
_COLUMN_WIDTH = 20  # characters; if columns are narrower, lines are printed instead
SAVED_AS = (".html", ".png", ".svg")


def _have_same(runs: Sequence[Run], split: str) -> bool:
    """Return whether runs have the same examples in a split, as far as their histories know."""
    counts = {tuple(run.start[split][name] for name in _COUNTS) for run in runs}
    digests = {run.start[split].get("digest") for run in runs} - {None}
    return len(counts) == 1 and len(digests) <= 1


def _best_loss(run: Run) -> float | None:
    return run.verdict.after


def _exact_fraction(run: Run) -> float | None:
    exact = run.verdict.exact
    return None if exact is None else exact[1] / exact[2]


def _last_loss(run: Run) -> float | None:
    losses = [loss for _, loss in run.losses() if math.isfinite(loss)]
    return losses[-1] if losses else None


def _speed(run: Run) -> float | None:
    return run.verdict.tokens_per_second


def _peak_memory(run: Run) -> float | None:
    return max((value for _, value in run.losses("peak_memory_gb")), default=None)


# Names of results → the number to compare, and whether a higher one is better
_NUMBERS: Mapping[str, tuple[Callable[[Run], float | None], bool]] = {
    "validation loss": (_best_loss, False),
    "exact answers": (_exact_fraction, True),
    "training loss": (_last_loss, False),
    "speed": (_speed, True),
    "peak memory": (_peak_memory, False),
}
_RESULTS = ("outcome", "steps", *_NUMBERS, "spent")


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
    rows: list[tuple[str, list[str]]]  # a result or a setting that differs, and each run's text

    @property
    def best(self) -> dict[str, set[int]]:
        """The indices of the runs with the best value of each result that differs between runs."""
        best: dict[str, set[int]] = {}
        for name, (number_of, is_higher_better) in _NUMBERS.items():
            if name in self.not_comparable:
                continue
            values = {index: number_of(run) for index, run in enumerate(self.runs)}
            known = {index: value for index, value in values.items() if value is not None}
            if len(set(known.values())) > 1:
                wanted = max(known.values()) if is_higher_better else min(known.values())
                best[name] = {index for index, value in known.items() if value == wanted}
        return best

    @property
    def not_comparable(self) -> dict[str, str]:
        """The results that can't be compared → what differs between the runs."""
        first = self.runs[0]
        reasons: dict[str, str] = {}
        if not _have_same(self.runs, "valid"):
            reasons |= dict.fromkeys(("validation loss", "exact answers"), "validation examples")
        if not _have_same(self.runs, "train"):
            reasons |= {"training loss": "training examples"}
        if any(run.config.objective != first.config.objective for run in self.runs):
            reasons |= dict.fromkeys(_LOSSES, "objectives or their settings")
        return reasons

    def notes(self) -> list[str]:
        """Return a sentence for each reason why some of the shown results can't be compared."""
        reasons = self.not_comparable
        shown = [name for name, _ in self.rows if name in reasons]
        sentences: list[str] = []
        for reason in dict.fromkeys(reasons[name] for name in shown):
            names = " and ".join(name for name in shown if reasons[name] == reason)
            sentences.append(f"Do not compare {names}: the {reason} differ.")
        return sentences

    @property
    def names(self) -> list[str]:
        """The folders' names, or their whole paths if two names are the same."""
        short = [run.name for run in self.runs]
        if len(set(short)) == len(short):
            return short
        return [str(run.folder) for run in self.runs]

    def plot(self, name: str = "valid_loss") -> Any:
        """Return a matplotlib figure of "valid_loss" or "loss" over steps, tokens, minutes."""
        if name not in _CURVES:
            raise ConfigError(f"name is {name!r:.40}; allowed are {', '.join(_CURVES)}")
        figure = Plot(figsize=(10, 3.6), layout="constrained")
        panels = figure.subplots(1, len(_X_AXES), sharey=True)

        for axes, x_axis in zip(panels, _X_AXES, strict=True):
            self._draw(axes, name, x_axis)

        # One legend and one label serve all panels.
        for axes in panels[1:]:
            if legend := axes.get_legend():
                legend.remove()
        units = {loss_unit(run) for run in self.runs}
        unit = f" {units.pop()}" if len(units) == 1 else ""
        label_y(panels[0], _CURVES[name] + unit)
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
        is_wide = options.max_width >= _COLUMN_WIDTH * (1 + len(columns))
        best = self.best
        table = Table("", *columns)
        lines: list[Text] = []
        for number, (name, cells) in enumerate(self.rows):
            is_setting = name not in _RESULTS
            if is_setting and number and self.rows[number - 1][0] in _RESULTS:
                table.add_section()
            shown = self._styled(cells, best.get(name, set()))
            table.add_row(name, *shown)

            # A terminal that is too narrow for a table gets lines.
            lines.append(Text(name, "bold", overflow="fold"))
            for run, cell in zip(self.names, shown, strict=True):
                lines.append(Text(f"  {run}: ", overflow="fold").append_text(cell))

        if is_wide:
            yield table
        else:
            yield from lines
        if best:
            yield Text("* the best", "dim")
        for note in self.notes():
            yield Text(note, "dim")

    def _styled(self, cells: Sequence[str], best: set[int]) -> list[Text]:
        """Return cells as text, with the best ones marked."""
        texts: list[Text] = []
        for index, cell in enumerate(cells):
            is_best = index in best
            texts.append(
                Text(f"{cell} *" if is_best else cell, "bold" if is_best else "", overflow="fold")
            )
        return texts

    def sections(self) -> list[Section]:
        """Return the parts of an HTML page: curves, results, settings that differ, answers."""
        # One chart per curve and x axis; curves that no run has are left out.
        charts: list[Chart] = []
        for name, label in _CURVES.items():
            if not self._has(name):
                continue
            for x_axis in _X_AXES:
                caption = f"{label.capitalize()} by {x_axis.unit}"
                curves = self._curves(name, x_axis)
                charts.append(line_chart(caption, curves, x_axis.unit, log=True))

        # Results and settings are two tables, so that the results can be seen at a glance.
        head = ("", *self.names)
        results = [(name, *cells) for name, cells in self.rows if name in _RESULTS]
        settings = [(name, *cells) for name, cells in self.rows if name not in _RESULTS]
        cells = [(name, run + 1) for name, runs in self.best.items() for run in runs]
        found = [
            Section(charts=charts),
            Section(
                "Results",
                text=" ".join(self.notes()),
                table=HTMLTable(results, head, best=frozenset(cells)),
            ),
        ]
        if settings:
            found.append(Section("What differs", table=HTMLTable(settings, head)))
        cards = self._answers()
        if cards:
            found.append(Section("Answers side by side", cards=cards))
        return found

    def _answers(self) -> list[AnswerCard]:
        """Return the prompts that all runs share, with each run's answer."""
        prompts = [
            prompt
            for prompt in self.runs[0].start.get("prompts", [])
            if all(prompt in run.start.get("prompts", []) for run in self.runs)
        ]

        cards: list[AnswerCard] = []
        for prompt in prompts:
            expected = prompt["expected"]
            shown: list[ShownAnswer] = []
            if expected is not None:
                shown.append(shown_answer("expected", expected))
            for name, run in zip(self.names, self.runs, strict=True):
                answers: dict[int, list[str]] = dict(run.losses("answers"))
                if answers:
                    number = run.start["prompts"].index(prompt)
                    answer = answers[kept_step(run, answers)][number]
                    shown.append(shown_answer(name, answer, expected))
            cards.append(AnswerCard(chat_of(prompt["prompt"]), shown))
        return cards

    def headline(self) -> Headline:
        """Return the beginning of an HTML page: the runs, and which one is the best."""
        outcomes = {run.outcome for run in self.runs}
        state = outcomes.pop() if len(outcomes) == 1 else ""
        differing = [name for name, _ in self.rows if name not in _RESULTS]
        text = counted(len(self.runs), "run")
        if differing:
            text += f", which differ in {', '.join(differing[:_MAX_NAMES])}"
        if len(differing) > _MAX_NAMES:
            text += f" and {len(differing) - _MAX_NAMES} more"
        return Headline(" / ".join(self.names), state, text, self._lead())

    def _lead(self) -> str:
        """Return which runs have the lowest validation loss and the most exact answers."""
        sentences: list[str] = []
        best = self.best
        if "validation loss" in best:
            indices = sorted(best["validation loss"])
            loss = self.runs[indices[0]].verdict.after
            names = self._join_names(indices)
            sentences.append(f"The lowest validation loss, {loss:.4f}, is that of {names}.")
        if "exact answers" in best:
            indices = sorted(best["exact answers"])
            _, after, count = self.runs[indices[0]].verdict.exact or (0, 0, 0)
            names = self._join_names(indices)
            result = f"{after} of {count}"
            sentences.append(f"The most exact sample answers, {result}, are those of {names}.")
        return " ".join(sentences)

    def _join_names(self, indices: Sequence[int]) -> str:
        return " and ".join(self.names[index] for index in indices)

    @speak_keywords
    def save(self, save_path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write a page, or a picture of the validation curves (if none, the training curves).

        Args:
            save_path: The file; its suffix selects the format: .html, .png or .svg.
            overwrite: Replace an existing file.

        Raises:
            OutputError: The suffix is unknown, or the file exists or can't be written.
        """
        path = check_save_path(save_path, overwrite=overwrite, suffixes=SAVED_AS)
        if path.suffix == ".html":
            page = render_page("runs side by side", self.headline(), self.sections())
            write_atomically(path, page)
            return

        name = "valid_loss" if self._has("valid_loss") else "loss"
        write_picture(self.plot(name), path)

    def _has(self, name: str) -> bool:
        """Return whether any run has a curve of this name."""
        return any(run.losses(name) for run in self.runs)

    def _repr_html_(self) -> str:
        return render_notebook(self.sections(), self.headline())


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

    # Results that any run has come first, then the settings in which the runs differ.
    rows: list[tuple[str, list[str]]] = []
    for name in (*_RESULTS, *_names_of(facts)):
        cells = [each.get(name, "") for each in facts]
        is_result = name in _RESULTS and name not in dict(rows)
        differs = name not in _RESULTS and name not in _HIDDEN and len(set(cells)) > 1
        if differs or (is_result and any(cells)):
            rows.append((name, cells))
    return Comparison(loaded, rows)


def _facts_of(run: Run) -> dict[str, str]:
    """Return a run's settings and results as text."""
    settings = {name: plain(value) for name, value in settings_of(run.config).items()}
    found = run.verdict
    results = {"outcome": run.outcome}
    if found.exact is not None:
        before, after, count = found.exact
        results["exact answers"] = f"{before} before, {after} after, of {count}"
    if found.tokens_per_second is not None:
        results["speed"] = f"{found.tokens_per_second:,.0f} tokens/s"
    results["model"] = run.start["model"]  # without the size, to which adapters add
    return settings | dict(summary(run)) | results


def _names_of(facts: Sequence[dict[str, str]]) -> list[str]:
    """Return every name once, in the order of its first use."""
    names: dict[str, None] = {}
    for each in facts:
        names.update(dict.fromkeys(each))
    return list(names)
