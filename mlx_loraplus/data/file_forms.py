"""Recognize files whose content is not what their names say, such as JSON lines in a .txt file.

Read as their names say, such files give a bad row for every line or, if they are read as text, a
model that learns their braces.
"""

import codecs
import csv
import json
import re
from pathlib import Path

from ..errors import DataError
from ..files import LFS_ADVICE, is_lfs_pointer
from ..userpaths import shell_word
from .row_kinds import REQUIRED

# How binary files begin → what they are, and what to do with them
_BINARY = {
    rb"\x1f\x8b": "compressed by gzip: decompress it first",
    rb"BZh\d1AY&SY": "compressed by bzip2: decompress it first",
    rb"\xfd7zXZ\0": "compressed by xz: decompress it first",
    rb"\x28\xb5\x2f\xfd": "compressed by zstd: decompress it first",
    rb"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save its sheet as .csv",
    rb"\xd0\xcf\x11\xe0": "a document of Microsoft Office: save its sheet as .csv",
    rb"ARROW1\0": "an Arrow file: save it as Parquet",
    rb"\xff{4}": "an Arrow stream: save it as Parquet",
    rb"%PDF-\d": "a PDF document: save its text as .txt",
}
_PARQUET = re.compile(rb"PAR1[\0-\x1f]")
_WEB_PAGE = re.compile(rb"\s*<(?:!doctype html|html)\b", re.IGNORECASE)

# Encodings → how their files begin; the mark of little-endian UTF-32 begins with that of UTF-16
_WIDE_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}

# What is found in text files, by the suffix that such a file should have
_CONTENTS = {".jsonl": "JSON lines", ".json": "a JSON array", ".csv": "a table"}
_JSON, _TABLES, _DOCUMENT = (".jsonl", ".json"), (".csv", ".tsv"), ".txt"

_MOST_LINES = 1000  # lines that are looked at
_NEARLY_ALL = 0.9


def check_start(path: Path, start: bytes) -> None:
    """Check that a file is the text that its name says, as far as its first bytes tell.

    Raises:
        DataError: The file is binary, a web page, or not UTF-8.
    """
    if is_lfs_pointer(start):
        raise DataError(f"{path} is {LFS_ADVICE}")
    suffix = path.suffix.lower()
    if _PARQUET.match(start) and suffix != ".parquet":
        raise DataError(f"{path} is a Parquet file: rename it to {path.stem}.parquet")
    for signature, found in _BINARY.items():
        if re.match(signature, start):
            raise DataError(f"{path} is {found}")
    if _WEB_PAGE.match(start) and suffix != _DOCUMENT:
        raise DataError(f"{path} is a web page: download the file itself")

    if encoding := _wide_encoding(start):
        raise DataError(
            f"{path} is UTF-16 or UTF-32: save it as UTF-8, such as with iconv -f {encoding} -t"
            f" UTF-8 {shell_word(path)} > NEW_FILE, and replace the file with it"
        )


def _wide_encoding(start: bytes) -> str:
    """Return the encoding of a text in UTF-16 or UTF-32, by its first bytes; "" for others."""
    for encoding, marks in _WIDE_MARKS.items():
        if start.startswith(marks):
            return encoding

    # Without a mark, every second byte of plain letters is zero
    if start[1:4] == b"\0\0\0" or start[:3] == b"\0\0\0":
        return "UTF-32BE" if start[:1] == b"\0" else "UTF-32LE"
    if start[1:4:2] == b"\0\0":
        return "UTF-16LE"
    return "UTF-16BE" if start[:4:2] == b"\0\0" else ""


def check_form(path: Path, sample: str) -> None:
    """Check that a file holds what its name says.

    Args:
        path: The file.
        sample: The beginning of its text, or all of it.

    Raises:
        DataError: The file holds rows of another form.
    """
    suffix = path.suffix.lower()
    form = find_form(sample)
    is_same = form is None or any(form in group and suffix in group for group in (_JSON, _TABLES))
    if not is_same:
        assert form is not None
        as_text = ""
        if suffix == _DOCUMENT:
            as_text = '; to learn it as it is, put it into a row {"text": "…"} of a .jsonl file'
        raise DataError(
            f"{path} holds {_CONTENTS[form]}, but its name ends in {suffix}: rename it to"
            f" {path.stem}{form}{as_text}"
        )


def find_form(sample: str) -> str | None:
    """Return the suffix of the form that the rows of a text have, or None if it has no rows.

    A text that quotes some JSON, or that has a comma in every line, has none.
    """
    text = sample.lstrip()
    if text.startswith("["):
        return ".json" if _begins_array(text) else None
    lines = [line for line in sample.splitlines() if line.strip()]
    if len(lines) > 1 and not sample.endswith(("\n", "\r")):
        # The last line of a sample may be a part of a line
        lines = [*lines[:-1], *([lines[-1]] if _is_object(lines[-1]) else [])]
    lines = lines[:_MOST_LINES]

    if text.startswith("{") or any(map(_is_object, lines[:2])):
        objects = sum(map(_is_object, lines))
        return ".jsonl" if objects >= _NEARLY_ALL * len(lines) else None
    return ".csv" if _is_table(lines) else None


def _begins_array(text: str) -> bool:
    """Return whether a text, or its beginning, is a JSON array of objects."""
    try:
        first, end = json.JSONDecoder().raw_decode(text[1:].lstrip())
    except (ValueError, RecursionError):
        return False
    rest = text[1:].lstrip()[end:].lstrip()
    is_array = rest.startswith(",") or not rest[1:].strip()
    return isinstance(first, dict) and is_array


def _is_object(line: str) -> bool:
    """Return whether a line is a JSON object."""
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_table(lines: list[str]) -> bool:
    """Return whether lines are a table whose columns are those of a kind of row."""
    needed = [set(fields) for fields in REQUIRED.values() if len(fields) > 1]
    for delimiter in ",;\t|":
        try:
            header, *rows = csv.reader(lines, delimiter=delimiter)
        except (csv.Error, ValueError):
            continue
        names = {name.strip().lower() for name in header}
        same = sum(len(row) == len(header) for row in rows)
        if any(fields <= names for fields in needed) and same >= _NEARLY_ALL * max(len(rows), 1):
            return True
    return False
