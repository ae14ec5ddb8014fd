"""The examples of a split: a sequence that is on disk, fitted to the length, held out and weighted by places alone.

What does not fit into ``max_seq_length`` is cut, dropped, split or refused here (``on_long``), and
counted. A row is split so that each part begins with the last token of the part before it: every
supervised token is predicted once. In the same way joined documents are cut, at any token.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..errors import DataError
from .rows import MOST_KEPT
from .token_cache import KIND_NAMES, SPAN, Shard
from .tokenize import Example

OnLong = Literal["truncate", "drop", "split", "error"]

_VALID_STREAM = 1  # so that no two choices by one seed are the same


class Examples(Sequence[Example]):
    """A sequence of examples that stay on disk until they are asked for: places in shards, SPAN for each."""

    def __init__(self, shards: Sequence[Shard], spans: np.ndarray):
        self.shards = shards
        self.spans = spans
        self.lengths = spans[
            "inputs"
        ]  # tokens that the model sees, those before the last supervised one: (examples,)
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


@dataclass
class Report:
    """What became of a split's rows; the places of bad and of long rows are those of the first of them."""

    max_seq_length: int
    on_long: OnLong
    rows: int = 0  # that are used, as so many examples
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    kinds: dict[str, int] = field(default_factory=dict)  # rows of each
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)  # where, and why
    long: int = 0  # above the limit: some of them cut, some dropped
    long_rows: list[str] = field(default_factory=list)  # where, and how long
    cut_rows: int = 0
    cut_tokens: int = 0
    dropped: int = 0
    drawn: int | None = None  # examples of an epoch, where ``data_weights`` say how many
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the counts in one line."""
        pieces = "" if self.examples == self.rows else f" as {self.examples:,} examples"
        line = (
            f"{self.rows:,} rows{pieces}, {self.tokens:,} tokens, {self.supervised_tokens:,}"
            " supervised"
        )
        if self.cut_rows:
            line += (
                f"; {self.cut_rows:,} rows cut at {self.max_seq_length:,} tokens"
                f" ({self.cut_tokens:,} lost)"
            )
        if self.dropped:
            why = f"nothing to learn in their first {self.max_seq_length:,} tokens"
            why = (
                why if self.on_long == "truncate" else f"longer than {self.max_seq_length:,} tokens"
            )
            line += f"; {self.dropped:,} rows dropped ({why})"
        if self.drawn is not None:
            line += f"; an epoch sees {self.drawn:,} examples, by data_weights"
        return line + (f"; {self.bad:,} bad rows dropped" if self.bad else "")

    def of_kinds(self) -> str:
        """Return how many rows of each kind there are."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())

    def count(self, examples: Examples) -> None:
        """Count the examples that are used."""
        first = examples.first_of_rows()
        kinds, counts = np.unique(examples.of_rows("kind")[first], return_counts=True)
        self.rows, self.examples = len(first), len(examples)
        self.tokens = int((examples.spans["stop"] - examples.spans["start"]).sum())
        self.supervised_tokens = int(examples.targets.sum(dtype=np.int64))
        self.kinds = {
            KIND_NAMES[kind]: int(count) for kind, count in zip(kinds, counts, strict=True)
        }

    def add(self, shard: Shard) -> None:
        """Add what is to be told of a shard."""
        findings = shard.findings
        self.bad += findings.bad
        self.bad_rows += findings.places(shard.name)
        for note, (count, line) in findings.notes.items():
            self.notes.append(f"{note} ({count:,} rows, such as {shard.name}:{line})")


def fit(shard: Shard, report: Report) -> np.ndarray:
    """Return the spans of a shard's examples, none too long and none without a supervised token.

    The report holds the limit and what to do with longer examples, and counts it; documents are cut
    in any case.
    """
    limit, on_long = report.max_seq_length, report.on_long
    if shard.documents:
        starts = np.arange(0, max(len(shard.tokens) - 1, 0), limit - 1)
        rows = np.searchsorted(shard.spans["stop"], starts, side="right")
        return _spans(
            shard, list(zip(rows.tolist(), starts.tolist(), (starts + limit).tolist(), strict=True))
        )
    lengths = shard.spans["stop"] - shard.spans["start"]
    long = np.flatnonzero(lengths > limit)
    if not len(long):
        return np.array(shard.spans)
    pieces = []
    for span in shard.spans[long] if on_long in ("truncate", "split") else ():
        row, start, stop = int(span["row"]), int(span["start"]), int(span["stop"])
        last = stop - 1 if on_long == "split" else start + 1
        pieces += [
            (row, place, min(place + limit, stop)) for place in range(start, last, limit - 1)
        ]
    cut = _spans(shard, pieces)
    kept = np.isin(shard.spans["start"], cut["start"]) | (on_long in ("split", "error"))
    report.long += len(long)
    report.dropped += int((~kept[long]).sum())
    if on_long == "truncate":
        report.cut_rows += len(cut)
        report.cut_tokens += int(lengths[long][kept[long]].sum()) - limit * len(cut)
    for i in long[:MOST_KEPT]:
        line, fate = shard.rows["line"][shard.spans["row"][i]], "" if kept[i] else ", dropped"
        report.long_rows.append(f"{shard.name}:{line} ({lengths[i]:,} tokens{fate})")
    fitted = np.concatenate([shard.spans[lengths <= limit], cut])
    return fitted[np.argsort(fitted["start"], kind="stable")]


def _spans(shard: Shard, pieces: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return SPAN for those (row, start, stop) in which something but the first token is supervised."""
    spans = np.zeros(len(pieces), SPAN)
    used = 0
    for row, start, stop in pieces:
        learned = np.flatnonzero(shard.supervised[start + 1 : stop])
        if len(learned):
            spans[used] = (
                row,
                start,
                min(stop, len(shard.tokens)),
                learned[-1] + 1,
                len(learned),
                0,
                0,
            )
            used += 1
    return spans[:used]


def split_holdout(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Part examples in two, by a seeded choice; rows whose conversations begin alike stay together, so none leaks.

    ``share`` is that of the second part, in (0, 1). Raises DataError where there are fewer than two
    beginnings.
    """
    asked = examples.of_rows("begins")
    joined = np.array([shard.documents for shard in examples.shards], bool)[examples.spans["shard"]]
    asked[joined] = np.arange(len(asked))[joined]  # each part of a document is on its own
    _, groups, sizes = np.unique(asked, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise DataError(
            f"valid_split {share} needs rows of at least two prompts, and there are {len(sizes)}"
            " (chats that begin with the same messages count as one): give a file of validation"
            " rows instead"
        )
    order = np.random.default_rng([seed, _VALID_STREAM]).permutation(len(sizes))
    enough = int(np.searchsorted(np.cumsum(sizes[order]), max(1, round(share * len(examples))))) + 1
    held = np.isin(groups, order[: min(enough, len(sizes) - 1)])
    return examples.take(np.flatnonzero(~held)), examples.take(np.flatnonzero(held))
