"""The result of a sweep: which settings won, by how much, and how to show it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Column, Table

from ..command_config import SweepConfig
from ..errors import counted
from ..pages.pages import render_notebook
from ..rich_display import RichDisplay
from ..runs.advice import remedy_for_fall
from ..runs.matplotlib_plots import Plot
from ..runs.state import Event, Outcome
from ..runs.verdict import fall_of_chosen, percent
from ..userpaths import shell_word
from .heatmap import Heatmap
from .trial import Point, Trial

PREFERRED = "chosen answers preferred"  # the name of a trial's accuracy if answers are compared
SETTINGS, BEST = "sweep.yaml", "best.yaml"  # in the sweep's folder

_FEWEST_STEPS = 20  # of a full run; after fewer, most rates have not yet shown what they do

# Student's t for 1, 2, ... degrees of freedom, one-sided, at 5%.
_STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89)


@dataclass(repr=False)
class Sweep(RichDisplay):
    """The result of a sweep. ``print`` it, or show it in a notebook."""

    config: SweepConfig
    default: Point  # the baseline to beat
    trials: list[Trial] = field(default_factory=list)  # in the order they were run
    outcome: Outcome = "interrupted"  # or "out of time", which can be resumed; or "finished"
    before: Event = field(default_factory=dict[str, Any])  # the scores before training

    def finalists(self) -> dict[Point, list[float]]:
        """Return each point of the last round → its losses by seed, the best point first.

        Points that diverged with any seed are left out. While the round is running, the losses
        are those of the seeds so far.
        """
        # Only the last round trains for all steps. Its losses are in the order of the seeds.
        losses: dict[Point, list[float]] = {}
        for trial in sorted(self.trials, key=lambda trial: trial.seed):
            if trial.steps == self.config.iters:
                losses.setdefault(trial.point, []).append(trial.loss)

        finite = {point: found for point, found in losses.items() if np.isfinite(found).all()}
        return dict(sorted(finite.items(), key=lambda item: fmean(item[1])))

    def preferred(self, point: Point) -> str:
        """Return how often the chosen answer is preferred after the full runs of a point."""
        found: list[float] = []
        for trial in self.trials:
            is_full = trial.steps == self.config.iters and trial.point == point
            if is_full and trial.accuracy is not None:
                found.append(trial.accuracy)
        return percent(fmean(found)) if found else ""

    @property
    def gain(self) -> tuple[float, float] | None:
        """The baseline's loss minus the best finalist's loss, and the noise of this difference.

        Losses are compared seed by seed, because a seed's batches are the same for all points. The
        noise is the standard error of the differences times Student's t. Without a real difference,
        the gain exceeds the noise in one of twenty sweeps. None if there are fewer than two seeds.
        """
        # The best finalist comes first.
        finalists = self.finalists()
        best = next(iter(finalists.values()), [])
        default = finalists.get(self.default, [])
        differences = [old - new for old, new in zip(default, best, strict=False)]
        n = len(differences)
        if n < 2:
            return None

        t = _STUDENT[min(n - 1, len(_STUDENT)) - 1]
        return fmean(differences), stdev(differences) / math.sqrt(n) * t

    @property
    def best(self) -> Point:
        """The point to train with: the best finalist if it beats the baseline beyond the noise."""
        finalists = list(self.finalists())
        if not finalists:
            return self.default

        # With one seed the noise is unknown, and the lower loss wins.
        if self.gain is not None:
            gain, noise = self.gain
            if gain <= noise:
                return self.default
        return finalists[0]

    @property
    def settings(self) -> dict[str, Any]:
        """The best point as settings: ``finetune(model, tokenizer, **sweep.settings)``."""
        return asdict(self.best)

    def verdict(self) -> str:
        """Return one line: what to train with, and why."""
        finalists = self.finalists()
        if not finalists:
            finished = self.outcome == "finished"
            return "every full trial diverged" if finished else "no full trial has ended yet"

        # Cases without a comparison to the baseline.
        best, losses = next(iter(finalists.items()))
        if best == self.default:
            found = _with_noise(losses)
            return f"train with the defaults: no trial had a lower loss ({best}: {found})"
        if self.default not in finalists:
            found = _with_noise(losses)
            return f"train with {best} ({found}): the defaults diverged ({self.default})"
        if self.gain is None:
            return f"train with {best} ({losses[0]:.4f}); one seed does not show the noise"

        # The gain must exceed the noise.
        gain, noise = self.gain
        if gain <= noise:
            return (
                f"train with the defaults: {best} is {gain:.4f} better, which is within the noise"
                f" of {noise:.4f}"
            )
        return (
            f"train with {best}: its loss is {gain:.4f} below that of the defaults "
            f"({self.default}); the noise is {noise:.4f}"
        )

    def fall_of_chosen(self) -> str | None:
        """Return a clause saying that the best point made the chosen answers less likely, or None.

        Such a point may have the lowest loss of an objective that compares answers.
        """
        for trial in self.trials:
            if trial.point == self.best and trial.steps == self.config.iters:
                fall = fall_of_chosen([self.before, *trial.history])
                if fall is not None:
                    return fall
        return None

    def advice(self) -> list[str]:
        """Return lines on what to try next: more steps, lower rates, or values beyond the grid."""
        lines: list[str] = []
        if self.finalists() and self.config.iters < _FEWEST_STEPS:
            steps = counted(self.config.iters, "step")
            lines.append(
                f"runs of {steps} are too short to compare rates: give iters the steps that you"
                f" mean to train, and at least {_FEWEST_STEPS}"
            )
        if (fall := self.fall_of_chosen()) is not None:
            remedy = remedy_for_fall(self.config.objective.objective)
            lines.append(f"with {self.best}, {fall}: {remedy}")
        for name, tried in self._values_at_an_edge().items():
            best = getattr(self.best, name)
            end, better = ("lowest", "lower") if best == tried[0] else ("highest", "higher")
            lines.append(
                f"the best {name}, {best:.3g}, is the {end} one tried, so a {better} one may be"
                " better still"
            )
        return lines

    def widen_command(self) -> str | None:
        """Return the command that also tries values beyond the edges where the best values lie.

        It is None if no best value lies at an edge. The ratio of a new value to the edge is that of
        the edge to its neighbour.
        """
        command = resume_sweep_command(self.config)
        edges = self._values_at_an_edge()
        for name, tried in edges.items():
            edge, neighbour = tried[:2]
            if getattr(self.best, name) == tried[-1]:
                neighbour, edge = tried[-2:]

            # The values that were tried are given exactly, so that their trials are used again.
            beyond = float(f"{edge**2 / neighbour:.3g}")
            values = sorted([beyond, *tried])
            words = " ".join(str(value).removesuffix(".0") for value in values)
            command += f" --{name.replace('_', '-')}s {words}"
        return command if edges else None

    def _values_at_an_edge(self) -> dict[str, list[float]]:
        """Return the settings whose best value is the lowest or the highest → all their values."""
        edges: dict[str, list[float]] = {}
        # If a point only seems better than the defaults, the trials do not tell its values apart.
        if next(iter(self.finalists()), None) != self.best:
            return edges
        for name in ("learning_rate", "lr_ratio"):
            tried = sorted({getattr(trial.point, name) for trial in self.trials})

            # A setting with only one value has no edge. If the best point makes the chosen answers
            # less likely, higher values would do so even more.
            best = getattr(self.best, name)
            at_top = best == tried[-1] and self.fall_of_chosen() is None
            if len(tried) > 1 and (best == tried[0] or at_top):
                edges[name] = tried
        return edges

    def cost(self) -> str:
        """Return one line about the amount of training."""
        steps = sum(trial.done for trial in self.trials)
        minutes = sum(trial.seconds for trial in self.trials) / 60
        cut = sum(not math.isfinite(trial.loss) for trial in self.trials)
        runs = steps / self.config.iters
        return (
            f"{counted(len(self.trials), 'trial')}, {cut} of them cut; {counted(steps, 'step')},"
            f" as many as {runs:.1f} full runs; {minutes:.1f} minutes"
        )

    def heatmaps(self) -> list[Heatmap]:
        """Return the first round's losses over (eta, lambda), one map per rank and alpha."""
        first = min((trial.steps for trial in self.trials), default=0)
        losses: dict[Point, float] = {}
        for trial in self.trials:
            if trial.steps == first and trial.seed == self.config.seed:
                losses[trial.point] = trial.loss

        # One map per pair of rank and alpha.
        maps: list[Heatmap] = []
        for rank, alpha in sorted({(point.rank, point.alpha) for point in losses}):
            title = f"validation loss after {counted(first, 'step')}, rank {rank}, alpha {alpha:g}"
            here = {p: loss for p, loss in losses.items() if (p.rank, p.alpha) == (rank, alpha)}
            maps.append(self._heatmap(title, here))
        return maps

    def _heatmap(self, title: str, losses: Mapping[Point, float]) -> Heatmap:
        """Return the map of points that have the same rank and alpha."""
        x = tuple(sorted({point.learning_rate for point in losses}))
        y = tuple(sorted({point.lr_ratio for point in losses}))
        cells = {point: (y.index(point.lr_ratio), x.index(point.learning_rate)) for point in losses}

        # Combinations that were not tried stay NaN.
        grid = np.full((len(y), len(x)), math.nan)
        for point, cell in cells.items():
            grid[cell] = losses[point]

        # Before the sweep has finished, the chosen point may still change.
        marks: dict[str, tuple[int, int]] = {}
        if self.default in cells:
            marks["default"] = cells[self.default]
        if self.outcome == "finished" and self.best in cells:
            marks["chosen"] = cells[self.best]
        return Heatmap(title, "eta", "lambda", x, y, grid, marks)

    def plot(self) -> Figure:
        """Return the heat maps as a figure."""
        maps = self.heatmaps()
        figure = Plot(figsize=(5.5 * len(maps), 3.5), layout="constrained")
        panels = figure.subplots(1, len(maps), squeeze=False)[0]

        # Place the legend next to the map, so that it hides no cell.
        for axes, heatmap in zip(panels, maps, strict=True):
            heatmap.draw(axes)
            if heatmap.marks:
                axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), facecolor="gray")
        return figure

    def __rich__(self) -> Group:
        """Return the heat maps, the last round, the verdict and the cost."""
        names = ["eta", "lambda", "rank", "alpha", "validation loss"]
        has_preferences = self.config.objective.has_preferences
        if has_preferences:
            names.append(PREFERRED)
        table = Table(*(Column(name, justify="right") for name in names), "")
        for point, losses in self.finalists().items():
            numbers = [f"{value:.3g}" for value in asdict(point).values()]
            numbers.append(_with_noise(losses))
            if has_preferences:
                numbers.append(self.preferred(point))
            remarks = ["default"] if point == self.default else []
            remarks += ["chosen"] if self.outcome == "finished" and point == self.best else []
            table.add_row(*numbers, ", ".join(remarks))

        title = f"the last round, after {counted(self.config.iters, 'step')}"
        lines = [self.verdict(), *self.advice(), self.cost()]
        if wider := self.widen_command():
            lines.append(f"wider: {wider}")
        return Group(*self.heatmaps(), title, table, *lines)

    def _repr_html_(self) -> str:
        from .sweep_page import sweep_headline, sweep_sections

        return render_notebook(sweep_sections(self), sweep_headline(self))


def resume_sweep_command(config: SweepConfig) -> str:
    """Return the command that continues a sweep, ready to paste."""
    settings = shell_word(Path(config.adapter_path) / SETTINGS)
    return f"mlx_loraplus.sweep -c {settings} --resume"


def train_best_command(config: SweepConfig) -> str:
    """Return the command that trains with the settings that a sweep found, ready to paste."""
    settings = shell_word(Path(config.adapter_path) / BEST)
    return f"mlx_loraplus.train -c {settings}"


def _with_noise(losses: Sequence[float]) -> str:
    """Return the mean of losses, with their standard deviation if there are several."""
    spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{fmean(losses):.4f}{spread}"
