"""The tables in docs/rate_studies.md of what ``rate.py`` has measured.

A rate that only the first seed has tried gets its loss without what this seed adds to the loss at
the rates that all seeds have tried. The loss at a rate between two rates of the grid is
interpolated over log(eta). A rate outside the grid gets the loss of the grid's end, so its regret
is a lower bound, and is marked so.

Regret is the loss at the chosen rate minus the grid's lowest loss, in standard deviations over the
seeds. The standard deviation is pooled over the best rate of the grid and its neighbours.

The factor that a method multiplies its critical rate by is fitted to the other cases when a case is
judged, so that no case judges a factor that was fitted to itself. Without other cases it is the
package's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mlx_loraplus.files import write_atomically
from mlx_loraplus.training.range_test import RANGE_TEST
from scripts.study.rate_methods import METHODS
from scripts.study.rate_short_grids import short_grids_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "rate_studies.md"
START, END = "<!-- rate-study:start -->", "<!-- rate-study:end -->"
CANDIDATES = np.geomspace(0.01, 10, 61)
"""The factors that are tried."""
WORST = 10.0
"""Regrets above this count as this when a factor is fitted, so that one case does not decide."""
LISTED = 5
"""The most cases without results that are named below the tables."""
BASELINES = ("default", "mlx-lm", "Unsloth")
METHODS_LEGEND = """\
*Factor*: the chosen η is this factor times the critical rate. *Regret*: how much higher the loss is than at the best η
of the grid, in standard deviations over the seeds; lower is better. *Regret ≤ 1* and *≤ 2*: the percentage of searches
with at most that regret; higher is better. *Cost*: the work of a search, in training steps. *Ratio between seeds*: how
far apart the rates of two seeds are; 1 is best. The last rows are fixed rates, without a search."""
CASES_LEGEND = """\
A cell is the regret at the chosen η, one for each seed; "≥" marks an η outside the grid, "inf" a run that diverged.
*Seeds' sd*: the standard deviation of the loss over the seeds."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Truth:
    """What the grid of a case says.

    Attributes:
        rates: The rates of the grid, ascending.
        losses: The mean loss over the seeds at each rate; infinite if a run diverged.
        noise: The standard deviation over the seeds.
        added: Seed → what it adds to the loss, compared with the mean of the seeds.
    """

    rates: np.ndarray
    losses: np.ndarray
    noise: float
    added: Mapping[int, float] = field(default_factory=dict)

    @property
    def best(self) -> int:
        """The index of the best rate."""
        return int(np.argmin(self.losses))

    def covers(self, rate: float) -> bool:
        """Return whether a rate is on the grid or between two of its rates."""
        return bool(self.rates[0] * 0.999 <= rate <= self.rates[-1] * 1.001)

    def loss_at(self, rate: float) -> float:
        """Return the loss at a rate; infinite next to a rate that diverged."""
        place = float(np.interp(math.log(rate), np.log(self.rates), np.arange(len(self.rates))))
        low, high = math.floor(place), math.ceil(place)
        if low == high:
            return float(self.losses[low])
        return float((high - place) * self.losses[low] + (place - low) * self.losses[high])

    def regret(self, loss: float) -> float:
        """Return the regret of a loss, in standard deviations over the seeds."""
        return (loss - float(self.losses[self.best])) / self.noise


@dataclass(frozen=True)
class Study:
    """The results of the cases whose grid is complete enough to judge.

    Attributes:
        truths: Case → what its grid says.
        searches: Case → method → the lines of its searches.
        baselines: Case → name → the lines of its runs.
    """

    truths: Mapping[str, Truth]
    searches: Mapping[str, Mapping[str, list[Line]]]
    baselines: Mapping[str, Mapping[str, list[Line]]]

    @classmethod
    def of(cls, lines: Sequence[Line]) -> "Study":
        """Sort the lines by case."""
        truths: dict[str, Truth] = {}
        searches: dict[str, dict[str, list[Line]]] = {}
        baselines: dict[str, dict[str, list[Line]]] = {}
        for line in lines:
            if line["kind"] == "search":
                of_case = searches.setdefault(line["case"], {})
                of_case.setdefault(line["method"], []).append(line)
            elif line["kind"] in BASELINES:
                of_case = baselines.setdefault(line["case"], {})
                of_case.setdefault(line["kind"], []).append(line)

        for case in dict.fromkeys(line["case"] for line in lines):
            truth = truth_of([each for each in lines if each["case"] == case])
            if truth is not None:
                truths[case] = truth
        return cls(truths, searches, baselines)

    def regrets(self, method: str, factor_of: Callable[[str], float]) -> dict[str, list[float]]:
        """Return case → the regret of each search of a method, with the case's factor."""
        found: dict[str, list[float]] = {}
        for case, truth in self.truths.items():
            lines = self.searches.get(case, {}).get(method, [])
            rates = [rate_of(line, factor_of(case)) for line in lines]
            if rates:
                found[case] = [truth.regret(truth.loss_at(rate)) for rate in rates]
        return found

    def factor_for(self, method: str, case: str) -> float:
        """Return the factor that judges a case: fitted to the others, or the package's without any."""
        others = [other for other in self.truths if other != case]
        if any(self.searches.get(other, {}).get(method) for other in others):
            return self.fitted_factor(method, case)
        return METHODS[method].factor

    def fitted_factor(self, method: str, without: str | None = None) -> float:
        """Return the factor with the lowest mean regret over other cases."""
        means: list[float] = []
        for factor in CANDIDATES:
            regrets = self.regrets(method, lambda _, factor=factor: float(factor))
            others = [values for case, values in regrets.items() if case != without]
            capped = [min(value, WORST) for values in others for value in values]
            means.append(fmean(capped) if capped else 0.0)

        # Where several factors are equally good, take the middle one.
        best = np.flatnonzero(np.array(means) <= min(means) + 1e-9)
        return float(CANDIDATES[best[len(best) // 2]])


def truth_of(lines: Sequence[Line]) -> Truth | None:
    """Return what a case's grid says; None without two seeds at the best rate."""
    losses: dict[float, dict[int, float]] = {}
    for line in lines:
        if line["kind"] == "grid":
            loss = math.inf if line["loss"] is None else line["loss"]
            losses.setdefault(line["learning_rate"], {})[line["seed"]] = loss
    if not losses:
        return None

    # Some rates have fewer seeds than others, so take out what a seed adds to the loss.
    rates = sorted(losses)
    most = max(len(of_rate) for of_rate in losses.values())
    complete = [
        of_rate
        for of_rate in losses.values()
        if len(of_rate) == most and np.isfinite(list(of_rate.values())).all()
    ]
    added = {
        seed: fmean(of_rate[seed] - fmean(of_rate.values()) for of_rate in complete)
        for seed in (complete[0] if complete else ())
    }
    means = np.array(
        [
            fmean(loss - added.get(seed, 0.0) for seed, loss in losses[rate].items())
            for rate in rates
        ]
    )

    # The noise is that of the best rate and its neighbours.
    best = int(np.argmin(means))
    near = [list(losses[rate].values()) for rate in rates[max(0, best - 1) : best + 2]]
    variances = [
        float(np.var(each, ddof=1)) for each in near if len(each) > 1 and np.isfinite(each).all()
    ]
    if not variances or fmean(variances) == 0 or len(losses[rates[best]]) < 2:
        return None
    return Truth(np.array(rates), means, math.sqrt(fmean(variances)), added)


def rate_of(line: Line, factor: float) -> float:
    """Return the rate that a search chooses: its critical rate times a factor, or the default."""
    return line["rate"] if line["critical"] is None else factor * line["critical"]


def write_tables(tables: str) -> None:
    """Write the tables into docs/rate_studies.md, if it has a place for them."""
    text = PAGE.read_text(encoding="utf-8")
    if START in text:
        before, after = text.split(START)[0], text.split(END)[1]
        write_atomically(PAGE, f"{before}{START}\n\n{tables}\n\n{END}{after}".encode())


def tables_of(lines: Sequence[Line], cases: Sequence[str]) -> str:
    """Return all tables, and which cases were not studied."""
    study = Study.of(lines)
    if not study.truths:
        return "No case is complete yet."

    judged = [case for case in cases if case in study.truths]
    left = [case for case in cases if case not in study.truths]
    parts = [methods_table(study), cases_table(study, judged), ratios_table(lines, study)]
    parts.append(short_grids_table(lines, RANGE_TEST.name))
    steps = sorted({line["steps"] for line in lines})
    seeds = len({line["seed"] for line in lines})
    missing = "; ".join(left) or "none"
    if len(left) > LISTED:
        missing = f"{len(left)} cases, which `scripts/study/rate --plan` lists"
    parts.append(
        f"{len(judged)} of {len(cases)} cases, runs of {' or '.join(map(str, steps))} steps,"
        f" {seeds} seeds; not studied: {missing}."
    )
    return "\n\n".join(part for part in parts if part)


def methods_table(study: Study) -> str:
    """Return each method's and baseline's regrets, divergences, cost and stability."""
    rows = [
        "| method | factor | regret ≤ 1 | regret ≤ 2 | worst regret | diverged | cost, steps | ratio between seeds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for method in METHODS:
        for shipped in (False, True):
            row = _method_row(study, method, shipped=shipped)
            if row:
                rows.append(row)

    for name in BASELINES:
        regrets = [value for values in baseline_regrets(study, name).values() for value in values]
        if regrets:
            rows.append(f"| {name} | | {_regret_cells(regrets)} | 0 | |")
    return "\n".join([*rows, "", METHODS_LEGEND])


def _method_row(study: Study, method: str, *, shipped: bool) -> str:
    """Return a method's row, with its provisional factor or with a fitted one."""
    if shipped:
        factor_of: Callable[[str], float] = lambda _: METHODS[method].factor  # noqa: E731
        factor = f"{METHODS[method].factor:.2g} (provisional)"
    elif sum(bool(study.searches.get(case, {}).get(method)) for case in study.truths) < 2:
        return ""
    else:
        factors = {case: study.factor_for(method, case) for case in study.truths}
        factor_of = factors.__getitem__
        factor = f"{study.fitted_factor(method):.2g} (fitted to the other cases)"

    regrets = [v for values in study.regrets(method, factor_of).values() for v in values]
    if not regrets:
        return ""
    lines = [line for case in study.truths for line in study.searches.get(case, {}).get(method, [])]
    cost = fmean(line["cost"] for line in lines)
    return f"| {method} | {factor} | {_regret_cells(regrets)} | {cost:.1f} | {_spread(study, method)} |"


def _regret_cells(regrets: Sequence[float]) -> str:
    """Return the cells: how many regrets are at most 1 and 2, the worst one, and the divergences."""
    count = len(regrets)
    low, high = (sum(value <= limit for value in regrets) / count for limit in (1, 2))
    finite = [value for value in regrets if math.isfinite(value)]
    worst = f"{max(finite):.1f}" if finite else ""
    return f"{low:.0%} | {high:.0%} | {worst} | {count - len(finite)} of {count}"


def _spread(study: Study, method: str) -> str:
    """Return by what factor the rates of two seeds differ, as the mean over the cases."""
    factors: list[float] = []
    for case in study.truths:
        lines = study.searches.get(case, {}).get(method, [])
        rates = [rate_of(line, METHODS[method].factor) for line in lines]
        if len(rates) > 1:
            factors.append(math.log(max(rates) / min(rates)))
    return f"{math.exp(fmean(factors)):.2f}" if factors else ""


def baseline_regrets(study: Study, name: str) -> dict[str, list[float]]:
    """Return case → the regret of each of a baseline's runs."""
    found: dict[str, list[float]] = {}
    for case, truth in study.truths.items():
        for line in study.baselines.get(case, {}).get(name, []):
            loss = math.inf if line["loss"] is None else line["loss"]
            loss -= truth.added.get(line["seed"], 0.0)
            found.setdefault(case, []).append(truth.regret(loss))
    return found


def cases_table(study: Study, cases: Sequence[str]) -> str:
    """Return each case's best rate, and the rate and regret of each method and baseline."""
    methods = [name for name in METHODS if any(name in found for found in study.searches.values())]
    baselines = [
        name for name in BASELINES if any(name in found for found in study.baselines.values())
    ]
    names = [*methods, *baselines]
    rows = [
        f"| case | best η | loss | seeds' sd | {' | '.join(names)} |",
        f"|---|--:|--:|--:|{'--:|' * len(names)}",
    ]
    for case in cases:
        truth = study.truths[case]
        best = truth.best
        cells = [f"{truth.rates[best]:.1e}", f"{truth.losses[best]:.4f}", f"{truth.noise:.4f}"]
        for method in methods:
            factor = study.factor_for(method, case)
            lines = study.searches.get(case, {}).get(method, [])
            cells.append(_cell(truth, [rate_of(line, factor) for line in lines]))
        for name in baselines:
            regrets = baseline_regrets(study, name).get(case, [])
            cells.append(f"{fmean(regrets):.1f}" if regrets else "")
        rows.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", CASES_LEGEND])


def _cell(truth: Truth, rates: Sequence[float]) -> str:
    """Return the regret of each rate and the rates; ≥ marks rates outside the grid."""
    shown: list[str] = []
    for rate in rates:
        mark = "" if truth.covers(rate) else "≥ "
        shown.append(f"{mark}{truth.regret(truth.loss_at(rate)):.1f} at {rate:.1e}")
    return "; ".join(shown)


def ratios_table(lines: Sequence[Line], study: Study) -> str:
    """Return the loss for each lambda, at the grid's best rate and at that of the best method."""
    setups = {line["case"]: line["setup"] for line in lines}
    groups: dict[tuple[str, ...], dict[float, str]] = {}
    for case in study.truths:
        setup = setups[case]
        key = tuple(str(setup[name]) for name in ("model", "data", "adapter", "init", "batch"))
        groups.setdefault(key, {})[setup["ratio"]] = case
    groups = {key: cases for key, cases in groups.items() if len(cases) > 1}
    if not groups:
        return ""

    method = best_method(study)
    rows = [f"| model, data, start | λ: loss at the best η / at auto's η ({method}) |", "|---|---|"]
    for (model, data, _, init, batch), by_ratio in groups.items():
        cells: list[str] = []
        for ratio, case in sorted(by_ratio.items()):
            truth = study.truths[case]
            factor = study.factor_for(method, case)
            searches = study.searches.get(case, {}).get(method, [])
            losses = [truth.loss_at(rate_of(line, factor)) for line in searches]
            auto = f"{fmean(losses):.4f}" if losses else "?"
            cells.append(f"{ratio:g}: {truth.losses[truth.best]:.4f} / {auto}")
        rows.append(f"| {model}, {data}, {init}, batch {batch} | {'; '.join(cells)} |")
    return "\n".join(rows)


def best_method(study: Study) -> str:
    """Return the method with the lowest mean regret, with factors fitted to the other cases."""

    def mean_regret(method: str) -> float:
        factors = {case: study.factor_for(method, case) for case in study.truths}
        regrets = study.regrets(method, factors.__getitem__)
        capped = [min(value, WORST) for values in regrets.values() for value in values]
        return fmean(capped) if capped else math.inf

    return min(METHODS, key=mean_regret)
