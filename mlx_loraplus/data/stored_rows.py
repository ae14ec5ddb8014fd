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

    The digests ignore white space and case, except in the system message on which ``system``,
    ``text`` and ``prompt`` depend.
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


_ROW_TYPES = ("i8", "u1", "u1", "u8", "u8", "u8", "u8", "u8", "u8", "i4")
ROW = np.dtype(list(zip(StoredRow._fields, _ROW_TYPES, strict=True)))


def store_row(row: Row, *, thinking: bool) -> tuple[StoredRow, np.ndarray]:
    """Return what is stored of a row, and the digests of its beginnings, (beginnings,) uint64."""
    system = exact_digest(system_of(row))
    whole, asked, begins = row_digests(row)
    text = text_digests(row, system)
    stored = StoredRow(
        line=row.line,
        kind=KIND_NAMES.index(row.kind),
        thinking=thinking,
        whole=whole,
        asked=asked,
        begins=begins,
        system=system,
        text=text.text,
        prompt=text.prompt,
        beginnings=len(text.beginnings),
    )
    return stored, text.beginnings


def store_document(path: Path, number: int) -> StoredRow:
    """Return what is stored of a document: it is one row, and ``number`` is its line."""
    with path.open("rb") as file:
        digest = int.from_bytes(hashlib.file_digest(file, "blake2b").digest()[:8])
    kind = KIND_NAMES.index("text")
    return StoredRow(number, kind, thinking=False, whole=digest, asked=digest, begins=digest)
