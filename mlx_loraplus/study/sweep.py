"""Find eta and lambda, and rank and alpha if asked, for one model and its rows, by successive halving.

Round by round the trials that did best go on, a third of them, to runs three times as long. Every trial is a whole run
with its own warm-up and schedule, only shorter, from a new adapter on the same base and on the same batches. The last
round's few are trained with several seeds beside the settings they have to beat. A trial that diverges is cut.
"""

import itertools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import mlx.nn as nn
import numpy as np
import yaml
from matplotlib.figure import Figure
from mlx_lm.tokenizer_utils import TokenizerWrapper
from pydantic import TypeAdapter
from rich.console import Group
from rich.table import Column, Table

from ..errors import ConfigError, DataError, OutputError
from ..limits import check_examples, limits_of
from ..places import locked, read_bounded, write_atomically
from ..planning import settle_batch, settle_length
from ..settings import configure, settings_of
from ..shown import Shown
from ..training.checkpoint import model_fingerprint
from ..training.loop import Outcome, score
from ..training.plots import Plot, write_picture
from ..training.progress import Tell, quiet
from ..training.run import load_examples, named
from ..training.split import split_model
from .config import SweepConfig
from .heatmap import Heatmap
from .trial import Point, Trial, run_trial

SETTINGS, TRIALS, PICTURE, BEST = "sweep.yaml", "trials.jsonl", "heatmap.png", "best.yaml"
CUT = 3
# What a sweep may change when it goes on: how it searches, names of places, and what every trial's line says anyway.
FREE = {
    "model", "data", "adapter_path", "learning_rates", "lr_ratios", "ranks", "alphas", "rounds", "seeds", "max_minutes",
    "resume", "overwrite", "learning_rate", "lr_ratio", "rank", "alpha",
}  # fmt: skip
# Student's t that one difference of means in twenty exceeds by chance, for 1, 2, ... degrees of freedom.
_STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89)


class _Stopped(Exception):  # noqa: N818  it is no error
    """Someone asked to stop, or the time is over."""


@dataclass(repr=False)
class Sweep(Shown):
    """What a sweep found. ``print`` it, or show it in a notebook."""

    config: SweepConfig
    default: Point  # what it had to beat
    trials: list[Trial] = field(default_factory=list)  # in the order they were made
    outcome: Outcome = "interrupted"  # or "out of time": ``resume`` goes on; or "finished"

    def finalists(self) -> dict[Point, list[float]]:
        """Return each point of the last round → its losses by seed, the best first; those that diverged are left out.

        Until all seeds are there, those that are.
        """
        losses: dict[Point, list[float]] = {}
        for trial in sorted(self.trials, key=lambda trial: trial.seed):
            if trial.updates == self.config.iters:
                losses.setdefault(trial.point, []).append(trial.loss)
        finite = {point: found for point, found in losses.items() if all(map(math.isfinite, found))}
        return dict(sorted(finite.items(), key=lambda item: fmean(item[1])))

    @property
    def gain(self) -> tuple[float, float] | None:
        """By how much the best finalist's loss is below the default's, and what of it may be noise; None if unknown.

        Differences are taken seed by seed: a seed's batches are the same for all. The noise is their standard error
        times Student's t, which chance alone exceeds once in twenty times.
        """
        found = self.finalists()
        best = next(iter(found.values()), [])
        differences = [old - new for old, new in zip(found.get(self.default, []), best, strict=False)]
        if (n := len(differences)) < 2:
            return None
        noise = stdev(differences) / math.sqrt(n) * _STUDENT[min(n - 1, len(_STUDENT)) - 1]
        return fmean(differences), noise

    @property
    def best(self) -> Point:
        """The point to train with: the best finalist, or the default where it is not beaten beyond the noise."""
        found = list(self.finalists())
        if not found or (self.gain is not None and self.gain[0] <= self.gain[1]):
            return self.default
        return found[0]

    @property
    def settings(self) -> dict[str, Any]:
        """The best point as settings: ``finetune(model, tokenizer, **sweep.settings)``."""
        return asdict(self.best)

    def verdict(self) -> str:
        """Say in a line what to train with, and why."""
        found = self.finalists()
        if not found:
            return "no trial has ended whole yet" if self.outcome != "finished" else "every whole trial diverged"
        best, losses = next(iter(found.items()))
        if best == self.default:
            return f"the defaults are fine: no trial had a lower loss ({best}: {_with_noise(losses)})"
        if self.default not in found:
            return f"train with {best} ({_with_noise(losses)}): the defaults diverged ({self.default})"
        if self.gain is None:
            return f"train with {best} ({losses[0]:.4f}); the noise is not known from one seed"
        gain, noise = self.gain
        if gain <= noise:
            return f"the defaults are fine: {best} is {gain:.4f} better, which is within the noise of {noise:.4f}"
        return f"train with {best}: {gain:.4f} below the defaults' loss ({self.default}), the noise being {noise:.4f}"

    def edges(self) -> list[str]:
        """Say where the best point is the last of the grid: beyond may be better."""
        lines = []
        for name, flag in (("learning_rate", "--learning-rates"), ("lr_ratio", "--lr-ratios")):
            tried, best = {getattr(trial.point, name) for trial in self.trials}, getattr(self.best, name)
            if len(tried) > 1 and best in (min(tried), max(tried)):
                lines.append(f"{name} {best:.3g} is at the edge of what was tried: --resume with wider {flag}")
        return lines

    def cost(self) -> str:
        """Say what it took."""
        updates, seconds = sum(trial.done for trial in self.trials), sum(trial.seconds for trial in self.trials)
        cut = sum(not math.isfinite(trial.loss) for trial in self.trials)
        return (
            f"{len(self.trials)} trials, {cut} of them cut; {updates:,} updates, as many as "
            f"{updates / self.config.iters:.1f} whole runs; {seconds / 60:.1f} minutes"
        )

    def heatmaps(self) -> list[Heatmap]:
        """Return the first round's losses over (eta, lambda), a map for each rank and alpha."""
        first = min((trial.updates for trial in self.trials), default=0)
        losses = {t.point: t.loss for t in self.trials if t.updates == first and t.seed == self.config.seed}
        maps = []
        for rank, alpha in sorted({(point.rank, point.alpha) for point in losses}):
            here = [point for point in losses if (point.rank, point.alpha) == (rank, alpha)]
            x = tuple(sorted({point.learning_rate for point in here}))
            y = tuple(sorted({point.lr_ratio for point in here}))
            grid = np.array([[losses.get(Point(eta, ratio, rank, alpha), math.nan) for eta in x] for ratio in y])
            named = [("default", self.default)] + [("best", self.best)] * (self.outcome == "finished")
            marks = {name: (y.index(p.lr_ratio), x.index(p.learning_rate)) for name, p in named if p in here}
            title = f"validation loss after {first} updates, rank {rank}, alpha {alpha:g}"
            maps.append(Heatmap(title, "eta", "lambda", x, y, grid, marks))
        return maps

    def plot(self) -> Figure:
        """Return the heat maps as a figure."""
        maps = self.heatmaps()
        figure = Plot(figsize=(5.5 * len(maps), 3.5), layout="constrained")
        for axes, heatmap in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
            heatmap.draw(axes)
            if heatmap.marks:
                axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), facecolor="gray")
        return figure

    def __rich__(self) -> Group:
        """Return heat maps, the last round, the verdict and the cost."""
        names = ("eta", "lambda", "rank", "alpha", "validation loss")
        table = Table(*(Column(name, justify="right") for name in names), "")
        for point, losses in self.finalists().items():
            numbers = [f"{value:.3g}" for value in asdict(point).values()]
            table.add_row(*numbers, _with_noise(losses), "default" if point == self.default else "")
        title = f"the last round, after {self.config.iters} updates"
        return Group(*self.heatmaps(), title, table, self.verdict(), *self.edges(), self.cost())


def sweep_rates(model: nn.Module, tokenizer: TokenizerWrapper, /, *, tell: Tell = quiet, **settings: Any) -> Sweep:
    """Find the rates that suit ``model`` and the rows of ``data``; the model is left as it was.

    Args:
        model: From ``load``, without adapters.
        tokenizer: From ``load``.
        tell: Called with each line a terminal would show, e.g. ``print``; silent by default.
        settings: Any setting of ``SweepConfig``, e.g. ``data="my_folder", learning_rates=(1e-4, 1e-3), iters=100``.

    Raises:
        ConfigError: A setting that is unknown or not allowed, or no trial of a round that did not diverge.
        DataError: Rows that can't be trained on, or none to validate on.
        OutputError: ``adapter_path`` holds another sweep, or can't be written.

    Example:
        >>> sweep = sweep_rates(model, tokenizer, data="my_folder", iters=100)
        >>> run = finetune(model, tokenizer, data="my_folder", **sweep.settings)
    """
    config = configure(SweepConfig, named(model, settings))
    run = settle_length(config.run_config(), model, tell)
    folder = Path(config.adapter_path)
    check_sweep_folder(config)
    train_examples, valid_examples = load_examples(run, tokenizer, tell).values()
    check_examples(limits_of(model), {"train": train_examples, "valid": valid_examples}, tokenizer, tell)
    if not len(valid_examples):
        raise DataError("a sweep needs validation rows: add a valid file, or --valid-split")
    chosen = np.random.default_rng(config.seed).permutation(len(valid_examples))[: config.valid_rows]
    valid_examples = valid_examples.take(np.sort(chosen))
    run = settle_batch(run, model, int(train_examples.lengths.max()), tell)
    config = replace(config, data=run.data)
    untrained = score(model, split_model(model), valid_examples, config.data.batch_size).loss
    identity = {
        "settings": {name: value for name, value in settings_of(config).items() if name not in FREE},
        "model": model_fingerprint(model),
        "rows": f"{train_examples.fingerprint()} {valid_examples.fingerprint()}",
    }
    default = Point.of(run)
    deadline = time.perf_counter() + 60 * config.max_minutes if config.max_minutes else math.inf
    with locked(folder):
        sweep = Sweep(config, default, _start_folder(config, identity))
        points = _grid(config, default)
        *early, (finals, whole) = rounds = _rounds(config, len(points))
        total = sum(count * updates for count, updates in rounds)
        plan = "".join(f"{count} trials of {updates}, " for count, updates in early) + f"up to {finals} of {whole}"
        tell(f"sweep: {plan}: up to {total:,} updates, as many as {total / whole:.1f} whole runs")
        tell(f"sweep: before training the validation loss is {untrained:.4f}")
        if sweep.trials:
            tell(f"resume: {len(sweep.trials)} trials are there already")

        def loss_of(point: Point, updates: int, seed: int) -> float:
            for trial in sweep.trials:
                if (trial.point, trial.updates, trial.seed) == (point, updates, seed):
                    return trial.loss
            left = (deadline - time.perf_counter()) / 60
            if left <= 0:
                raise _Stopped("out of time")
            changes: dict[str, Any] = asdict(point) | {
                "iters": updates, "seed": seed, "max_minutes": left if config.max_minutes else None,
                "warmup": round(config.optimizer.warmup * updates / config.iters),
                "steps_per_report": max(1, updates // 10),
            }  # fmt: skip
            run = config.run_config(**changes)
            trial, outcome = run_trial(model, run, train_examples, valid_examples, untrained=untrained)
            if outcome != "finished":
                raise _Stopped(outcome)
            sweep.trials.append(trial)
            _write_trials(folder, identity, sweep.trials)
            found = f"{trial.loss:.4f}" if math.isfinite(trial.loss) else f"diverged, cut at update {trial.done}"
            tell(f"trial {len(sweep.trials)}: {point}, {updates} updates, seed {seed}: {found} ({trial.seconds:.0f} s)")
            if len(sweep.trials) == 1:
                tell(f"sweep: at this pace up to {total * trial.seconds / max(1, trial.done) / 60:.0f} minutes in all")
            return trial.loss

        try:
            for _, updates in early:
                losses = {point: loss_of(point, updates, config.seed) for point in points}
                finite = [point for point in points if math.isfinite(losses[point])]
                if not finite:
                    raise ConfigError(f"all trials of {updates} updates diverged: give lower --learning-rates")
                points = sorted(finite, key=lambda point: losses[point])[: -(-len(points) // CUT)]
            for seed in range(config.seed, config.seed + config.seeds):
                for point in dict.fromkeys([*points, default]):
                    loss_of(point, config.iters, seed)
            sweep.outcome = "finished"
        except _Stopped as stopped:
            sweep.outcome = stopped.args[0]
        _write_findings(sweep)
    return sweep


def check_sweep_folder(config: SweepConfig) -> None:
    """Refuse a folder that can't be used, before anything slow has happened.

    Raises:
        OutputError: ``adapter_path`` holds a sweep, or files of the names that one writes, and neither ``overwrite``
            nor ``resume`` is on; or no sweep, and ``resume`` is on; or it is a file.
    """
    folder = Path(config.adapter_path)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"adapter_path {folder} is a file: give a folder")
    held = [name for name in (TRIALS, SETTINGS, PICTURE, BEST) if os.path.lexists(folder / name)]
    for name in held:
        if (folder / name).is_dir():
            raise OutputError(f"{folder / name} is a folder, where a sweep writes a file: give another --adapter-path")
    if config.resume and TRIALS not in held:
        raise OutputError(f"{folder} holds no sweep to go on with: give its --adapter-path, or leave --resume off")
    if held and not (config.resume or config.overwrite):
        another = "--overwrite replaces it, or give another --adapter-path"
        if TRIALS in held:
            raise OutputError(f"{folder} holds a sweep already: --resume goes on with it, {another}")
        raise OutputError(f"{folder} holds {', '.join(held)}, which no sweep there has written: {another}")


def _start_folder(config: SweepConfig, identity: Mapping[str, Any]) -> list[Trial]:
    """Write the settings, and return the trials to go on from.

    Raises:
        ConfigError: They are of another model, of other rows, or made with other settings.
    """
    folder = Path(config.adapter_path)
    trials: list[Trial] = []
    if config.resume:
        try:
            first, *lines = map(json.loads, read_bounded(folder / TRIALS, 1 << 30).splitlines())
            for line in lines:
                line["loss"] = math.inf if line["loss"] is None else line["loss"]
            trials = TypeAdapter(list[Trial]).validate_python(lines)
            then = first["settings"]
            differ = [name for name, value in identity["settings"].items() if then.get(name) != value]
            differ += [name for name in ("model", "rows") if first[name] != identity[name]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OutputError(f"{folder / TRIALS} can't be read ({reason}): start anew with --overwrite") from None
        if differ:
            raise ConfigError(f"can't go on with {folder}: {', '.join(differ)} differ; give another --adapter-path")
    else:
        for name in (PICTURE, BEST):
            (folder / name).unlink(missing_ok=True)
    settings = {name: value for name, value in settings_of(config).items() if name not in ("resume", "overwrite")}
    write_atomically(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False).encode())
    _write_trials(folder, identity, trials)
    return trials


def _write_trials(folder: Path, identity: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    lines = [identity, *(asdict(t) | {"loss": t.loss if math.isfinite(t.loss) else None} for t in trials)]
    write_atomically(folder / TRIALS, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _write_findings(sweep: Sweep) -> None:
    """Write the picture, and the settings to train with once they are known."""
    folder = Path(sweep.config.adapter_path)
    if sweep.trials:
        write_picture(sweep.plot(), folder / PICTURE)
    if sweep.outcome == "finished":
        changes = {"adapter_path": "adapters", "resume": False, "overwrite": False, "max_minutes": None}
        run = sweep.config.run_config(**sweep.settings, **changes)
        write_atomically(folder / BEST, yaml.safe_dump(settings_of(run), sort_keys=False).encode())


def _grid(config: SweepConfig, default: Point) -> list[Point]:
    rates = config.learning_rates or [default.learning_rate * factor for factor in (0.25, 1, 4, 16)]
    ranks, alphas = config.ranks or (default.rank,), config.alphas or (default.alpha,)
    points = [Point(*values) for values in itertools.product(rates, config.lr_ratios, ranks, alphas)]
    return list(dict.fromkeys(points))


def _rounds(config: SweepConfig, trials: int) -> list[tuple[int, int]]:
    """Return how many trials a round has, and how many updates each; of the last, with its seeds, as many as may be."""
    rounds: list[tuple[int, int]] = []
    for left in reversed(range(config.rounds)):
        count = trials if left else (trials + 1) * config.seeds  # the default may be one of them
        rounds.append((count, max(1, round(config.iters / CUT**left))))
        trials = -(-trials // CUT)
    return rounds


def _with_noise(losses: Sequence[float]) -> str:
    spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{fmean(losses):.4f}{spread}"
