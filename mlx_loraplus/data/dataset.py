"""The examples of a split: a sequence whose tokens stay on disk."""

import hashlib
from collections.abc import Sequence

import numpy as np

from .token_cache import Shard
from .tokenize import Example


class Examples(Sequence[Example]):
    """A sequence of examples that are read from disk when they are indexed.

    Args:
        shards: The shards that hold the tokens.
        spans: The position of each example in the shards, (examples,) SPAN.

    Attributes:
        lengths: Number of input tokens, which end before the last supervised token, (examples,).
        targets: Number of supervised tokens, (examples,).
    """

    def __init__(self, shards: Sequence[Shard], spans: np.ndarray):
        self.shards = shards
        self.spans = spans
        self.lengths = spans["inputs"]
        self.targets = spans["targets"]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, index: int
    ) -> Example:
        span = self.spans[index]
        shard = self.shards[span["shard"]]
        where = slice(span["start"], span["stop"])

        # If the example continues a row, the previous part already predicts its first token
        supervised = np.array(shard.supervised[where])
        supervised[:1] = False
        return Example(np.array(shard.tokens[where]), supervised, self.place(index))

    def place(self, index: int) -> str:
        """Return the location of an example's row, such as "train.jsonl:17"."""
        span = self.spans[index]
        shard = self.shards[span["shard"]]
        return f"{shard.name}:{shard.rows['line'][span['row']]}"

    def take(self, indices: np.ndarray) -> "Examples":
        """Return the examples with these indices, in this order."""
        return Examples(self.shards, self.spans[indices])

    def first_of_rows(self) -> np.ndarray:
        """Return the index of the first example of each row, in ascending order, (rows,)."""
        # One number for each pair of shard and row
        rows = (self.spans["shard"].astype(np.int64) << 48) | self.spans["row"]
        return np.sort(np.unique(rows, return_index=True)[1])

    def fingerprint(self) -> str:
        """Return a digest of the examples: their tokens, their supervision and their order."""
        digest = hashlib.blake2b(self.spans.tobytes(), digest_size=16)
        for shard in self.shards:
            digest.update(shard.tokens.data)
            digest.update(shard.supervised.data)
        return digest.hexdigest()

    def of_rows(self, name: str) -> np.ndarray:
        """Return a field of ROW for each example's row, (examples,)."""
        return self.pick([shard.rows[name] for shard in self.shards])

    def pick(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return the value of each example's row, (examples,).

        Args:
            values: For each shard, a value of each row.
        """
        picked = np.zeros(len(self), values[0].dtype if values else np.int64)
        for number, of_shard in enumerate(values):
            in_shard = self.spans["shard"] == number
            picked[in_shard] = of_shard[self.spans["row"][in_shard]]
        return picked
