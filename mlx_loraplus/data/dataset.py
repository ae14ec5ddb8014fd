"""The examples of a split: a sequence whose tokens stay on disk.

A ``Shard`` holds the tokens of one table, which ``token_cache`` writes. ``Examples`` are parts of
shards.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .row_kinds import KINDS
from .row_problems import RowProblems
from .tokenize import Example

KIND_NAMES = (*KINDS, "preference", "desirable", "undesirable")


class StoredRow(NamedTuple):
    """One row of a table.

    The digests ignore white space and case, except those of ``growing_prefixes.text_digests``.
    """

    line: int  # line or row number
    kind: int  # index into KIND_NAMES
    thinking: bool  # whether the row's prompt allows thoughts
    whole: int  # digest of the whole row
    asked: int  # digest of its prompt
    begins: int  # digest of the beginning of its conversation
    system: int = 0  # digest of its system message, or 0
    text: int = 0  # from ``text_digests``
    prompt: int = 0  # from ``text_digests``
    beginnings: int = 0  # number of digests in the file of beginnings


class Span(NamedTuple):
    """One example: a row, or a part of one."""

    row: int  # index of its row
    start: int  # its first token
    stop: int  # the end of its tokens
    inputs: int  # number of input tokens
    targets: int  # number of supervised tokens
    source: int = 0  # index of its source, set when shards are combined
    shard: int = 0  # index of its shard, set when shards are combined


_ROW_TYPES = ("i8", "u1", "u1", "u8", "u8", "u8", "u8", "u8", "u8", "i4")
ROW = np.dtype(list(zip(StoredRow._fields, _ROW_TYPES, strict=True)))
_SPAN_TYPES = ("i8", "i8", "i8", "i4", "i4", "i4", "i4")
SPAN = np.dtype(list(zip(Span._fields, _SPAN_TYPES, strict=True)))


@dataclass(frozen=True)
class Shard:
    """The tokens of one table.

    Attributes:
        name: The table's name.
        documents: Whether the table contains documents, which may be joined and split anywhere.
        tokens: Token ids of all rows, one after another, (tokens,) int32.
        supervised: Whether each token is supervised, (tokens,) bool.
        rows: The rows, (rows,) ROW.
        spans: The examples before the maximum length is applied, (examples,) SPAN.
        beginnings: The file with the digests of the beginnings of all rows, one row after another,
            uint64. It is not mapped, because mapped pages count as memory once they are read.
        problems: Bad rows and notes.
        largest: The largest token id, or -1 if there are no tokens.
        systems: The system messages of the rows by their digests; only the first hundred.
    """

    name: str
    documents: bool
    tokens: np.ndarray
    supervised: np.ndarray
    rows: np.ndarray
    spans: np.ndarray
    problems: RowProblems
    largest: int
    systems: Mapping[int, str] = field(default_factory=dict[int, str])
    beginnings: Path | None = None


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

        # If the example continues a row, its first token is already predicted in the part before
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
