"""Read the rows of a file one at a time, so that the file may be larger than memory.

Each reader yields (place, row). The place is a line number or a row number. The row is the parsed
value, or a ``BadRowError`` if it can't be read. Text is UTF-8, with or without a byte order mark.
The line ends of Unix, Windows and old Macs are accepted.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError
from .csv_rows import read_csv
from .file_forms import check_form
from .messages import BadRowError, MissingFieldsError, is_chat
from .open_text import (
    LONGEST_ROW,
    PIECE,
    TO_UTF8,
    RawRow,
    as_text,
    has_undecoded,
    is_binary,
    open_bytes,
    read_sample,
)
from .row_problems import AS_PYTHON, explain_line, is_python_dict

BLANKS = " \t\r\n"
_SEPARATORS = re.compile(f"[{BLANKS},]*")
_LAST_LINE_END = re.compile(r".*\S\n(?=\S)", re.DOTALL)
_LAST_SPACE = re.compile(r".*\S(?= \S)", re.DOTALL)
_MANY_DIGITS = "a number has thousands of digits"


def read_jsonl(path: Path, longest: int = LONGEST_ROW) -> Iterator[RawRow]:
    """Yield the objects of a file that has one JSON object per line, with their line numbers.

    Blank lines are skipped. A file that contains one JSON array is read as an array. If the first
    object takes several lines, or shares its line with the next one, all may.

    Args:
        path: The file.
        longest: Maximum length of a line, in bytes. Longer lines are reported and skipped.

    Raises:
        DataError: The file holds a table.
    """
    number = 0
    with open_bytes(path) as file:
        sample = read_sample(file, PIECE)
        if sample.lstrip()[:1] not in ("{", "["):
            check_form(path, sample)
        if _is_array(file, longest):
            yield from read_json(path, longest)
            return
        if _is_divided_otherwise(sample):
            yield from _read_objects(path, longest)
            return

        while line := file.readline(longest + 1):
            if len(line) > longest:
                number += 1
                yield number, BadRowError(f"the line is longer than {longest // 2**20:,} MB")
                _skip_rest_of_line(file, line, longest)
                continue

            # JSON has no bare \r inside a string, so each one ends a line
            for part in line.rstrip(b"\r\n").split(b"\r"):
                number += 1
                if part.strip():
                    yield number, _parse(part)


def _skip_rest_of_line(file: Any, line: bytes, longest: int) -> None:
    """Skip the rest of a line whose start has been read, one part at a time."""
    while line and not line.endswith(b"\n"):
        line = file.readline(longest)


def _is_array(file: Any, longest: int) -> bool:
    """Return whether a JSON lines file is one JSON array of objects; the file position is kept."""
    start = file.tell()
    line = file.readline(longest)
    rest = file.read(PIECE)
    file.seek(start)

    if not line.lstrip().startswith(b"["):
        return False
    try:
        rows = json.loads(line)
    except (ValueError, RecursionError):
        # The first line of an array over several lines may end after the bracket, after the brace
        # of the first object, or after an object and its comma; anything else is an invalid line
        first = line.strip()[1:].lstrip()
        begins_array = first in (b"", b"{") or (first[:1] == b"{" and first[-2:] == b"},")
        return bool(rest.strip()) and begins_array

    # A file with a single line may also hold one row, which is a chat as a list of messages
    is_one_line = not rest.strip()
    return is_one_line and not is_chat(rows) and all(isinstance(row, dict) for row in rows)


def _is_divided_otherwise(sample: str) -> bool:
    """Return whether the first object of a file is not what its line holds."""
    text = sample.lstrip()
    try:
        first, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    is_longer = "\n" in text[:end] or "\r" in text[:end]
    return isinstance(first, dict) and (is_longer or text[end:].lstrip(" \t").startswith("{"))


def _read_objects(path: Path, longest: int) -> Iterator[RawRow]:
    """Yield JSON objects that follow each other, with or without line ends."""
    with open_bytes(path) as raw, as_text(raw) as file:
        yield from _array_elements(_ArrayText(file, "", 0, is_bare=True), longest)


def read_json(path: Path, longest: int = LONGEST_ROW) -> Iterator[RawRow]:
    """Yield the objects of a JSON array, with their line numbers.

    A file that does not begin with a bracket is read as JSON lines.

    Args:
        path: The file.
        longest: Maximum length of an element, in characters. Reading stops at a longer one.
    """
    with open_bytes(path) as raw, as_text(raw) as file:
        text = file.read(PIECE)
        if text.lstrip(BLANKS)[:1] != "[":
            yield from read_jsonl(path, longest)
            return
        yield from _array_elements(_ArrayText(file, text, text.index("[") + 1), longest)


@dataclass
class _ArrayText:
    """The text of a JSON array. Only the part that is being decoded is in memory."""

    file: TextIO
    text: str
    position: int
    # Whether the elements are not between brackets
    is_bare: bool = False
    line: int = 1
    # Position up to which the lines are counted
    counted: int = 0

    def skip_separators(self) -> None:
        """Move to the next element and count the lines up to it."""
        match = _SEPARATORS.match(self.text, self.position)
        assert match is not None
        self.line += self.text.count("\n", self.counted, match.end())
        self.position = self.counted = match.end()

    def is_finished(self) -> bool:
        """Return whether the next character closes the array and nothing follows it."""
        if self.is_bare or self.text[self.position : self.position + 1] != "]":
            return False
        rest = self.text[self.position + 1 :] + self.file.read(PIECE)
        return not rest.strip(BLANKS)

    def read_more(self, longest: int) -> bool:
        """Read more text; return False at the end of the file or if the element is too long."""
        pending = len(self.text) - self.position
        if pending >= longest:
            return False

        more = self.file.read(max(PIECE, pending))
        if not more:
            return False
        self.text = self.text[self.position :] + more
        self.position = self.counted = 0
        return True


def _array_elements(array: _ArrayText, longest: int) -> Iterator[RawRow]:
    """Yield the elements of an array up to the first one that is not valid JSON."""
    repeated_keys: list[str] = []
    decoder = _decoder(repeated_keys)
    while True:
        array.skip_separators()
        if array.is_finished():
            return

        # Decoding fails if the end of the element has not been read yet, so read more and try again
        start = array.position
        repeated_keys.clear()
        try:
            row, array.position = decoder.raw_decode(array.text, start)
        except RecursionError:
            yield array.line, _unreadable_rest("nested too deep")
            return
        except ValueError as error:
            if array.read_more(longest):
                continue
            reason = getattr(error, "msg", _MANY_DIGITS)
            if is_python_dict(array.text[start:]):
                reason = AS_PYTHON
            if not array.text[start:]:
                if array.is_bare:
                    return
                reason = "the array is not closed"
            yield array.line, _unreadable_rest(reason)
            return

        if has_undecoded(array.text[start : array.position]):
            row = BadRowError(f"not UTF-8: {TO_UTF8}")
        elif repeated_keys:
            row = _repeated_key(repeated_keys)
        yield array.line, row


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Yield the numbered rows of a Parquet file.

    Raises:
        DataError: The file can't be read, or pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet requires pyarrow: pip install 'mlx_loraplus[datasets]'"
        ) from None

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        with open_bytes(path) as raw:
            check_form(path, read_sample(raw, PIECE))
        reason = " ".join(str(error).split())
        raise DataError(f"{path} can't be read as Parquet: {reason:.200}") from None


def read_text(path: Path, piece: int = PIECE) -> Iterator[str]:
    """Yield a document in pieces that have the same tokens as the whole text.

    A token may contain several spaces or line ends. The text is therefore only cut at a single line
    end or a single space between two words. If 16 pieces contain no such position, the text is cut
    anywhere.

    Args:
        path: The file.
        piece: Number of characters to read at once.

    Raises:
        DataError: The file is not plain text in UTF-8.
    """
    held = ""
    with open_bytes(path) as raw, as_text(raw) as file:
        sample = read_sample(raw, PIECE)
        check_form(path, sample)
        if is_binary(sample):
            raise DataError(f"{path} holds control characters: give plain text in UTF-8")
        while more := file.read(piece):
            if "\0" in more:
                raise DataError(f"{path} contains a NUL byte: give plain text in UTF-8")
            if has_undecoded(more):
                raise DataError(f"{path} is not UTF-8: {TO_UTF8}")

            held += more
            cut = _last_seam(held) if len(held) < 16 * piece else len(held)
            if cut:
                yield held[:cut]
                held = held[cut:]
    if held:
        yield held


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def _last_seam(text: str) -> int:
    """Return the last position where the text may be cut, or 0 if there is no such position.

    This is after the last single line end, or before the last single space in a text without one.
    """
    found = _LAST_LINE_END.match(text) or _LAST_SPACE.match(text)
    return found.end() if found else 0


def _decoder(repeated_keys: list[str]) -> json.JSONDecoder:
    """Return a decoder that reads NaN as null, as tables store it.

    It appends the repeated keys of an object to ``repeated_keys``.
    """

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            repeated_keys.append(next(name for name in names if names.count(name) > 1))
        return made

    def read_constant(name: str) -> float | None:
        return None if name == "NaN" else float(name)

    return json.JSONDecoder(object_pairs_hook=make_object, parse_constant=read_constant)


def _repeated_key(repeated_keys: list[str]) -> BadRowError:
    return BadRowError(f"the key {repeated_keys[0]!r:.40} appears twice: keep one of them")


def _unreadable_rest(reason: str) -> BadRowError:
    return MissingFieldsError(f"not JSON ({reason}); nothing after it can be read")


def _parse(line: bytes) -> Any:
    """Return the value on a line of JSON, or a BadRowError that describes the problem."""
    try:
        repeated_keys: list[str] = []
        row = _decoder(repeated_keys).decode(line.decode("utf-8"))
        return _repeated_key(repeated_keys) if repeated_keys else row
    except UnicodeDecodeError as error:
        byte, column = error.object[error.start], error.start + 1
        return BadRowError(f"not UTF-8 (byte {byte:#04x} at column {column}): {TO_UTF8}")
    except RecursionError:
        return MissingFieldsError("not JSON (nested too deep)")
    except json.JSONDecodeError as error:
        return explain_line(line, error)
    except ValueError:
        return MissingFieldsError(f"not JSON ({_MANY_DIGITS})")
