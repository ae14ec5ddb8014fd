"""Control how often an epoch sees the rows of each source (``data_weights``).

The integer part of a weight is how many times an epoch sees every row of the source. The fractional
part is the share of rows that it sees once more, which are different ones in each epoch: if the n
rows are ordered by length and k of them are drawn, row p is drawn in epoch e when
(k (e - p) mod n) < k. So every epoch draws exactly k rows, of all lengths, and e epochs draw each
row either floor(e k / n) or ceil(e k / n) times. A weight of 0.5 shows each row once in two epochs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from .dataset import Examples

# Makes this choice independent of other random choices with the same seed
_WEIGHT_STREAM = 2


@dataclass(frozen=True)
class _WeightedSource:
    """A source's examples, and how often an epoch sees them.

    Attributes:
        indices: The examples, longest first; those of one length are in a seeded order.
        times: How many times an epoch sees each of them.
        drawn: How many of them it sees once more.
    """

    indices: np.ndarray
    times: int
    drawn: int

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Return the examples that an epoch sees."""
        count = len(self.indices)
        positions = np.arange(count)
        turns = self.drawn * (epoch - positions) % max(count, 1)
        return self._with_repeats(self.indices[turns < self.drawn])

    def longest(self) -> np.ndarray:
        """Return for each place of ``of_epoch`` the longest example that any epoch puts there."""
        positions = np.arange(self.drawn) * len(self.indices) // max(self.drawn, 1)
        return self._with_repeats(self.indices[positions])

    def _with_repeats(self, drawn: np.ndarray) -> np.ndarray:
        """Return every example ``times`` times, and the drawn ones once more."""
        return np.concatenate([self.indices] * self.times + [drawn])


class WeightedExamples(Examples):
    """Examples that an epoch may see several times or not at all, as ``of_epoch`` says.

    Args:
        examples: The examples of all sources.
        weights: The weight of each source.
        seed: Seed of the choice.

    Attributes:
        longest: For each place of an epoch, the longest example that any epoch puts there. These
            determine the shapes of the batches.

    Raises:
        DataError: A weight selects no row of its source.
    """

    def __init__(self, examples: Examples, weights: Sequence[float], seed: int):
        super().__init__(examples.shards, examples.spans)
        self._sources: list[_WeightedSource] = []
        for number, weight in enumerate(weights):
            indices = np.flatnonzero(examples.spans["source"] == number)
            times, share = divmod(weight, 1)
            drawn = round(share * len(indices))
            if len(indices) and not times and not drawn:
                raise DataError(
                    f"data_weights {weight} selects none of {len(indices)} rows: raise the weight,"
                    " or remove the source"
                )

            # Sort by length, and shuffle the rows of one length
            shuffled = np.random.default_rng([seed, _WEIGHT_STREAM, number]).permutation(indices)
            ordered = shuffled[np.argsort(-self.lengths[shuffled], kind="stable")]
            self._sources.append(_WeightedSource(ordered, int(times), drawn))
        self.longest = np.concatenate([source.longest() for source in self._sources])

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Return the indices of the examples that an epoch sees, as many in every epoch."""
        return np.concatenate([source.of_epoch(epoch) for source in self._sources])

    def fingerprint(self) -> str:
        """Return a digest of the examples and of those that each epoch sees."""
        digest = hashlib.blake2b(super().fingerprint().encode(), digest_size=16)
        for source in self._sources:
            digest.update(source.indices.tobytes())
            digest.update(f"{source.times} {source.drawn}".encode())
        return digest.hexdigest()


def reweight(examples: Examples, weights: Sequence[float], seed: int) -> WeightedExamples:
    """Return the examples such that an epoch sees source n ``weights[n]`` times.

    Args:
        examples: The examples of all sources.
        weights: The weight of each source.
        seed: Seed of the choice that a fractional weight needs.

    Raises:
        DataError: A weight selects no row of its source.
    """
    return WeightedExamples(examples, weights, seed)
