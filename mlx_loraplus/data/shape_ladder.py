"""Choose the few shapes that a run's batches are padded to, based on the lengths of its examples.

A compiled step is traced once for each shape (rows, length, targets), and a trace costs seconds and
tens of megabytes. Batches are therefore padded to a short list of lengths, and for each length to a
short list of target counts. The entries of a list are called rungs. Both lists are chosen to need
as little padding as possible: for values v_1 <= ... <= v_n and k rungs r, dynamic programming
minimizes sum_i (min {r : r >= v_i} - v_i). The values are those of the run's first batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_LENGTHS, MAX_SHAPES = 36, 48
# If few lengths are enough, as in data sets of short answers, few shapes are enough too.
FEW_LENGTHS, FEW_SHAPES = 16, 24
# No more lengths are added once the lists add less padding than this fraction of the tokens, and
# all padding, including that between the rows of a batch, is less than MOST.
ENOUGH, MOST = 0.05, 0.07
# A target count is only added if it reduces the padding by more than this fraction of the targets.
WORTH = 0.005


@dataclass(frozen=True)
class ShapeLadder:
    """The lengths to pad to, and the target counts for each length, in ascending order."""

    lengths: np.ndarray
    targets: tuple[np.ndarray, ...]

    @classmethod
    def fit(
        cls, lengths: np.ndarray, means: np.ndarray, targets: np.ndarray, longest: int
    ) -> "ShapeLadder":
        """Choose the rungs for batches of these lengths and target counts.

        Args:
            lengths: Length of each batch's longest row, in tokens: (batches,).
            means: Mean length of each batch's rows, rounded down: (batches,).
            targets: Supervised tokens of each batch: (batches,).
            longest: Length of the longest row of any batch; the last rung is at least as long.
        """
        rungs = _choose_lengths(lengths, means, longest)

        # Group the target counts by the length that their batches are padded to.
        number_of = np.searchsorted(rungs, multiple_of_8(lengths))
        groups = [targets[number_of == number] for number in range(len(rungs))]
        return cls(rungs, tuple(_choose_target_counts(groups)))

    def shape(self, length: int, targets: int) -> tuple[int, int]:
        """Return the length and the target count that a batch is padded to."""
        number = int(np.searchsorted(self.lengths, length))
        counts = self.targets[number]
        place = int(np.searchsorted(counts, targets))

        # A later batch may have more targets than the batches that the ladder was fitted to.
        count = int(counts[place]) if place < len(counts) else multiple_of_8(targets)
        return int(self.lengths[number]), count


def multiple_of_8(count: Any) -> Any:
    """Round a number, or each number of an array, up to a multiple of 8."""
    return (count + 7) // 8 * 8


def batch_sizes(
    lengths: np.ndarray, targets: np.ndarray, batch_size: int, processes: int = 1
) -> np.ndarray:
    """Return the sizes of the batches that rows form in the given order.

    Args:
        lengths: Length of each row, in tokens: (rows,).
        targets: Supervised tokens of each row: (rows,).
        batch_size: Rows in a batch.
        processes: Number of processes that divide the rows of a batch: each takes every n-th row.
            The sizes are those of their parts.

    Returns:
        The length of the longest row, the mean length and the number of targets of each part that
        has rows: (3, parts of all batches).
    """
    # Fill up the last batch, and then every batch, with rows of length 0.
    batches = math.ceil(len(lengths) / batch_size)
    most_rows = math.ceil(batch_size / processes)

    def by_process(values: np.ndarray) -> np.ndarray:
        filled = np.zeros(batches * batch_size, np.int64)
        filled[: len(values)] = values
        table = np.zeros((batches, most_rows * processes), np.int64)
        table[:, :batch_size] = filled.reshape(batches, batch_size)
        return table.reshape(batches, most_rows, processes)

    table = by_process(lengths)
    longest, counts = table.max(axis=1), by_process(targets).sum(axis=1)
    means = table.sum(axis=1) // np.maximum(1, (table > 0).sum(axis=1))
    return np.stack([longest, means, counts])[:, longest > 0]


def _choose_lengths(lengths: np.ndarray, means: np.ndarray, longest: int) -> np.ndarray:
    """Return the shortest list of lengths to pad to that leaves little enough padding.

    If no list does, the longest one is returned.

    Args:
        lengths: Length of each batch's longest row, in tokens: (batches,).
        means: Mean length of each batch's rows, rounded down: (batches,).
        longest: Length of the longest row of any batch.
    """
    rounded = multiple_of_8(lengths)
    choices = _best_rungs(np.append(rounded, multiple_of_8(longest)), MAX_LENGTHS)
    for rungs in choices:
        padded = rungs[np.searchsorted(rungs, rounded)].sum()
        added, all_padding = padded - lengths.sum(), padded - means.sum()
        if added <= ENOUGH * padded and all_padding <= MOST * padded:
            return rungs
    return choices[-1]


def _choose_target_counts(groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the target counts to pad to, for each length.

    Each length starts with one target count. The count that saves the most padding is then added
    repeatedly.

    Args:
        groups: For each length, the target counts of its batches.
    """
    most = FEW_SHAPES if len(groups) <= FEW_LENGTHS else MAX_SHAPES
    spare = most - len(groups)
    total = sum(int(group.sum()) for group in groups)

    # For each length, find the best choices of 1, 2, ... counts, and what each count would save.
    options: list[list[np.ndarray]] = []
    savings: list[np.ndarray] = []
    for group in groups:
        rounded = multiple_of_8(group)
        choices = _best_rungs(rounded, 1 + spare)
        padding = [_padding(rounded, choice) for choice in choices]
        options.append(choices)
        savings.append(np.append(-np.diff(padding), 0))

    # Add the counts that save the most.
    added = [0] * len(groups)
    for _ in range(spare):
        saved = [saving[count] for saving, count in zip(savings, added, strict=True)]
        best = int(np.argmax(saved))
        if saved[best] <= WORTH * total:
            break
        added[best] += 1
    return [choices[count] for choices, count in zip(options, added, strict=True)]


def _padding(values: np.ndarray, rungs: np.ndarray) -> int:
    """Return the total padding that rounding the values up to the rungs adds."""
    return int((rungs[np.searchsorted(rungs, values)] - values).sum())


def _best_rungs(values: np.ndarray, most: int) -> list[np.ndarray]:
    """Return the best 1, 2, ... ``most`` rungs, which are the values that leave the least padding.

    The largest value is always a rung. The list ends early once every value is a rung.
    """
    distinct, amounts = np.unique(values, return_counts=True)
    if not len(distinct):
        return [np.zeros(0, np.int64)]
    below = np.concatenate([[0], np.cumsum(amounts)])

    # cost[j] is the smallest padded sum of the values among the first j distinct ones. came[j] is
    # the index of the first distinct value that is padded to the last of their rungs.
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

        # Collect the rungs, starting from the largest value.
        rungs: list[int] = []
        j = len(distinct)
        for back in reversed(steps):
            rungs.append(int(distinct[j - 1]))
            j = int(back[j])
        found.append(np.array(rungs[::-1]))
    return found
