"""The examples of a split: a sequence that is on disk, indexed without being read."""

import hashlib
from collections.abc import Sequence

import numpy as np

from .shards import Shard
from .templates import Example


class Examples(Sequence[Example]):
    """A sequence of examples that stay on disk until they are asked for: places in shards, SPAN for each."""

    def __init__(self, shards: Sequence[Shard], spans: np.ndarray):
        self.shards = shards
        self.spans = spans
        self.lengths = spans["inputs"]  # tokens that the model sees, those before the last supervised one: (examples,)
        self.targets = spans["targets"]  # tokens that are supervised: (examples,)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Example:  # pyright: ignore[reportIncompatibleMethodOverride]
        span = self.spans[index]
        shard, whole = self.shards[span["shard"]], slice(span["start"], span["stop"])
        supervised = np.array(shard.supervised[whole])
        supervised[:1] = False  # where a row was cut, the part before has it as its last
        return Example(np.array(shard.tokens[whole]), supervised, self.place(index))

    def place(self, index: int) -> str:
        """Return where an example comes from, "train.jsonl:17"."""
        span = self.spans[index]
        shard = self.shards[span["shard"]]
        return f"{shard.name}:{shard.rows['line'][span['row']]}"

    def take(self, indices: np.ndarray) -> "Examples":
        """Return the examples with these indices, in their order."""
        return Examples(self.shards, self.spans[indices])

    def first_of_rows(self) -> np.ndarray:
        """Return the index of the first example of each row, in their order, (rows,)."""
        rows = (self.spans["shard"].astype(np.int64) << 48) | self.spans["row"]
        return np.sort(np.unique(rows, return_index=True)[1])

    def fingerprint(self) -> str:
        """Return a digest of the tokens, what is supervised and how they are cut into examples, in their order."""
        digest = hashlib.blake2b(self.spans.tobytes(), digest_size=16)
        for shard in self.shards:
            digest.update(shard.tokens.data)
            digest.update(shard.supervised.data)
        return digest.hexdigest()

    def of_rows(self, name: str) -> np.ndarray:
        """Return what each example's row has under a name of ROW, (examples,)."""
        values = np.zeros(len(self), self.shards[0].rows.dtype[name] if self.shards else "u8")
        for number, shard in enumerate(self.shards):
            here = self.spans["shard"] == number
            values[here] = shard.rows[name][self.spans["row"][here]]
        return values
