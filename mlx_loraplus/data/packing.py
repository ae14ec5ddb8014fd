"""Pack short examples into shared rows, so that every batch has one shape and little padding.

The examples are placed from the longest to the shortest, each into the row in which it leaves the
least space (best-fit decreasing). The rows depend only on the lengths of the examples. They are
therefore computed once, and every epoch has the same number of rows. Each epoch permutes examples
of equal length and shuffles the rows.
"""

import math
from collections.abc import Sequence

import numpy as np

from ..errors import counted
from .batches import Batch, Batches, lay_out, round_up
from .sampling_weights import WeightedExamples
from .tokenize import Example

# Row length at which attention, which covers the whole row, doubles the cost of a token
ATTENTION_LENGTH = 16_384

# Number of examples that the choice of the row length is based on
SAMPLE = 4_096


class PackedBatches(Batches):
    """``Batches`` of packed rows, all of one shape; the last batch of an epoch has empty rows.

    Args:
        examples, batch_size, seed, processes: As for ``Batches``.
        max_length: Maximum length of an example, in tokens; rows may be longer by rounding.

    Attributes:
        row_length: Tokens in a row, from ``choose_length``.
        fill: Fraction of an epoch's tokens that are not padding.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        max_length: int,
        processes: int = 1,
    ):
        super().__init__(examples, batch_size, seed, processes)

        # For each position in an epoch, the maximum length of an example at this position
        self._bounds = self.lengths
        if isinstance(examples, WeightedExamples):
            self._bounds = self.lengths[examples.longest]
        descending = -np.sort(-self._bounds)

        # The examples of all rows, one row after another, and the end of each row
        self.row_length = choose_length(descending, self.batch_size, max_length)
        rows = best_fit(descending, self.row_length)
        self._members = np.concatenate(rows).astype(np.int64)
        self._sizes = np.array([len(row) for row in rows])
        self._ends = np.cumsum(self._sizes)

        self.per_epoch = math.ceil(len(rows) / self.batch_size)
        capacity = self.per_epoch * self.batch_size * self.row_length
        self.fill = float(descending.sum() / capacity)

    def __str__(self) -> str:
        """Return the result of packing in one line."""
        rows = counted(len(self._ends), "row")
        return (
            f"{counted(self.epoch_size, 'example')} packed into {rows} of {self.row_length:,}"
            f" tokens, {self.fill:.1%} full"
        )

    def largest(self) -> tuple[int, int]:
        """Return the (rows, length) of every batch, or of one process's part of it."""
        return self.most_rows, self.row_length

    def shape_of(self, rows: Sequence[np.ndarray]) -> tuple[int, int, int]:
        """Return the (rows, length, targets) of a batch; the last of an epoch has empty rows."""
        targets = sum(int(self.target_counts[row].sum()) for row in rows)
        return *self.largest(), round_up(targets)

    def collate(self, rows: Sequence[np.ndarray]) -> Batch:
        """Read the examples of a batch and lay them out, with empty rows up to ``most_rows``."""
        filled = [[self.examples[int(i)] for i in row] for row in rows]
        empty: list[list[Example]] = [[]] * (self.most_rows - len(rows))
        return lay_out(filled + empty, packed=self.row_length)

    def _rows(self, number: int) -> list[np.ndarray]:
        """Return the rows of a batch by its number in the current epoch."""
        descending, order = self._order
        start = number * self.batch_size

        rows: list[np.ndarray] = []
        for row in order[start : start + self.batch_size]:
            end = self._ends[row]
            members = self._members[end - self._sizes[row] : end]
            rows.append(descending[members])
        return rows

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the examples in order of descending length, and the order of the rows.

        Examples of equal length are in random order. The rows are also in random order.
        """
        generator = np.random.default_rng([self.seed, epoch])
        places = generator.permutation(self.epoch_size)
        descending = places[np.argsort(-self._bounds[places], kind="stable")]
        return self._of_epoch(epoch)[descending], generator.permutation(len(self._ends))


def choose_length(descending: np.ndarray, batch_size: int, max_length: int) -> int:
    """Return the row length with the lowest cost per epoch.

    The candidates are the results of ``round_up``, from the length of the longest example to
    ``round_up(max_length)``. Each token costs 1 + length / 16,384. This includes padding and the
    empty rows of the last batch.

    Args:
        descending: Lengths of the examples in tokens, longest first.
        batch_size: Rows in a batch.
        max_length: Maximum length of an example, in tokens.
    """
    sample = descending[:: 1 + len(descending) // SAMPLE]

    def cost(length: int) -> float:
        rows = len(best_fit(sample, length)) * len(descending) / len(sample)
        tokens = math.ceil(rows / batch_size) * batch_size * length
        return tokens * (1 + length / ATTENTION_LENGTH)

    ladder = [round_up(int(descending[0]))]
    while ladder[-1] < max_length:
        ladder.append(round_up(ladder[-1] + 1))
    return min(ladder, key=cost)


def best_fit(descending: np.ndarray, space: int) -> list[list[int]]:
    """Distribute examples over rows with the best-fit decreasing algorithm.

    Args:
        descending: Lengths of the examples in tokens, longest first.
        space: Tokens that fit in a row.

    Returns:
        The rows, each a list of indices into ``descending``.
    """
    rows: list[list[int]] = []

    # with_space[n] lists the rows with n tokens left; bit n of the mask is set if there are any
    with_space: list[list[int]] = [[] for _ in range(space + 1)]
    mask = 0
    for index, length in enumerate(descending.tolist()):
        enough = mask >> length
        if enough:
            # The lowest set bit gives the row with the least space that is enough
            lowest = enough & -enough
            left = length + lowest.bit_length() - 1
            row = with_space[left].pop()
            if not with_space[left]:
                mask ^= 1 << left
        else:
            left = space
            row = len(rows)
            rows.append([])

        rows[row].append(index)
        with_space[left - length].append(row)
        mask |= 1 << (left - length)
    return rows
