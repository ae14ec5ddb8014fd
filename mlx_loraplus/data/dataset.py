"""The examples of a split: a sequence on disk, limited to a maximum length.

The setting ``on_long`` decides whether a row longer than ``max_seq_length`` is truncated, dropped,
split or refused. The report counts these rows. When a row is split, each part begins with the last
token of the previous part, so that every supervised token is predicted exactly once. Documents are
joined and then split in the same way, at any token.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..errors import DataError, counted
from .conversations import find_conversations
from .rows import MOST_KEPT
from .token_cache import KIND_NAMES, SPAN, Shard
from .tokenize import Example

OnLong = Literal["truncate", "drop", "split", "error"]

# Makes this choice independent of other random choices with the same seed
_VALID_STREAM = 1


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


@dataclass
class Report:
    """Counts of a split's rows and examples, and the locations of the first bad and long rows.

    Attributes:
        max_seq_length: Maximum length of an example, in tokens.
        on_long: The setting for longer rows.
        rows: Rows that are used.
        examples: Examples made from these rows.
        tokens: Tokens of the examples.
        supervised_tokens: Supervised tokens of the examples.
        kinds: Rows of each kind.
        bad: Rows that could not be used.
        bad_rows: Locations and problems of the first bad rows.
        long: Rows longer than the maximum, including those that are dropped.
        long_rows: Locations and lengths of the first long rows.
        cut_rows: Rows that are truncated.
        cut_tokens: Tokens that are lost by truncation.
        dropped: Rows that are dropped because of their length.
        drawn: Examples in an epoch, if ``data_weights`` are set.
        notes: Other remarks.
    """

    max_seq_length: int
    on_long: OnLong
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    long: int = 0
    long_rows: list[str] = field(default_factory=list)
    cut_rows: int = 0
    cut_tokens: int = 0
    dropped: int = 0
    drawn: int | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the counts in one line."""
        as_examples = ""
        if self.examples != self.rows:
            as_examples = f" as {counted(self.examples, 'example')}"
        parts = [
            f"{counted(self.rows, 'row')}{as_examples}, {counted(self.tokens, 'token')},"
            f" {self.supervised_tokens:,} supervised"
        ]
        if self.cut_rows:
            parts.append(
                f"{counted(self.cut_rows, 'row')} truncated to {self.max_seq_length:,} tokens"
                f" ({self.cut_tokens:,} lost)"
            )
        if self.drawn is not None:
            parts.append(f"{counted(self.drawn, 'example')} in an epoch, by data_weights")
        return "; ".join(parts + self.dropped_rows())

    def dropped_rows(self) -> list[str]:
        """Return how many rows are dropped, for each reason."""
        parts: list[str] = []
        if self.dropped and self.on_long == "truncate":
            why = f"nothing to train on in their first {self.max_seq_length:,} tokens"
            parts.append(f"{counted(self.dropped, 'row')} dropped ({why})")
        elif self.dropped:
            why = f"longer than {self.max_seq_length:,} tokens"
            parts.append(f"{counted(self.dropped, 'row')} dropped ({why})")
        if self.bad:
            parts.append(f"{counted(self.bad, 'bad row')} dropped")
        return parts

    def of_kinds(self) -> str:
        """Return how many rows of each kind there are."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())

    def count(self, examples: Examples) -> None:
        """Count the examples that are used, and their rows and tokens."""
        first = examples.first_of_rows()
        self.rows = len(first)
        self.examples = len(examples)
        self.tokens = int((examples.spans["stop"] - examples.spans["start"]).sum())
        self.supervised_tokens = int(examples.targets.sum(dtype=np.int64))

        kinds, counts = np.unique(examples.of_rows("kind")[first], return_counts=True)
        self.kinds = {}
        for kind, count in zip(kinds, counts, strict=True):
            self.kinds[KIND_NAMES[kind]] = int(count)

    def add(self, shard: Shard) -> None:
        """Add a shard's bad rows and notes."""
        problems = shard.problems
        self.bad += problems.bad
        self.bad_rows += problems.places(shard.name)
        for note, (count, line) in problems.notes.items():
            self.notes.append(f"{note} ({counted(count, 'row')}, for example {shard.name}:{line})")

    def add_long(self, shard: Shard, long: np.ndarray, dropped: np.ndarray) -> None:
        """Add a shard's long rows.

        Args:
            shard: The shard.
            long: Indices of the examples that are too long.
            dropped: Which of them are dropped, (long examples,) bool.
        """
        self.long += len(long)
        self.dropped += int(dropped.sum())
        for index, is_dropped in zip(long[:MOST_KEPT], dropped[:MOST_KEPT], strict=True):
            span = shard.spans[index]
            line = shard.rows["line"][span["row"]]
            length = span["stop"] - span["start"]
            outcome = ", dropped" if is_dropped else ""
            self.long_rows.append(f"{shard.name}:{line} ({length:,} tokens{outcome})")


def truncate_or_split(shard: Shard, report: Report) -> np.ndarray:
    """Return the spans of a shard's examples, limited to the maximum length.

    Every example has a supervised token. ``on_long`` does not apply to documents, which are always
    split.

    Args:
        shard: The shard.
        report: Provides the maximum length and ``on_long``, and counts the long rows.
    """
    limit = report.max_seq_length
    if shard.documents:
        return _split_documents(shard, limit)

    lengths = shard.spans["stop"] - shard.spans["start"]
    is_long = lengths > limit
    if not is_long.any():
        return np.array(shard.spans)

    # Cut each long row into one or more pieces; a piece without a supervised token is dropped
    pieces: list[tuple[int, int, int]] = []
    for span in shard.spans[is_long]:
        row, start, stop = int(span["row"]), int(span["start"]), int(span["stop"])
        if report.on_long == "truncate":
            pieces.append((row, start, start + limit))
        elif report.on_long == "split":
            pieces += _overlapping_pieces(row, start, stop, limit)
    cut = _spans(shard, pieces)

    # Count the rows; with "error", they are reported as long and not as dropped
    is_dropped = ~np.isin(shard.spans["start"][is_long], cut["start"])
    if report.on_long in ("split", "error"):
        is_dropped[:] = False
    report.add_long(shard, np.flatnonzero(is_long), is_dropped)
    if report.on_long == "truncate":
        report.cut_rows += len(cut)
        report.cut_tokens += int(lengths[is_long][~is_dropped].sum()) - limit * len(cut)

    # Put the pieces where their rows were
    spans = np.concatenate([shard.spans[~is_long], cut])
    return spans[np.argsort(spans["start"], kind="stable")]


def _split_documents(shard: Shard, limit: int) -> np.ndarray:
    """Return SPAN for joined documents, cut at the maximum length."""
    starts = np.arange(0, max(len(shard.tokens) - 1, 0), limit - 1)
    rows = np.searchsorted(shard.spans["stop"], starts, side="right")
    pieces = zip(rows.tolist(), starts.tolist(), (starts + limit).tolist(), strict=True)
    return _spans(shard, list(pieces))


def _overlapping_pieces(row: int, start: int, stop: int, limit: int) -> list[tuple[int, int, int]]:
    """Return (row, start, stop) of parts that begin with the last token of the previous part."""
    starts = range(start, stop - 1, limit - 1)
    return [(row, first, min(first + limit, stop)) for first in starts]


def _spans(shard: Shard, pieces: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return SPAN for each (row, start, stop) that has a supervised token after its first."""
    spans = np.zeros(len(pieces), SPAN)
    used = 0
    for row, start, stop in pieces:
        targets = np.flatnonzero(shard.supervised[start + 1 : stop])
        if len(targets):
            stop = min(stop, len(shard.tokens))  # noqa: PLW2901
            spans[used] = (row, start, stop, targets[-1] + 1, len(targets), 0, 0)
            used += 1
    return spans[:used]


def group_conversations(examples: Examples) -> np.ndarray:
    """Return the conversation of each example, as a number; see ``find_conversations``."""
    conversations = examples.pick(find_conversations(examples.shards))

    # Do not group parts of documents
    has_documents = np.array([shard.documents for shard in examples.shards], bool)
    is_document = has_documents[examples.spans["shard"]]
    conversations[is_document] = -1 - np.flatnonzero(is_document)
    return conversations


def split_holdout(
    examples: Examples, conversations: np.ndarray, share: float, seed: int
) -> tuple[Examples, Examples]:
    """Divide examples at random into training and validation examples.

    The rows of a conversation stay together, so that no training row also appears in validation. A
    conversation that is longer than the validation examples should be is for training.

    Args:
        examples: The examples to divide.
        conversations: From ``group_conversations``.
        share: Share of validation examples, in (0, 1).
        seed: Seed of the choice.

    Raises:
        DataError: All rows belong to one conversation.
    """
    _, groups, sizes = np.unique(conversations, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise DataError(
            f"valid_split {share} needs rows with at least two different prompts, but there are"
            f" {len(sizes)} (rows that begin with the same messages or text count as one): provide"
            " a validation file instead"
        )

    # Take groups in random order until there are enough examples, but leave one for training
    order = np.random.default_rng([seed, _VALID_STREAM]).permutation(len(sizes))
    wanted = max(1, round(share * len(examples)), int(sizes.min()))
    order = order[sizes[order] <= wanted]
    enough = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    chosen = order[: min(enough, len(sizes) - 1)]
    is_valid = np.isin(groups, chosen)
    return examples.take(np.flatnonzero(~is_valid)), examples.take(np.flatnonzero(is_valid))
