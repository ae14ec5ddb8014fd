"""How often an epoch sees each source's rows: ``data_weights``.

A weight's whole part is how many times an epoch has every row. Of the rest, a share, each epoch
draws other rows. In the order of their lengths, row p of n is drawn in epoch e where (k (e - p) mod
n) < k. So an epoch has exactly k of them, of all lengths, and e epochs have each row either floor(e
k / n) or ceil(e k / n) times: with 0.5, two epochs have all once.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from .dataset import Examples

_WEIGHT_STREAM = 2


@dataclass(frozen=True)
class _Source:
    """A source's examples, and how often an epoch sees them."""

    indices: np.ndarray  # the longest first, those of one length in a seeded order
    times: int  # that an epoch has all of them
    drawn: int  # of them once more, others in each epoch

    def of_epoch(self, epoch: int) -> np.ndarray:
        count = len(self.indices)
        turns = (epoch - np.arange(count)) % max(count, 1) * self.drawn % max(count, 1)
        return np.concatenate([self.indices] * self.times + [self.indices[turns < self.drawn]])

    def longest(self) -> np.ndarray:
        """Return for each place of ``of_epoch`` an example that is as long as any there, in any epoch."""
        places = np.arange(self.drawn) * len(self.indices) // max(self.drawn, 1)
        return np.concatenate([self.indices] * self.times + [self.indices[places]])


class WeightedExamples(Examples):
    """Examples of which an epoch sees some more often or less often than once: those of ``of_epoch``."""

    def __init__(self, examples: Examples, weights: Sequence[float], seed: int):
        super().__init__(examples.shards, examples.spans)
        self._sources: list[_Source] = []
        for number, weight in enumerate(weights):
            indices = np.flatnonzero(examples.spans["source"] == number)
            times, share = divmod(weight, 1)
            drawn = round(share * len(indices))
            if len(indices) and not times and not drawn:
                raise DataError(
                    f"data_weights {weight} leaves none of {len(indices)} rows: give it more, or"
                    " drop the source"
                )
            mixed = np.random.default_rng([seed, _WEIGHT_STREAM, number]).permutation(indices)
            ordered = mixed[np.argsort(-self.lengths[mixed], kind="stable")]
            self._sources.append(_Source(ordered, int(times), drawn))
        self.longest = np.concatenate([source.longest() for source in self._sources])
        """For each place of an epoch, an example as long as any there: the batches' shapes follow from these."""

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Return the examples that an epoch sees, as many in each."""
        return np.concatenate([source.of_epoch(epoch) for source in self._sources])

    def fingerprint(self) -> str:
        """Return a digest of the examples and of the epochs' choices."""
        digest = hashlib.blake2b(super().fingerprint().encode(), digest_size=16)
        for source in self._sources:
            digest.update(source.indices.tobytes() + f"{source.times} {source.drawn}".encode())
        return digest.hexdigest()


def reweight(examples: Examples, weights: Sequence[float], seed: int) -> WeightedExamples:
    """Return the examples with the source n seen ``weights[n]`` times in an epoch, a share by a seeded choice.

    Raises: DataError where a weight leaves nothing.
    """
    return WeightedExamples(examples, weights, seed)
