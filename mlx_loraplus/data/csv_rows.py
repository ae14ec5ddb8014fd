"""Read tables with a header line: CSV and TSV files, row by row."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, counted
from .file_forms import check_form
from .messages import BadRowError
from .open_text import (
    LONGEST_ROW,
    PIECE,
    TO_UTF8,
    RawRow,
    as_text,
    has_undecoded,
    open_bytes,
    read_sample,
)

# Delimiters → the words for them in messages
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}

# The line above the header by which Excel knows the delimiter
_SEPARATOR_LINE = re.compile(rb"sep=([,;\t|])\s*", re.IGNORECASE)


def read_csv(path: Path, longest: int = LONGEST_ROW) -> Iterator[RawRow]:
    """Yield the rows of a table with a header line as dicts, with their line numbers.

    The columns are separated by commas, semicolons, tabs or bars.

    Args:
        path: The file.
        longest: Maximum length of a field, in characters.

    Raises:
        DataError: Two columns have the same name, or the file holds JSON.
    """
    csv.field_size_limit(longest)
    with open_bytes(path) as raw:
        check_form(path, read_sample(raw, PIECE))
        delimiter, skipped = _find_delimiter(raw)
        lines = csv.reader(as_text(raw, newline=""), delimiter=delimiter, strict=True)
        place = 1
        try:
            columns = _read_header(path, lines)

            # A row begins after the last line of the previous row
            place = skipped + lines.line_num + 1
            for values in lines:
                if values:
                    yield place, _csv_row(columns, values, delimiter)
                place = skipped + lines.line_num + 1
        except csv.Error as error:
            yield place, _unreadable_rest(str(error))


def repeated_name(columns: Sequence[str]) -> str:
    """Return the first name that several columns have; "" if there is none.

    Columns without a name, such as the empty ones of a spreadsheet, do not count.
    """
    named = [name for name in columns if name]
    return next((name for name in named if named.count(name) > 1), "")


def _find_delimiter(raw: Any) -> tuple[str, int]:
    """Return the delimiter, and the number of lines above the header, which are skipped.

    Excel may name the delimiter in a line above the header. Otherwise, it is the most frequent one
    in the header.
    """
    # csv.Sniffer is misled by lists and code in fields, and its time is quadratic in the length
    start = raw.tell()
    header = raw.readline(PIECE)
    if named := _SEPARATOR_LINE.fullmatch(header):
        return named[1].decode(), 1
    raw.seek(start)
    return max(_DELIMITERS, key=lambda character: header.count(character.encode())), 0


def _read_header(path: Path, lines: Iterator[list[str]]) -> list[str]:
    """Return the column names from the first line that is not empty."""
    columns: list[str] = []
    for values in lines:
        if values:
            columns = [name.strip() for name in values]
            break
    if name := repeated_name(columns):
        raise DataError(
            f"{path}: two columns have the same name ({name:.200}): rename or remove one of them,"
            " in the first line of the file"
        )
    return columns


def _csv_row(columns: list[str], values: list[str], delimiter: str) -> dict[str, str] | BadRowError:
    """Return a row as a dict by column name; a short row lacks the last columns."""
    if has_undecoded("".join(values)):
        return BadRowError(f"not UTF-8: {TO_UTF8}")
    if len(values) > len(columns):
        header = counted(len(columns), "column")
        return BadRowError(
            f"{len(values)} values, but the header has {header}: put double quotes around a value"
            f" that contains a {_DELIMITERS[delimiter]}"
        )
    return dict(zip(columns, values, strict=False))


def _unreadable_rest(reason: str) -> BadRowError:
    """Return what is wrong with a row after which nothing can be read."""
    advice = ""
    if "expected after" in reason:
        advice = ': inside a value in double quotes, write each double quote twice ("")'
    return BadRowError(f"not CSV ({reason}); nothing after it can be read{advice}")
