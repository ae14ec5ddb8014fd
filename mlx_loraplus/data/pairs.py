"""Pairs of a chosen and a rejected answer to one prompt, and batches of them.

A pair is one example for everything that counts, divides or shuffles examples: its length is that
of its longer answer. In a batch it has two rows: the chosen answer, then the rejected one.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from .batches import Batch, Batches, lay_out, ordered_rows
from .dataset import EncodedTable, Examples
from .long_rows import limit_lengths
from .split_report import SplitReport
from .tokenize import Example


class ComparedExamples(Examples):
    """Examples with two answers each, which a reference model may have scored.

    Attributes:
        reference: log pi_ref of both answers, (examples, 2) float32; 0 until it is computed.
    """

    def __init__(self, tables: Sequence[EncodedTable], spans: np.ndarray):
        super().__init__(tables, spans)
        self.reference = np.zeros((len(spans), 2), np.float32)

    @property
    def both(self) -> tuple[Examples, Examples]:
        """The first and the second answer of each example."""
        raise NotImplementedError


class Pairs(ComparedExamples):
    """The pairs of a split; an index returns the chosen answer.

    Args:
        tables: The tables that hold the tokens.
        answers: The position of both answers in the tables, (pairs, 2) SPAN.

    Attributes:
        chosen: The chosen answers, as examples.
        rejected: The rejected answers, as examples.
        lengths: Number of input tokens of the longer answer, (pairs,).
        target_counts: Number of supervised tokens of both answers, (pairs,).
    """

    def __init__(self, tables: Sequence[EncodedTable], answers: np.ndarray):
        # The tokens of the rejected answer follow those of the chosen one.
        spans = answers[:, 0].copy()
        spans["stop"] = answers["stop"][:, 1]
        spans["inputs"] = answers["inputs"].max(axis=1)
        spans["targets"] = answers["targets"].sum(axis=1)
        super().__init__(tables, spans)

        self.answers = answers
        self.chosen = Examples(tables, answers[:, 0])
        self.rejected = Examples(tables, answers[:, 1])

    @property
    def both(self) -> tuple[Examples, Examples]:
        """The chosen and the rejected answers."""
        return self.chosen, self.rejected

    def __getitem__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, index: int
    ) -> Example:
        return self.chosen[index]

    def take(self, indices: np.ndarray) -> "Pairs":
        """Return the pairs with these indices, in this order, without their reference."""
        return Pairs(self.tables, self.answers[indices])

    def fingerprint(self) -> str:
        """Return a digest of the pairs: their tokens, their supervision and their order."""
        digest = hashlib.blake2b(super().fingerprint().encode(), digest_size=16)
        digest.update(self.answers.tobytes())
        return digest.hexdigest()

    def rows_of(self, indices: Sequence[int]) -> list[list[Example]]:
        """Return the rows of a batch: the two answers of each pair, one after the other."""
        rows: list[list[Example]] = []
        for index in indices:
            rows += [[self.chosen[index]], [self.rejected[index]]]
        return rows


def limit_pairs(table: EncodedTable, report: SplitReport) -> np.ndarray:
    """Return the answers of a table's pairs, limited to the maximum length, (pairs, 2) SPAN.

    A pair is dropped if one of its answers is, or if truncation has made both equal.

    Args:
        table: The table, with two adjacent examples for each row.
        report: As for ``limit_lengths``; a truncated answer counts as a row.
    """
    dropped = report.dropped
    spans = limit_lengths(table, report)
    first = np.flatnonzero(spans["row"][:-1] == spans["row"][1:])
    pairs = np.stack([spans[first], spans[first + 1]], axis=1)

    # Compare the tokens of truncated answers.
    is_cut = (pairs["stop"] - pairs["start"] == report.max_seq_length).any(axis=1)
    differs = np.ones(len(pairs), bool)
    for index in np.flatnonzero(is_cut):
        one, other = (table.tokens[span["start"] : span["stop"]] for span in pairs[index])
        differs[index] = not np.array_equal(one, other)
    report.equal += len(pairs) - int(differs.sum())

    # Count rows, not answers. With on_long "error", long rows are reported, and not dropped.
    if report.on_long != "error":
        report.dropped = dropped + len(table.rows) - len(pairs)
    return pairs[differs]


class PairBatches(Batches):
    """``Batches`` of pairs: ``batch_size`` counts pairs, and a batch has two rows for each.

    Attributes:
        pairs: The pairs.
    """

    def __init__(self, pairs: Pairs, batch_size: int, seed: int, processes: int = 1):
        super().__init__(pairs, batch_size, seed, processes)
        self.pairs = pairs

    def shape_of(self, rows: Sequence[np.ndarray]) -> tuple[int, int, int]:
        """Return the (rows, length, targets) of a batch, padding included."""
        pairs, length, targets = super().shape_of(rows)
        return 2 * pairs, length, targets

    def largest(self) -> tuple[int, int]:
        """Return the (rows, length) of the largest batch, or of one process's part of it."""
        pairs, length = super().largest()
        return 2 * pairs, length

    def collate(self, rows: Sequence[np.ndarray]) -> Batch:
        """Read the answers of a batch and lay them out, padded to the shape from ``shape_of``."""
        return lay_out_pairs(self.pairs, np.concatenate(rows), *self.shape_of(rows))


def pairs_in_order(
    pairs: Pairs, batch_size: int, row_slice: slice = slice(None)
) -> Iterator[Batch]:
    """Yield batches for evaluation: all pairs, or a part of them, once, the longest first."""
    for members, length, targets in ordered_rows(pairs, batch_size, row_slice):
        yield lay_out_pairs(pairs, members, 2 * batch_size, length, targets)


def lay_out_pairs(pairs: Pairs, members: np.ndarray, rows: int, length: int, targets: int) -> Batch:
    """Lay out some pairs as a batch of this shape; rows beyond them are empty."""
    filled = pairs.rows_of(members.tolist())
    empty: list[list[Example]] = [[]] * (rows - len(filled))
    reference = np.zeros(rows, np.float32)
    reference[: len(filled)] = pairs.reference[members].ravel()
    batch = lay_out([*filled, *empty], length, targets)
    return replace(batch, pairs=len(members), reference=reference)
