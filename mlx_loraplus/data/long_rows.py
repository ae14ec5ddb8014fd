"""Limit the rows of a table to the maximum length, as the setting ``on_long`` says.

A longer row is truncated, dropped, split or refused, and the report counts it. When a row is split,
each part begins with the last token of the previous part, so that every supervised token is
predicted exactly once. Documents are joined and then split in the same way, at any token.
"""

from collections.abc import Sequence

import numpy as np

from .dataset import SPAN, EncodedTable, Span
from .split_report import SplitReport


def limit_lengths(table: EncodedTable, report: SplitReport) -> np.ndarray:
    """Return a new array: the spans of a table's examples, limited to the maximum length.

    Every example has a supervised token. ``on_long`` does not apply to documents, which are always
    split.

    Args:
        table: The table.
        report: Provides the maximum length and ``on_long``, and counts the long rows.
    """
    limit = report.max_seq_length
    if table.documents:
        return _cut_documents(table, limit)

    lengths = table.spans["stop"] - table.spans["start"]
    is_long = lengths > limit
    if not is_long.any():
        return np.array(table.spans)

    # Cut each long row into one or more pieces; a piece without a supervised token is dropped
    pieces: list[tuple[int, int, int]] = []
    for span in table.spans[is_long]:
        row, start, stop = int(span["row"]), int(span["start"]), int(span["stop"])
        if report.on_long == "truncate":
            pieces.append((row, start, start + limit))
        elif report.on_long == "split":
            pieces += _overlapping_pieces(row, start, stop, limit)
    cut = _spans(table, pieces)

    # Count the rows; with "error", they are reported as long and not as dropped
    is_dropped = ~np.isin(table.spans["start"][is_long], cut["start"])
    if report.on_long in ("split", "error"):
        is_dropped[:] = False
    report.add_long(table, np.flatnonzero(is_long), is_dropped)
    if report.on_long == "truncate":
        report.cut_rows += len(cut)
        report.cut_tokens += int(lengths[is_long][~is_dropped].sum()) - limit * len(cut)

    # Put the pieces where their rows were
    spans = np.concatenate([table.spans[~is_long], cut])
    return spans[np.argsort(spans["start"], kind="stable")]


def _cut_documents(table: EncodedTable, limit: int) -> np.ndarray:
    """Return the spans of joined documents, cut at the maximum length."""
    starts = np.arange(0, max(len(table.tokens) - 1, 0), limit - 1)
    rows = np.searchsorted(table.spans["stop"], starts, side="right")
    pieces = zip(rows.tolist(), starts.tolist(), (starts + limit).tolist(), strict=True)
    return _spans(table, list(pieces))


def _overlapping_pieces(row: int, start: int, stop: int, limit: int) -> list[tuple[int, int, int]]:
    """Return (row, start, stop) of parts that begin with the last token of the previous part."""
    starts = range(start, stop - 1, limit - 1)
    return [(row, first, min(first + limit, stop)) for first in starts]


def _spans(table: EncodedTable, pieces: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return a span for each (row, start, stop) with a supervised token after its first token."""
    spans = np.zeros(len(pieces), SPAN)
    used = 0
    for row, start, stop in pieces:
        targets = np.flatnonzero(table.supervised[start + 1 : stop])
        if len(targets):
            stop = min(stop, len(table.tokens))  # noqa: PLW2901
            inputs = int(targets[-1]) + 1
            spans[used] = Span(row, start, stop, inputs, len(targets))
            used += 1
    return spans[:used]
