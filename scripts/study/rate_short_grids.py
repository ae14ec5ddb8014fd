"""A second look at the searches of ``rate.py``: beside the short grids of ``evidence.py``.

Those grids cover more models and starts, but their runs have 12 steps and one seed. So they show
whether a search follows the best rate from case to case, but not how good its rate is for a longer
run.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

EVIDENCE = Path(__file__).parent / "results" / "evidence.jsonl"

Line = dict[str, Any]


@dataclass(frozen=True)
class ShortGrid:
    """The losses of short runs with one seed.

    Attributes:
        rates: The rates, ascending.
        losses: The loss of each rate; infinite if the run diverged.
    """

    rates: np.ndarray
    losses: np.ndarray

    @property
    def best(self) -> float:
        """The best rate, between the rates: the lowest point of a parabola over log(eta)."""
        lowest = int(np.argmin(self.losses))
        if not 0 < lowest < len(self.rates) - 1:
            return float(self.rates[lowest])
        before, least, after = self.losses[lowest - 1 : lowest + 2]
        if not math.isfinite(before + after):
            return float(self.rates[lowest])
        shift = 0.5 * (before - after) / (before - 2 * least + after)
        return float(self.rates[lowest] * (self.rates[lowest + 1] / self.rates[lowest]) ** shift)

    def loss_at(self, rate: float) -> float | None:
        """Return the loss at a rate, interpolated over log(eta); None outside the grid."""
        if not self.rates[0] <= rate <= self.rates[-1]:
            return None
        return float(np.interp(math.log(rate), np.log(self.rates), self.losses))


def short_grid_of(setup: Line, lines: Sequence[Line]) -> ShortGrid | None:
    """Return the short grid for a case of ``rate.py``, if ``evidence.py`` has made one."""
    if setup["adapter"] != "lora" or setup["batch"] != 4:
        return None
    found: dict[float, float] = {}
    for line in lines:
        is_of_case = (
            line["pair"] == f"{setup['model']}, {setup['data']}"
            and line["init"] == setup["init"]
            and line["lr_ratio"] == setup["ratio"]
        )
        if is_of_case and line["stage"] == "search" and line["rule"] == "adam":
            found[line["learning_rate"]] = math.inf if line["loss"] is None else line["loss"]
    if not found:
        return None
    rates = sorted(found)
    return ShortGrid(np.array(rates), np.array([found[rate] for rate in rates]))


def short_grids_table(lines: Sequence[Line], method: str) -> str:
    """Return the searches of a method beside the short grids; empty if there is none.

    Args:
        lines: The results of ``rate.py``.
        method: The method.
    """
    evidence = [json.loads(line) for line in EVIDENCE.read_text(encoding="utf-8").splitlines()]
    rows = [
        "| case | best η of 12 steps | critical rate | critical / best | default / best |",
        "|---|--:|--:|--:|--:|",
    ]
    ratios: list[float] = []
    others: list[float] = []
    for line in lines:
        if line["kind"] != "search" or line["method"] != method or line["critical"] is None:
            continue
        grid = short_grid_of(line["setup"], evidence)
        if grid is None:
            continue
        ratios.append(line["critical"] / grid.best)
        others.append(line["default"] / grid.best)
        cells = [f"{grid.best:.1e}", f"{line['critical']:.1e}"]
        cells += [f"{ratios[-1]:.2f}", f"{others[-1]:.2f}"]
        rows.append(f"| {line['case']} | {' | '.join(cells)} |")

    if not ratios:
        return ""
    spread, default_spread = factor(ratios), factor(others)
    rows.append(f"| typical factor from the mean | | | {spread:.2f} | {default_spread:.2f} |")
    legend = (
        "The range test beside the best η of short runs. If *critical / best* were the same everywhere, a fixed factor\n"
        "would find the best η; the last row says by which factor the values differ from their mean (1 is best)."
    )
    return "\n".join([*rows, "", legend])


def factor(values: Sequence[float]) -> float:
    """Return the typical factor by which values differ from their geometric mean."""
    logs = [math.log(value) for value in values]
    mean = fmean(logs)
    return math.exp(math.sqrt(fmean((each - mean) ** 2 for each in logs)))
