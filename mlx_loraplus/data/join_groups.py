"""Join groups of rows that are found to belong together."""

from collections.abc import Sequence

import numpy as np

MOST_BRANCHES = 8
"""Most other groups that may share a text; one that more share is common, and joins nothing."""


class Joins:
    """Groups that are joined step by step (union-find, with path halving)."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def root(self, group: int) -> int:
        """Return the number that all groups joined with a group share."""
        parents = self._parents
        while parents.get(group, group) != group:
            parents[group] = parents.get(parents[group], parents[group])
            group = parents[group]
        return group

    def add(self, one: int, other: int) -> None:
        """Join two groups."""
        low, high = sorted((self.root(one), self.root(other)))
        self._parents[high] = low

    def apply(self, groups: np.ndarray) -> np.ndarray:
        """Return the numbers of groups after all joins."""
        joined = np.arange(int(groups.max(initial=-1)) + 1)
        for group in self._parents:
            joined[group] = self.root(group)
        return joined[groups]


def join_pairs(first: np.ndarray, second: np.ndarray) -> Joins:
    """Join the groups of each pair, (pairs,) each."""
    joins = Joins()
    differs = first != second
    for one, other in zip(first[differs].tolist(), second[differs].tolist(), strict=True):
        joins.add(one, other)
    return joins


def distinct_pairs(pairs: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct pairs, as an array of first numbers and an array of second numbers.

    Args:
        pairs: Arrays of pairs, (pairs, 2) each.
        count: A number that is greater than every second number.
    """
    # Store each pair as one number
    numbers = [np.zeros(0, np.int64)]
    numbers += [np.unique(each[:, 0] * count + each[:, 1]) for each in pairs]
    first, second = np.divmod(np.unique(np.concatenate(numbers)), max(count, 1))
    return first, second
