"""What a shard keeps of each row: its line, its kind, and digests of its text.

The digests find duplicates, leaks and conversations without reading the tokens.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .prefix_digests import text_digests
from .row_digests import exact_digest, row_digests, system_of
from .row_kinds import KINDS
from .rows import Row

KIND_NAMES = (*KINDS, "preference", "desirable", "undesirable")


class StoredRow(NamedTuple):
    """One row of a table.

    The digests ignore white space and case, except in the system message on which
    ``system_digest``, ``text_digest`` and ``prompt_text_digest`` depend.
    """

    line: int  # line or row number
    kind: int  # index into KIND_NAMES
    thinking: bool  # whether the row's prompt allows thoughts
    row_digest: int
    prompt_digest: int
    opening_digest: int  # of the beginning of its conversation
    system_digest: int = 0  # of its system message, or 0
    text_digest: int = 0  # from ``text_digests``
    prompt_text_digest: int = 0  # from ``text_digests``
    beginning_count: int = 0  # number of digests in the file of beginnings


_ROW_TYPES = ("i8", "u1", "u1", "u8", "u8", "u8", "u8", "u8", "u8", "i4")
ROW = np.dtype(list(zip(StoredRow._fields, _ROW_TYPES, strict=True)))


def store_row(row: Row, *, thinking: bool) -> tuple[StoredRow, np.ndarray]:
    """Return what is stored of a row, and the digests of its beginnings, (beginnings,) uint64."""
    system = exact_digest(system_of(row))
    row_digest, prompt_digest, opening_digest = row_digests(row)
    text = text_digests(row, system)
    stored = StoredRow(
        line=row.line,
        kind=KIND_NAMES.index(row.kind),
        thinking=thinking,
        row_digest=row_digest,
        prompt_digest=prompt_digest,
        opening_digest=opening_digest,
        system_digest=system,
        text_digest=text.text,
        prompt_text_digest=text.prompt,
        beginning_count=len(text.beginnings),
    )
    return stored, text.beginnings


def store_document(path: Path, number: int) -> StoredRow:
    """Return what is stored of a document: it is one row, and ``number`` is its line."""
    with path.open("rb") as file:
        digest = int.from_bytes(hashlib.file_digest(file, "blake2b").digest()[:8])
    kind = KIND_NAMES.index("text")
    return StoredRow(
        line=number,
        kind=kind,
        thinking=False,
        row_digest=digest,
        prompt_digest=digest,
        opening_digest=digest,
    )
