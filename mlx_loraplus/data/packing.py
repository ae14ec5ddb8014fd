"""Short examples share rows, so that every batch has one shape and hardly any padding.

Examples go, the longest first, into the row that they leave least space in (best fit decreasing).
The rows that come out depend on the lengths alone: so they are made once, every epoch has as many,
and an epoch only deals the examples of equal length to other places and shuffles the rows.
"""

import math
from collections.abc import Sequence

import numpy as np

from ..config import DataConfig
from .batches import Batch, Batches, lay_out, round_up
from .tokenize import Example
from .weights import WeightedExamples

# A row of so many tokens makes a token twice as dear, since attention looks at the whole row
ATTENTION_LENGTH = 16_384
SAMPLE = 4_096  # lengths that the row's length is found from


class PackedBatches(Batches):
    """``Batches`` of packed rows, all of one shape; the last of an epoch has empty rows.

    Args:
        examples, batch_size, seed, shares: As for ``Batches``.
        max_length: Longest row, in tokens.

    Attributes:
        row_length: Tokens in a row, from ``choose_length``.
        fill: Share of an epoch's tokens that are no padding.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        max_length: int,
        shares: int = 1,
    ):
        super().__init__(examples, batch_size, seed, shares)
        weighted = isinstance(examples, WeightedExamples)
        self._bounds = (
            self.lengths[examples.longest] if weighted else self.lengths
        )  # what a place holds in any epoch
        descending = -np.sort(-self._bounds)
        self.row_length = choose_length(descending, batch_size, max_length)
        rows = best_fit(descending, self.row_length)
        self._sizes = np.array([len(row) for row in rows])
        self._ends = np.cumsum(self._sizes)
        self._members = np.concatenate(rows).astype(np.int64)  # of all rows, one after another
        self.per_epoch = -(-len(rows) // batch_size)
        self.fill = float(descending.sum() / (self.per_epoch * batch_size * self.row_length))

    def __str__(self) -> str:
        """Return what packing did in one line."""
        return (
            f"{self.seen:,} rows packed into {len(self._ends):,} of {self.row_length:,} tokens,"
            f" {self.fill:.1%} full"
        )

    def largest(self) -> tuple[int, int]:
        """Return the (rows, length) of every batch, or share of it."""
        return self.most_rows, self.row_length

    def shape_of(self, rows: Sequence[np.ndarray]) -> tuple[int, int, int]:
        """Return the (rows, length, targets) of a batch: an epoch's last has empty rows."""
        return *self.largest(), round_up(sum(int(self.targets[row].sum()) for row in rows))

    def collate(self, rows: Sequence[np.ndarray]) -> Batch:
        """Read a batch's rows and lay them out, with empty rows up to ``most_rows``."""
        examples = [[self.examples[int(i)] for i in row] for row in rows]
        return lay_out(examples + [[]] * (self.most_rows - len(rows)), packed=self.row_length)

    def _rows(self, within: int) -> list[np.ndarray]:
        descending, rows = self._order
        chosen = rows[within * self.batch_size : (within + 1) * self.batch_size]
        return [
            descending[self._members[self._ends[row] - self._sizes[row] : self._ends[row]]]
            for row in chosen
        ]

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the examples, the longest first and those of a length shuffled, and the order of the packed rows."""
        generator = np.random.default_rng([self.seed, epoch])
        places = generator.permutation(self.seen)
        descending = places[np.argsort(-self._bounds[places], kind="stable")]
        return self._of_epoch(epoch)[descending], generator.permutation(len(self._ends))


def choose_length(descending: np.ndarray, batch_size: int, max_length: int) -> int:
    """Return the rung of the ladder at which an epoch is cheapest, tokens (1 + rung / 16,384) with its padding.

    The empty rows of an epoch's last batch count as padding; the longest rung is ``max_length``,
    rounded up.
    """
    sample = descending[:: 1 + len(descending) // SAMPLE]

    def cost(rung: int) -> float:
        rows = len(best_fit(sample, rung)) * len(descending) / len(sample)
        return math.ceil(rows / batch_size) * batch_size * rung * (1 + rung / ATTENTION_LENGTH)

    rungs = [round_up(int(descending[0]))]
    while rungs[-1] < max_length:
        rungs.append(round_up(rungs[-1] + 1))
    return min(rungs, key=cost)


def plan_batches(
    examples: Sequence[Example], settings: DataConfig, seed: int, shares: int = 1
) -> Batches:
    """Return a run's batches, packed if ``settings.pack``."""
    if settings.pack:
        return PackedBatches(examples, settings.batch_size, seed, settings.max_seq_length, shares)
    return Batches(examples, settings.batch_size, seed, shares)


def best_fit(descending: np.ndarray, space: int) -> list[list[int]]:
    """Return rows of up to ``space`` tokens, each a list of indices into ``descending``, lengths longest first."""
    rows: list[list[int]] = []
    with_space: list[list[int]] = [
        [] for _ in range(space + 1)
    ]  # rows by the tokens they have left
    left = 0  # bit n: there is a row with n tokens left
    for index, length in enumerate(descending.tolist()):
        enough = left >> length
        if enough:
            found = length + (enough & -enough).bit_length() - 1  # the lowest bit: the tightest row
            row = with_space[found].pop()
            if not with_space[found]:
                left ^= 1 << found
        else:
            found, row = space, len(rows)
            rows.append([])
        rows[row].append(index)
        with_space[found - length].append(row)
        left |= 1 << (found - length)
    return rows
