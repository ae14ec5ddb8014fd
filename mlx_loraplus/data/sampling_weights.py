"""Control how often an epoch uses the rows of each source (``data_weights``).

The integer part of a weight is the number of times that an epoch uses every row of the source. The
fractional part is the fraction of rows that an epoch uses one additional time. These rows are drawn
again for each epoch: if the n rows are sorted by length and k of them are drawn, row p is drawn in
epoch e if (k (e - p) mod n) < k. Every epoch therefore draws exactly k rows, which are spread over
all lengths. In e epochs, each row is drawn either floor(e k / n) or ceil(e k / n) times. With a
weight of 0.5, each row is used once in two epochs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError, counted
from .dataset import Examples

# Makes this choice independent of other random choices with the same seed
_WEIGHT_STREAM = 2


@dataclass(frozen=True)
class _WeightedSource:
    """A source's examples, and how often an epoch uses them.

    Attributes:
        indices: The examples, longest first; examples of equal length are in a seeded order.
        times: Number of times that an epoch uses every example.
        drawn: Number of examples that an epoch uses one additional time.
    """

    indices: np.ndarray
    times: int
    drawn: int

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Return the examples that an epoch uses."""
        count = len(self.indices)
        positions = np.arange(count)
        remainders = self.drawn * (epoch - positions) % max(count, 1)
        return self._with_repeats(self.indices[remainders < self.drawn])

    def longest(self) -> np.ndarray:
        """Return, for each position in ``of_epoch``, the longest example of any epoch."""
        positions = np.arange(self.drawn) * len(self.indices) // max(self.drawn, 1)
        return self._with_repeats(self.indices[positions])

    def _with_repeats(self, drawn: np.ndarray) -> np.ndarray:
        """Return every example ``times`` times, and the drawn examples one additional time."""
        return np.concatenate([self.indices] * self.times + [drawn])


class WeightedExamples(Examples):
    """Examples that an epoch may use several times or not at all; see ``of_epoch``.

    An epoch uses the examples of source n ``weights[n]`` times.

    Args:
        examples: The examples of all sources.
        weights: The weight of each source.
        seed: Seed of the choice that a fractional weight needs.

    Attributes:
        longest: For each position in an epoch, the longest example that any epoch has there. These
            examples determine the shapes of packed batches.

    Raises:
        DataError: A weight selects no row of its source.
    """

    def __init__(self, examples: Examples, weights: Sequence[float], seed: int):
        super().__init__(examples.tables, examples.spans)
        self._sources: list[_WeightedSource] = []
        for number, weight in enumerate(weights):
            indices = np.flatnonzero(examples.spans["source"] == number)
            times, fraction = divmod(weight, 1)
            drawn = round(fraction * len(indices))
            if len(indices) and not times and not drawn:
                raise DataError(
                    f"--data-weights {weight} selects none of {counted(len(indices), 'row')}: raise"
                    " the weight, or remove the source"
                )

            # Sort by length, and shuffle rows of equal length
            shuffled = np.random.default_rng([seed, _WEIGHT_STREAM, number]).permutation(indices)
            ordered = shuffled[np.argsort(-self.lengths[shuffled], kind="stable")]
            self._sources.append(_WeightedSource(ordered, int(times), drawn))
        self.longest = np.concatenate([source.longest() for source in self._sources])

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Return the indices of the examples of an epoch; every epoch has the same number."""
        return np.concatenate([source.of_epoch(epoch) for source in self._sources])

    def fingerprint(self) -> str:
        """Return a digest of the examples and of the choice for each epoch."""
        digest = hashlib.blake2b(super().fingerprint().encode(), digest_size=16)
        for source in self._sources:
            digest.update(source.indices.tobytes())
            digest.update(f"{source.times} {source.drawn}".encode())
        return digest.hexdigest()
