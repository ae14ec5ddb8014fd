"""Find eta and lambda for one model and its data by successive halving.

Rank and alpha can be searched too. The settings of the best third of the trials enter the next
round, whose runs are three times as long. Every trial is a complete run: it has its own warm-up and
schedule, and starts with new adapters, or those of ``resume_adapter_file``, on the same base and
the same batches. The last round trains its few trials and the baseline with several seeds. A trial
that diverges is cut: it stops at that step.
"""

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.base_layers import fingerprint
from ..adapters.storage import load_adapter
from ..adapters.trainable import adapter_arrays, find_adapters
from ..command_config import SweepConfig
from ..config import TrainConfig
from ..data.dataset import Examples
from ..data.first_rows import lacks_validation
from ..data.load_data import load_examples
from ..data.model_limits import check_examples, limits_of
from ..data.python_data import store_data
from ..data.sources import SplitName
from ..errors import ConfigError, DataError, DeviceError, counted
from ..failures import failures_in_one_line
from ..files import locked
from ..kernels.trunk_and_head import find_trunk_and_head
from ..keyword_types import SweepOptions
from ..memory.run_sizes import resolve_batch, resolve_length
from ..migration import translate
from ..models.loading import shared_copy
from ..runs.history import Run
from ..runs.progress import Log, no_log
from ..settings import configure, setting_names, settings_of
from ..training.distributed import ALONE
from ..training.reference import add_reference
from ..training.run_checks import check_no_adapters, with_model_name
from ..training.run_fingerprint import model_fingerprint
from ..training.self_consistency import check_caches
from ..training.session import Session
from ..training.starting_adapter import resolve_config
from .sweep_folder import (
    check_sweep_folder,
    start_sweep_folder,
    write_findings,
    write_live_page,
    write_trials,
)
from .sweep_result import Sweep, resume_sweep_command
from .trial import Point, Trial, TrialExamples, run_config_of, run_trial, score_trial

CUT = 3  # each round keeps one trial in three
_RATE_FACTORS = (0.25, 1, 4, 16)  # of the baseline's learning rate, if no rates are given

# Settings that may change on --resume: they say how to search, name paths, or are part of a trial.
RESUME_MAY_CHANGE_SWEEP = {
    "model", "data", "adapter_path", "resume_adapter_file", "learning_rates", "lr_ratios", "ranks",
    "alphas", "rounds", "seeds", "max_minutes", "resume", "overwrite", "learning_rate", "lr_ratio",
    "rank", "alpha",
}  # fmt: skip


class _Stopped(Exception):  # noqa: N818
    """Ends the search early: the user interrupted it, or it is out of time."""


@dataclass
class _Search:
    """Runs the trials of a sweep, and records each one as soon as it has ended."""

    sweep: Sweep
    model: nn.Module
    examples: TrialExamples
    identity: Mapping[str, Any]
    log: Log
    deadline: float  # seconds of time.perf_counter
    planned: int = 0  # the maximum number of steps

    @property
    def config(self) -> SweepConfig:
        return self.sweep.config

    def run(self, points: list[Point]) -> None:
        """Run all rounds, from the trials that are already recorded.

        Raises:
            ConfigError: All trials of a round diverged.
            DeviceError: Memory ran out, or the GPU failed; the message says how to continue.
        """
        *early, last = _rounds(self.config, len(points))
        self._report_plan(early, last)

        try:
            with failures_in_one_line():
                self._run_rounds(points, early)
            self.sweep.outcome = "finished"
        except _Stopped as stopped:
            self.sweep.outcome = stopped.args[0]
        except DeviceError as error:
            raise DeviceError(
                f"{error}; {counted(len(self.sweep.trials), 'trial')} saved; to continue with the"
                f" same settings: {resume_sweep_command(self.config)}"
            ) from error

    def _run_rounds(self, points: list[Point], early: list[tuple[int, int]]) -> None:
        """Run the early rounds, each of a number of steps, and then the last one."""
        for _, steps in early:
            points = self._run_round(points, steps)

        # The last round: full runs with several seeds, the baseline among them.
        for seed in range(self.config.seed, self.config.seed + self.config.seeds):
            for point in dict.fromkeys([*points, self.sweep.default]):
                self._loss_of(point, self.config.iters, seed)

    def _report_plan(self, early: list[tuple[int, int]], last: tuple[int, int]) -> None:
        finals, full_steps = last
        self.planned = sum(count * steps for count, steps in (*early, last))
        runs = self.planned / full_steps

        rounds = "".join(
            f"{counted(count, 'trial')} of {counted(steps, 'step')}, " for count, steps in early
        )
        self.log(
            f"sweep: {rounds}up to {counted(finals, 'trial')} of {counted(full_steps, 'step')};"
            f" in all up to {counted(self.planned, 'step')}, as many as {runs:.1f} full runs"
        )
        untrained = self.sweep.before["valid_loss"]
        self.log(f"sweep: the validation loss before training is {untrained:.4f}")
        if self.sweep.trials:
            self.log(f"resume: {counted(len(self.sweep.trials), 'trial')} already ended")

    def _run_round(self, points: list[Point], steps: int) -> list[Point]:
        """Run one round, and return the best third of its points."""
        losses = {point: self._loss_of(point, steps, self.config.seed) for point in points}
        finite = [point for point in points if math.isfinite(losses[point])]
        if not finite:
            raise ConfigError(
                f"all trials of {counted(steps, 'step')} diverged: give lower --learning-rates"
            )

        best_first = sorted(finite, key=lambda point: losses[point])
        return best_first[: math.ceil(len(points) / CUT)]

    def _loss_of(self, point: Point, steps: int, seed: int) -> float:
        """Return a trial's loss; run it unless it is recorded.

        Raises:
            _Stopped: The trial did not end, or there is no time left to start it.
        """
        # A resumed sweep has recorded trials; points may also return in a later round.
        for trial in self.sweep.trials:
            if (trial.point, trial.steps, trial.seed) == (point, steps, seed):
                return trial.loss

        minutes = (self.deadline - time.perf_counter()) / 60
        if minutes <= 0:
            raise _Stopped("out of time")

        # Warm-up and reports shrink with the run.
        config = self.config
        warmup = config.optimizer.warmup
        changes: dict[str, Any] = {
            **asdict(point),
            "iters": steps,
            "seed": seed,
            "max_minutes": minutes if config.max_minutes else None,
            "warmup": None if warmup is None else round(warmup * steps / config.iters),
            "steps_per_report": max(1, steps // 10),
        }
        run = run_config_of(config, **changes)
        untrained = self.sweep.before["valid_loss"]
        trial, outcome = run_trial(self.model, run, self.examples, untrained=untrained)
        if outcome != "finished":
            raise _Stopped(outcome)

        # Record the trial immediately, so that a killed sweep loses at most one trial.
        self.sweep.trials.append(trial)
        write_trials(Path(config.adapter_path), self.identity, self.sweep.trials)
        write_live_page(self.sweep)
        self._report(trial)
        return trial.loss

    def _report(self, trial: Trial) -> None:
        """Report a trial, and after the first one also an estimate of the time."""
        result = f"diverged, cut at step {trial.done}"
        if math.isfinite(trial.loss):
            result = f"{trial.loss:.4f}"

        number = len(self.sweep.trials)
        self.log(
            f"trial {number}: {trial.point}, {counted(trial.steps, 'step')}, seed {trial.seed}: "
            f"{result} ({trial.seconds:.0f} s)"
        )
        if number == 1:
            minutes = self.planned * trial.seconds / max(1, trial.done) / 60
            most = counted(math.ceil(minutes), "minute")
            self.log(f"sweep: at this pace, all trials take up to {most}")


def sweep_rates(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    /,
    *,
    log: Log = no_log,
    **settings: Unpack[SweepOptions],
) -> Sweep:
    """Find the rates that suit ``model`` and ``data``; the model is left unchanged.

    Args:
        model: From ``load``, without adapters.
        tokenizer: From ``load``.
        log: Called with each line that a terminal would show, e.g. ``print``; silent by default.
        settings: Any setting of ``SweepConfig``, e.g.
            ``data="my_folder", learning_rates=(1e-4, 1e-3), iters=100``.

    Raises:
        ConfigError: A setting is unknown or not allowed, or all trials of a round diverged.
        DataError: Examples can't be trained on, or there are none to validate on.
        AdapterError: The model has adapters, or ``resume_adapter_file`` holds none that fits it.
        ModelError: The model's logits are not numbers, or differ with and without caches.
        DeviceError: Memory ran out, or the GPU failed; the message says how to continue.
        OutputError: ``adapter_path`` holds another sweep, or can't be written.

    Example:
        >>> sweep = sweep_rates(model, tokenizer, data="my_folder", iters=100)
        >>> run = finetune(model, tokenizer, data="my_folder", **sweep.settings)
    """
    given = with_model_name(model, store_data(translate(SweepConfig, dict(settings))))
    config = configure(SweepConfig, given)
    check_no_adapters(model)
    check_sweep_folder(config)
    config = _with_adapter_settings(config, model, given)
    check_caches(model)
    run = resolve_length(run_config_of(config), model, log)

    # Every trial is scored on the same sample of the validation examples.
    found = load_examples(run, tokenizer, log)
    check_examples(limits_of(model), found, tokenizer, log)
    if not len(found["valid"]):
        raise DataError(lacks_validation(len(found["train"])))
    order = np.random.default_rng(config.seed).permutation(len(found["valid"]))
    sample = np.sort(order[: config.valid_rows])
    examples = TrialExamples(found["train"], found["valid"].take(sample))

    # The batch size is chosen once, for all trials.
    run = resolve_batch(run, model, int(examples.train.lengths.max()), log)
    config = replace(config, data=run.data)

    # The reference is the same for all trials, and so is the model that they start from.
    start = shared_copy(model)
    if config.resume_adapter_file is not None:
        load_adapter(start, config.resume_adapter_file)
    identity = _identity_of(config, model, examples, start)
    splits: dict[SplitName, Examples] = {"train": examples.train, "valid": examples.valid}
    session = Session(Run(run), tokenizer, splits, None, ALONE, log, [])
    add_reference(model, session, identity["model"])
    before = {"step": 0, **score_trial(start, find_trunk_and_head(start), examples.valid, run)}
    del start  # each trial loads the adapter again
    deadline = math.inf
    if config.max_minutes:
        deadline = time.perf_counter() + 60 * config.max_minutes

    # Run the trials, and write what they found.
    default = Point.of(run)
    with locked(Path(config.adapter_path)):
        sweep = Sweep(config, default, start_sweep_folder(config, identity), before=before)
        search = _Search(sweep, model, examples, identity, log, deadline)
        search.run(_grid(config, default))
        write_findings(sweep)
    return sweep


def _with_adapter_settings(
    config: SweepConfig, model: nn.Module, given: Mapping[str, Any]
) -> SweepConfig:
    """Return a sweep's settings with those of the adapter that its trials start from, if any.

    Raises:
        ConfigError: A setting that was given differs from the adapter's own.
        AdapterError: ``resume_adapter_file`` holds no adapter, or one that does not fit.
    """
    if config.resume_adapter_file is None:
        return config
    names = set(setting_names(TrainConfig)) - {"resume", "overwrite"}
    shared = {name: value for name, value in given.items() if name in names}
    return replace(config, adapter=resolve_config(model, shared).adapter)


def _identity_of(
    config: SweepConfig, model: nn.Module, examples: TrialExamples, start: nn.Module
) -> dict[str, Any]:
    """Return the values that must stay the same when a sweep is resumed.

    ``start`` is the model with the adapter that the trials start from, if any.
    """
    settings = settings_of(config)
    fingerprints = (examples.train.fingerprint(), examples.valid.fingerprint())
    return {
        "settings": {
            name: settings[name] for name in settings if name not in RESUME_MAY_CHANGE_SWEEP
        },
        "model": model_fingerprint(model),
        "rows": " ".join(fingerprints),
        "resume_adapter_file": fingerprint(adapter_arrays(start)) if find_adapters(start) else "",
    }


def _grid(config: SweepConfig, default: Point) -> list[Point]:
    """Return all points to try, without duplicates."""
    # Lists that were not given are filled from the baseline.
    rates = config.learning_rates
    if not rates:
        rates = [default.learning_rate * factor for factor in _RATE_FACTORS]
    ranks = config.ranks or (default.rank,)
    alphas = config.alphas or (default.alpha,)

    combinations = itertools.product(rates, config.lr_ratios, ranks, alphas)
    return list(dict.fromkeys(Point(*values) for values in combinations))


def _rounds(config: SweepConfig, trials: int) -> list[tuple[int, int]]:
    """Return the number of trials in each round, and the number of steps of each trial.

    The last count is the maximum: it includes the baseline, which may be one of the finalists.
    """
    rounds: list[tuple[int, int]] = []
    for left in reversed(range(config.rounds)):
        count = trials if left else (trials + 1) * config.seeds
        steps = max(1, round(config.iters / CUT**left))
        rounds.append((count, steps))
        trials = math.ceil(trials / CUT)
    return rounds
