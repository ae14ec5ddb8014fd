"""What an encoded table keeps of each row: its line, its kind, and digests of its text.

The digests find duplicates, leaks and conversations without reading the tokens.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .prefix_digests import LONGEST, TextDigests, text_digests
from .readers import read_text
from .row_digests import exact_digest, row_digests, system_of
from .row_kinds import REQUIRED
from .rows import Row

KIND_NAMES = (*REQUIRED, "preference", "desirable", "undesirable")


class StoredRow(NamedTuple):
    """One row of a table.

    The digests ignore white space and case, except in the system message of ``system_digest``. The
    row, prompt and opening digests of a long document are of the file's bytes and ignore nothing.
    """

    line: int  # line or row number
    kind: int  # index into KIND_NAMES
    thinking: bool  # whether the row's prompt allows thoughts
    row_digest: int
    prompt_digest: int
    opening_digest: int  # of the beginning of its conversation
    deeper_digest: int = 0  # from ``row_digests``
    system_digest: int = 0  # of its system message, or 0
    text_digest: int = 0  # from ``text_digests``
    is_whole: bool = False  # whether ``text_digest`` is of the whole text
    prompt_text_digest: int = 0  # from ``text_digests``
    beginning_count: int = 0  # number of digests in the file of beginnings
    part_key: int = 0  # the key of the first part in the file of parts
    part_count: int = 0  # number of places in the file of parts
    first_turn: int = 0  # from ``text_digests``
    turns_key: int = 0  # the key of that part, or 0
    is_single: bool = True  # from ``row_digests``


_ROW_TYPES = [
    *("i8", "u1", "u1", "u8", "u8", "u8", "u8", "u8", "u8", "u1", "u8"),
    *("i4", "u8", "i4", "i4", "u8", "u1"),
]
ROW = np.dtype(list(zip(StoredRow._fields, _ROW_TYPES, strict=True)))


def store_row(row: Row, *, thinking: bool) -> tuple[StoredRow, TextDigests]:
    """Return what is stored of a row, and the digests of its text."""
    digests = row_digests(row)
    text = text_digests(row)
    stored = StoredRow(
        line=row.line,
        kind=KIND_NAMES.index(row.kind),
        thinking=thinking,
        row_digest=digests.row,
        prompt_digest=digests.prompt,
        opening_digest=digests.opening,
        deeper_digest=digests.deeper,
        system_digest=exact_digest(system_of(row)),
        text_digest=text.text,
        is_whole=text.is_whole,
        prompt_text_digest=text.prompt,
        beginning_count=len(text.beginnings),
        part_key=int(text.parts["key"][0]) if len(text.parts) else 0,
        part_count=len(text.parts),
        first_turn=text.first_turn,
        turns_key=int(text.parts["key"][text.first_turn]) if text.first_turn else 0,
        is_single=digests.is_single,
    )
    return stored, text


def store_document(path: Path, number: int) -> tuple[StoredRow, TextDigests]:
    """Return what is stored of a document, which is one row, and the digests of its text.

    Args:
        path: The document.
        number: Its line.
    """
    # The beginning of the text, and all of a short one
    text = ""
    for piece in read_text(path):
        text += piece
        if len(text) > 2 * LONGEST:
            break
    stored, digests = store_row(Row("text", {"text": text}, number), thinking=False)
    if len(text) <= 2 * LONGEST:
        return stored, digests

    # A long document is equal to another if its file is
    with path.open("rb") as file:
        digest = int.from_bytes(hashlib.file_digest(file, "blake2b").digest()[:8])
    same = dict.fromkeys(("row_digest", "prompt_digest", "opening_digest"), digest)
    return stored._replace(**same), digests
