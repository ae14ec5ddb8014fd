"""What became of a split's rows: how many are used, bad, long, cut or dropped, and where they are."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .examples import Examples
from .shards import KIND_NAMES, Shard

OnLong = Literal["truncate", "drop", "split", "error"]


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
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the counts in one line."""
        pieces = "" if self.examples == self.rows else f" as {self.examples:,} examples"
        line = f"{self.rows:,} rows{pieces}, {self.tokens:,} tokens, {self.supervised_tokens:,} supervised"
        if self.cut_rows:
            line += f"; {self.cut_rows:,} rows cut at {self.max_seq_length:,} tokens ({self.cut_tokens:,} lost)"
        if self.dropped:
            why = f"nothing to learn in their first {self.max_seq_length:,} tokens"
            why = why if self.on_long == "truncate" else f"longer than {self.max_seq_length:,} tokens"
            line += f"; {self.dropped:,} rows dropped ({why})"
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
        self.kinds = {KIND_NAMES[kind]: int(count) for kind, count in zip(kinds, counts, strict=True)}

    def add(self, shard: Shard) -> None:
        """Add what is to be told of a shard."""
        findings = shard.findings
        self.bad += findings.bad
        self.bad_rows += findings.places(shard.name)
        for note, (count, line) in findings.notes.items():
            self.notes.append(f"{note} ({count:,} rows, such as {shard.name}:{line})")
        if findings.unused:
            self.notes.append(f"{shard.name}: fields that are not used: {', '.join(findings.unused)}")
