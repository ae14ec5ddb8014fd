"""The few shapes that a run's batches are padded to, fitted to the lengths of its own examples.

A compiled step is traced once for each shape (rows, length, targets), and a trace costs seconds and
tens of megabytes. So batches are padded to a short list of lengths, and for each length to a short
list of target counts. Both lists are chosen to leave as little padding as possible: for values
v_1 <= ... <= v_n and k rungs r, they minimize sum_i (min {r : r >= v_i} - v_i) by dynamic
programming. The values are those of the run's first batches, in the order in which it sees them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_LENGTHS, MAX_SHAPES = 30, 48
# Where fewer lengths do, as in sets of short answers, fewer shapes do too.
FEW_LENGTHS, FEW_SHAPES = 16, 24
# More lengths are not worth a trace once rounding up costs less than this share of the tokens.
ENOUGH = 0.05
# Target counts are cheaper than tokens: one that saves less than this share of them is left out.
WORTH = 0.005


@dataclass(frozen=True)
class ShapeLadder:
    """The lengths to pad to, and for each of them the target counts to pad to; both ascend."""

    lengths: np.ndarray
    targets: tuple[np.ndarray, ...]

    @classmethod
    def fit(cls, lengths: np.ndarray, targets: np.ndarray, longest: int) -> "ShapeLadder":
        """Choose the rungs for batches of these lengths and target counts.

        Args:
            lengths: Length of each batch's longest row, in tokens: (batches,).
            targets: Supervised tokens of each batch: (batches,).
            longest: The longest row of any batch, which the last rung holds.
        """
        # As few lengths as do.
        rounded = multiple_of_8(lengths)
        choices = _best_rungs(np.append(rounded, multiple_of_8(longest)), MAX_LENGTHS)
        rungs = choices[-1]
        for choice in choices:
            rungs = choice
            padded = rungs[np.searchsorted(rungs, rounded)]
            if padded.sum() - lengths.sum() <= ENOUGH * padded.sum():
                break

        # One target count for each length, then more where they save most.
        home = np.searchsorted(rungs, rounded)
        spare = (FEW_SHAPES if len(rungs) <= FEW_LENGTHS else MAX_SHAPES) - len(rungs)
        groups = [multiple_of_8(targets[home == number]) for number in range(len(rungs))]
        options = [_best_rungs(group, 1 + spare) for group in groups]
        costs = [
            [_padding(group, choice) for choice in choices]
            for group, choices in zip(groups, options, strict=True)
        ]
        counts = [0] * len(rungs)
        for _ in range(spare):
            saved = [
                cost[count] - cost[count + 1] if count + 1 < len(cost) else 0
                for cost, count in zip(costs, counts, strict=True)
            ]
            best = int(np.argmax(saved))
            if saved[best] <= WORTH * targets.sum():
                break
            counts[best] += 1
        chosen = [choices[count] for choices, count in zip(options, counts, strict=True)]
        return cls(rungs, tuple(chosen))

    def shape(self, length: int, targets: int) -> tuple[int, int]:
        """Return the length and the target count that a batch is padded to."""
        number = int(np.searchsorted(self.lengths, length))
        counts = self.targets[number]
        place = int(np.searchsorted(counts, targets))

        # A batch that comes later than those that were looked at may have more targets.
        count = int(counts[place]) if place < len(counts) else multiple_of_8(targets)
        return int(self.lengths[number]), count


def multiple_of_8(count: Any) -> Any:
    """Return the least multiple of 8 that is at least ``count``, a number or an array of them."""
    return -(-count // 8) * 8


def _padding(values: np.ndarray, rungs: np.ndarray) -> int:
    """Return what rounding up to the rungs adds to the values in all."""
    return int((rungs[np.searchsorted(rungs, values)] - values).sum())


def _best_rungs(values: np.ndarray, most: int) -> list[np.ndarray]:
    """Return for 1, 2, … ``most`` rungs those of the values that leave least padding.

    The largest value is always among them. The list ends early where every value is a rung.
    """
    distinct, amounts = np.unique(values, return_counts=True)
    if not len(distinct):
        return [np.zeros(0, np.int64)]
    below = np.concatenate([[0], np.cumsum(amounts)])

    # cost[j]: the least sum of rungs for the first j distinct values; came[j]: where the values
    # of the last of these rungs begin.
    cost = np.full(len(distinct) + 1, np.inf)
    cost[0] = 0
    steps: list[np.ndarray] = []
    found: list[np.ndarray] = []
    for _ in range(min(most, len(distinct))):
        following = np.full(len(distinct) + 1, np.inf)
        came = np.zeros(len(distinct) + 1, np.int64)
        for j in range(1, len(distinct) + 1):
            costs = cost[:j] + distinct[j - 1] * (below[j] - below[:j])
            came[j] = np.argmin(costs)
            following[j] = costs[came[j]]
        steps.append(came)
        cost = following

        # Walk back from the largest value.
        rungs: list[int] = []
        j = len(distinct)
        for back in reversed(steps):
            rungs.append(int(distinct[j - 1]))
            j = int(back[j])
        found.append(np.array(rungs[::-1]))
    return found
