"""The report on a split: counts of its rows and examples, and where the bad and long rows are."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..errors import counted
from .dataset import EncodedTable, Examples
from .row_problems import MOST_KEPT
from .stored_rows import KIND_NAMES

OnLong = Literal["truncate", "drop", "split", "error"]
OnBad = Literal["error", "drop"]


@dataclass
class SplitReport:
    """Counts of a split's rows and examples, and the locations of the first bad and long rows.

    Attributes:
        max_seq_length: Maximum length of an example, in tokens.
        on_long: The setting for longer rows.
        on_bad: The setting for rows that could not be used.
        rows: Rows that are used.
        examples: Examples made from these rows.
        tokens: Tokens of the examples, up to the last supervised one of each.
        supervised_tokens: Supervised tokens of the examples.
        kinds: Rows of each kind.
        bad: Rows that could not be used.
        bad_rows: Locations and problems of the first bad rows.
        lacks_fields: Whether one of these rows lacks fields.
        long: Rows longer than the maximum, including those that are dropped.
        long_rows: Locations and lengths of the first long rows.
        cut_rows: Rows that are truncated.
        cut_tokens: Tokens that are lost by truncation.
        dropped: Rows that are dropped because of their length.
        equal: Pairs that are dropped because truncation made their answers equal.
        drawn: Examples in an epoch, if ``data_weights`` are set.
        notes: Other notes for the user.
    """

    max_seq_length: int
    on_long: OnLong
    on_bad: OnBad = "error"
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    lacks_fields: bool = False
    long: int = 0
    long_rows: list[str] = field(default_factory=list)
    cut_rows: int = 0
    cut_tokens: int = 0
    dropped: int = 0
    equal: int = 0
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
            parts.append(f"{counted(self.drawn, 'example')} in an epoch, by --data-weights")
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
        if self.equal:
            why = f"equal answers in their first {self.max_seq_length:,} tokens"
            parts.append(f"{counted(self.equal, 'pair')} dropped ({why})")
        if self.bad:
            dropped = " dropped" if self.on_bad == "drop" else ""
            parts.append(f"{counted(self.bad, 'bad row')}{dropped}")
        return parts

    def of_kinds(self) -> str:
        """Return how many rows of each kind there are."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())

    def count(self, examples: Examples) -> None:
        """Count the examples that are used, and their rows and tokens."""
        first = examples.first_of_rows()
        self.rows = len(first)
        self.examples = len(examples)
        # lengths counts the model's inputs; the last token of an example is only predicted.
        self.tokens = int(examples.lengths.sum(dtype=np.int64)) + len(examples)
        self.supervised_tokens = int(examples.target_counts.sum(dtype=np.int64))

        kinds, counts = np.unique(examples.of_rows("kind")[first], return_counts=True)
        self.kinds = {}
        for kind, count in zip(kinds, counts, strict=True):
            self.kinds[KIND_NAMES[kind]] = int(count)

    def add(self, table: EncodedTable) -> None:
        """Add a table's bad rows and notes."""
        problems = table.problems
        self.bad += problems.bad
        self.bad_rows += problems.places(table.name)
        self.lacks_fields |= problems.lacks_fields
        for note, (count, line) in problems.notes.items():
            self.notes.append(f"{note} ({counted(count, 'row')}, for example {table.name}:{line})")

    def add_long(self, table: EncodedTable, long: np.ndarray, dropped: np.ndarray) -> None:
        """Add a table's long rows.

        Args:
            table: The table.
            long: Indices of the examples that are too long.
            dropped: Which of them are dropped, (long examples,) bool.
        """
        self.long += len(long)
        self.dropped += int(dropped.sum())
        for index, is_dropped in zip(long[:MOST_KEPT], dropped[:MOST_KEPT], strict=True):
            span = table.spans[index]
            line = table.rows["line"][span["row"]]
            length = span["stop"] - span["start"]
            outcome = ", dropped" if is_dropped else ""
            self.long_rows.append(f"{table.name}:{line} ({length:,} tokens{outcome})")
