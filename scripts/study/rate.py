"""Which method to find a learning rate comes closest to a sweep, at a tenth of a run's cost?

    scripts/study/rate --plan                           the cases, what is done, and what the rest takes
    scripts/study/rate --minutes 120 --data wikisql=FOLDER chat=FOLDER text=FOLDER
    scripts/study/rate --cases 0 1 --minutes 60         these cases only; Ctrl-C at any moment
    scripts/study/rate --cases 4 --searches "range test"   only searches, with the first seed
    scripts/study/rate --table                          the tables in docs/rate_studies.md, from the results

A case is a model, a data set, an adapter with its start, a lambda and a batch size. For each case:

1. The truth: runs at eta on a grid of three rates a decade, to ``--steps`` steps. The grid of the
   first seed grows until ``--side`` rates on both sides of the best one have been tried. The other
   seed runs at the best rate and its neighbours.
2. Each method of ``rate_methods.py`` searches, once for each seed, with the same work.
3. The baselines, run with the first seed: the default rate, mlx-lm's 1e-5 at scale 20, and
   Unsloth's 2e-4 at scale 1, both with lambda 1.

Each run and each search is a line of ``--results``. A stored line is not made again, so the same
command continues an interrupted study. A data set without a folder is left out; the built-in demo
set needs none.
"""

from mlx_loraplus.sweep.trial import TrialExamples, new_adapters, run_trial, trial_state  # isort: skip  before mlx

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.load_data import load_data
from mlx_loraplus.files import write_atomically
from mlx_loraplus.inference.generate import load
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.settings import configure, default_rate
from mlx_loraplus.training.distributed import ALONE
from mlx_loraplus.training.rate_search import STEPS as SEARCH_STEPS
from mlx_loraplus.training.rate_search import search_rate
from mlx_loraplus.training.validation import score
from scripts.provenance import provenance
from scripts.study.rate_cases import DATA, SETTINGS, Case, all_cases, baselines
from scripts.study.rate_methods import METHODS
from scripts.study.rate_page import tables_of, write_tables

RESULTS = Path(__file__).parent / "results" / "rate.jsonl"
PER_DECADE = 3
SEEDS = (0, 1)
VALID_ROWS = 40
SECONDS_A_ROW = {"smollm2-135m": 0.4, "gemma-3-270m": 1.5}
"""A first guess of the seconds that a step takes for each row of its batch, on one CPU core."""

Line = dict[str, Any]


class OutOfTimeError(Exception):
    """The time is used up."""


@dataclass(frozen=True)
class Effort:
    """How much is done for a case.

    Attributes:
        steps: The steps of a run.
        side: The rates that the grid has on both sides of the best one, at least.
        deadline: When to start nothing more, as ``time.monotonic`` gives it.
        searches: The methods whose search is all that is done; if empty, everything is done.
    """

    steps: int
    side: int
    deadline: float
    searches: Sequence[str] = ()


class Bench:
    """A model with a data set, and the results so far.

    Args:
        model: The model's name.
        data: The data setting: folders, or none for the demo set.
        lines: All lines of the results; new ones are added.
        file: Where they are stored.
        effort: How much is done.
    """

    def __init__(
        self, model: str, data: Sequence[str], lines: list[Line], file: Path, effort: Effort
    ):
        self.name, self.data = model, tuple(data)
        self.lines, self.file, self.effort = lines, file, effort
        self.model, tokenizer = load(model)

        # Score on the same few validation rows in all runs.
        config = configure(TrainConfig, SETTINGS | {"model": model, "data": self.data})
        examples = load_data(config, tokenizer, "train", "valid").examples
        order = np.random.default_rng(0).permutation(len(examples["valid"]))
        valid = examples["valid"].take(np.sort(order[:VALID_ROWS]))
        self.examples = TrialExamples(examples["train"], valid)
        self.untrained = score(self.model, find_trunk_and_head(self.model), valid, 4).loss

    def study(self, case: Case) -> None:
        """Make what is missing of a case: the grid, the searches and the baselines."""
        for method in self.effort.searches:
            self._search(case, method, SEEDS[0])
        if self.effort.searches:
            return

        grid: dict[int, dict[int, float]] = {}
        before = -1
        while before < runs_of(grid):  # a seed can move the best rate
            before = runs_of(grid)
            for seed in SEEDS:
                self._grow_grid(case, grid, seed, self.effort.side if seed == SEEDS[0] else 1)
        for seed in SEEDS:
            for method in METHODS:
                self._search(case, method, seed)
        for name, settings in baselines(case).items():
            self._run(case, {"kind": name, "seed": SEEDS[0]}, settings)

    def _grow_grid(
        self, case: Case, grid: dict[int, dict[int, float]], seed: int, side: int
    ) -> None:
        """Run a seed on the grid, until ``side`` rates on both sides of the best one are tried.

        Args:
            case: The case.
            grid: The number of each rate → seed → loss; new runs are added.
            seed: The seed of the runs.
            side: How many rates.
        """
        middle = round(PER_DECADE * math.log10(self._default_of(case)))
        if grid:
            middle = best_of(grid)
        wanted = list(range(middle - side, middle + side + 1))
        while wanted:
            for number in wanted:
                rate = float(f"{10 ** (number / PER_DECADE):.3g}")
                key = {"kind": "grid", "learning_rate": rate, "seed": seed}
                line = self._run(case, key, {"learning_rate": rate})
                loss = math.inf if line["loss"] is None else line["loss"]
                grid.setdefault(number, {})[seed] = loss
            best = best_of(grid)
            near = range(best - side, best + side + 1)
            wanted = [number for number in near if seed not in grid.get(number, {})]

    def _run(self, case: Case, key: Line, settings: Mapping[str, Any]) -> Line:
        """Return the line of a run, made now if it is not there."""
        key = {"case": case.name, **key, "steps": self.effort.steps}

        def make() -> Line:
            config = self._config(case, key["seed"], settings)
            trial, outcome = run_trial(self.model, config, self.examples, untrained=self.untrained)
            if outcome != "finished":
                raise KeyboardInterrupt
            loss = trial.loss if math.isfinite(trial.loss) else None
            rate = config.optimizer.learning_rate
            return {"learning_rate": rate, "loss": loss, "seconds": round(trial.seconds, 2)}

        return self._stored(case, key, make)

    def _search(self, case: Case, method: str, seed: int) -> Line:
        """Return the line of a search, made now if it is not there."""
        key = {"case": case.name, "kind": "search", "method": method, "seed": seed}

        def make() -> Line:
            config = self._config(case, seed, {"learning_rate": self._default_of(case)})
            mx.random.seed(config.seed)
            with new_adapters(self.model, config) as trainable:
                state = trial_state(self.model, config, self.examples.train, trainable)
                found = search_rate(state, config, ALONE, METHODS[method])
            event = found.stored()
            tried = [(each["rate"], each["change"]) for each in event.pop("tried")]
            return {
                name: event[name] for name in ("rate", "default", "critical", "reason", "seconds")
            } | {
                "cost": event["steps"],
                "tried": tried,
            }

        return self._stored(case, key | {"steps": self.effort.steps}, make)

    def _stored(self, case: Case, key: Line, make: Callable[[], Line]) -> Line:
        """Return the line with a key; make it and store it if it is missing."""
        for line in self.lines:
            if key.items() <= line.items():
                return line
        if time.monotonic() > self.effort.deadline:
            raise OutOfTimeError

        made = make()
        line = {**key, "bench": case.bench, "setup": asdict(case), "untrained": self.untrained}
        line |= made | provenance()
        self.lines.append(line)
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in self.lines)
        write_atomically(self.file, text.encode())
        shown = [str(value) for value in key.values()]
        result = made.get("loss", made.get("rate"))
        print(*shown, "->", result, f"{made['seconds']:.1f} s", flush=True)
        return line

    def _config(self, case: Case, seed: int, settings: Mapping[str, Any]) -> TrainConfig:
        """Return the settings of a run of a case."""
        return configure(
            TrainConfig,
            {
                **case.settings(),
                "model": self.name,
                "data": self.data,
                "iters": self.effort.steps,
                "seed": seed,
                "steps_per_report": 5,
                **settings,
            },
        )

    def _default_of(self, case: Case) -> float:
        """Return the default rate of a case."""
        return default_rate(self._config(case, 0, {}))


def runs_of(grid: Mapping[int, Mapping[int, float]]) -> int:
    """Return the number of runs on a grid."""
    return sum(map(len, grid.values()))


def best_of(grid: Mapping[int, Mapping[int, float]]) -> int:
    """Return the number of the rate with the lowest mean loss over its seeds."""
    return min(grid, key=lambda number: fmean(grid[number].values()))


def print_plan(cases: Sequence[Case], lines: Sequence[Line], steps: int, side: int) -> float:
    """Print how much of each case is done, and the minutes that the rest takes; return their sum."""
    total = 0.0
    for number, case in enumerate(cases):
        mine = [line for line in lines if line["case"] == case.name and line["steps"] == steps]
        runs = 2 * side + 1 + 3 * (len(SEEDS) - 1) + len(baselines(case))
        searches = len(SEEDS) * len(METHODS)
        searched = sum(line["kind"] == "search" for line in mine)
        left = max(0, runs - (len(mine) - searched)) * steps
        left += max(0, searches - searched) * SEARCH_STEPS

        minutes = left * seconds_a_step(case, lines) / 60
        total += minutes
        print(
            f"{number:3} {case.name}: {len(mine)} of about {runs + searches} lines,"
            f" about {minutes:.0f} minutes left"
        )
    print(f"all together: about {total:.0f} minutes left")
    return total


def seconds_a_step(case: Case, lines: Sequence[Line]) -> float:
    """Return the seconds of a step: measured, if the model has met the data, or guessed."""
    runs = [line for line in lines if line["bench"] == case.bench and line["kind"] != "search"]
    if runs:
        return sum(line["seconds"] for line in runs) / sum(line["steps"] for line in runs)
    return SECONDS_A_ROW.get(case.model, 0.01) * case.batch


def study_cases(
    cases: Sequence[Case],
    folders: Mapping[str, str],
    lines: list[Line],
    file: Path,
    effort: Effort,
) -> None:
    """Study cases one after another until the time is used up."""
    bench, loaded = None, ("", "")
    for case in cases:
        if case.data != "demo" and case.data not in folders:
            print(f"left out, because --data has no {case.data}: {case.name}")
            continue
        if (case.model, case.data) != loaded:
            data = () if case.data == "demo" else (folders[case.data],)
            bench = Bench(case.model, data, lines, file, effort)
            loaded = (case.model, case.data)
        assert bench is not None
        bench.study(case)


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> None:
    """Do what the arguments ask for; tests give other ``cases``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=[], help="folders, e.g. wikisql=FOLDER")
    parser.add_argument(
        "--minutes", type=float, default=120.0, help="start nothing after this many"
    )
    parser.add_argument("--cases", type=int, nargs="+", help="numbers of the cases (default: all)")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run (default: 60)")
    parser.add_argument(
        "--side",
        type=int,
        default=2,
        help="rates of the grid on both sides of the best one (default: 2)",
    )
    parser.add_argument(
        "--searches", nargs="+", default=[], choices=METHODS, help="make only these searches"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSONL file")
    parser.add_argument("--plan", action="store_true", help="only print what is left")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    options = parser.parse_args(arguments)
    folders = dict(item.split("=", 1) for item in options.data if "=" in item)
    if len(folders) < len(options.data) or not folders.keys() <= set(DATA):
        parser.error(f"--data takes NAME=FOLDER with one of {', '.join(DATA[1:])}")

    # What was done before.
    lines: list[Line] = []
    if options.results.exists():
        text = options.results.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
    cases = list(all_cases() if cases is None else cases)
    wanted = cases if options.cases is None else [cases[number] for number in options.cases]

    if not options.table:
        print_plan(wanted, lines, options.steps, options.side)
        if options.plan:
            return
        try:
            deadline = time.monotonic() + 60 * options.minutes
            effort = Effort(options.steps, options.side, deadline, options.searches)
            study_cases(wanted, folders, lines, options.results, effort)
        except OutOfTimeError:
            print("the time is up; the same command continues")
        except KeyboardInterrupt:
            print("stopped; the same command continues")
    if lines:
        # Other results than the project's own are only printed.
        tables = tables_of(lines, [case.name for case in cases])
        print(tables)
        if options.results == RESULTS:
            write_tables(tables)


if __name__ == "__main__":
    main()
