"""A file becomes rows, one at a time, so that a file larger than memory is read in little of it.

Each reader yields (place, row): the line or the number of the row in its file, and what is there,
or a ``BadRowError`` where that can't be read. Text is UTF-8, with or without a byte order mark;
lines end as on any system.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError
from .messages import is_chat
from .rows import BadRowError

LONGEST_ROW = 64 * 2**20  # bytes; a file without line ends must not fill the memory
PIECE = 2**20  # characters of a document that are encoded together
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32's begin with them, or with zeros
BLANKS = " \t\r\n"
_LONE = re.compile("[\udc80-\udcff]")
_BETWEEN = re.compile(f"[{BLANKS},]*")
_LAST_LINE_END, _LAST_BLANK = (
    re.compile(form, re.DOTALL) for form in (r".*\S\n(?=\S)", r".*\S(?= \S)")
)

RawRow = tuple[int, Any]


def read_jsonl(path: Path, longest: int = LONGEST_ROW) -> Iterator[RawRow]:
    """Yield the objects of a file of one JSON object a line; blank lines are skipped."""
    number = 0
    with _opened(path) as file:
        if _is_array(file, longest):
            yield from read_json(path, longest)
            return
        while line := file.readline(longest + 1):
            if len(line) > longest:
                number += 1
                yield number, BadRowError(f"a line of more than {longest // 2**20:,} MB")
                while line and not line.endswith(b"\n"):
                    line = file.readline(longest)
                continue
            for part in line.rstrip(b"\r\n").split(b"\r"):  # JSON has no bare \r inside a string
                number += 1
                if part.strip():
                    yield number, _parse(part)


def _is_array(file: Any, longest: int) -> bool:
    """Tell whether a file of lines is rather one JSON array: it begins as one that no line by itself holds."""
    start = file.tell()
    line = file.readline(longest)
    rest = file.read(PIECE)
    file.seek(start)
    if not line.lstrip().startswith(b"["):
        return False
    try:
        rows = json.loads(line)
    except (ValueError, RecursionError):
        return bool(rest.strip()) and line.strip() in (b"[", b"[{")  # else a line that is broken
    return not rest.strip() and not is_chat(rows) and all(isinstance(row, dict) for row in rows)


def read_json(path: Path, longest: int = LONGEST_ROW) -> Iterator[RawRow]:
    """Yield the objects of a JSON array, or of JSON lines in a file that is only called .json; places are lines."""
    with _opened(path) as raw, _as_text(raw) as file:
        held = file.read(PIECE)
        if held.lstrip(BLANKS)[:1] != "[":
            yield from read_jsonl(path, longest)
            return
        twice: list[str] = []
        decoder, line, last, at = _decoder(twice), 1, 0, held.index("[") + 1
        while True:
            at = _BETWEEN.match(held, at).end()  # pyright: ignore[reportOptionalMemberAccess]
            line, last = line + held.count("\n", last, at), at
            if held[at : at + 1] == "]" and not (held[at + 1 :] + file.read(PIECE)).strip(BLANKS):
                return
            twice.clear()
            try:
                row, at = decoder.raw_decode(held, at)
            except RecursionError:
                yield line, BadRowError("not JSON (nested too deep); nothing after it can be read")
                return
            except ValueError as error:
                more = file.read(max(PIECE, len(held) - at)) if len(held) - at < longest else ""
                if more:
                    held, at, last = held[at:] + more, 0, 0
                    continue
                what = getattr(error, "msg", str(error)) if held[at:] else "the array has no end"
                yield line, BadRowError(f"not JSON ({what}); nothing after it can be read")
                return
            row = _repeated(twice) if twice else row
            yield line, BadRowError("not UTF-8") if _undecoded(held[last:at]) else row


def read_csv(path: Path, longest: int = LONGEST_ROW) -> Iterator[RawRow]:
    """Yield the rows of a table with a header; commas, semicolons or tabs part the columns; places are lines."""
    csv.field_size_limit(longest)
    with _opened(path) as raw:
        start = raw.tell()
        header = raw.readline(PIECE)
        raw.seek(start)
        delimiter = max(",;\t", key=lambda character: header.count(character.encode()))
        rows = csv.reader(_as_text(raw, newline=""), delimiter=delimiter, strict=True)
        place = 1
        try:
            columns = next(([name.strip() for name in values] for values in rows if values), [])
            if len(set(columns)) < len(columns):
                raise DataError(
                    f"{path}: two columns have the same name ({', '.join(columns):.200})"
                )
            place = rows.line_num + 1
            for values in rows:
                if _undecoded("".join(values)):
                    yield place, BadRowError("not UTF-8")
                elif len(values) > len(columns):
                    yield (
                        place,
                        BadRowError(
                            f"{len(values)} values, but the header has {len(columns)} columns"
                        ),
                    )
                elif values:
                    yield place, dict(zip(columns, values, strict=False))
                place = rows.line_num + 1  # a row begins behind the last line of the one before
        except csv.Error as error:
            yield place, BadRowError(f"not CSV ({error}); nothing after it can be read")


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file; places are their numbers."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow: pip install 'mlx_loraplus[datasets]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=256)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is not Parquet that can be read: {' '.join(str(error).split()):.200}"
        ) from None


def read_text(path: Path, piece: int = PIECE) -> Iterator[str]:
    """Yield a document in pieces that are encoded alike apart and together: cut at a lone line end, if it can be."""
    held = ""
    with _opened(path) as raw, _as_text(raw) as file:
        while more := file.read(piece):
            if "\0" in more or _undecoded(more):
                problem = "holds a NUL byte" if "\0" in more else "is not UTF-8"
                raise DataError(f"{path} {problem}: give plain text in UTF-8")
            held += more
            cut = _seam(held) if len(held) < 16 * piece else len(held)
            if cut:
                yield held[:cut]
                held = held[cut:]
    if held:
        yield held


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet,
}  # fmt: skip


def _seam(text: str) -> int:
    """Return the last place behind a lone line end, or else before a lone blank; 0 for none.

    Lone: between two that are no blanks. Runs of blanks are what tokenizers join across.
    """
    found = _LAST_LINE_END.match(text) or _LAST_BLANK.match(text)
    return found.end() if found else 0


def _opened(path: Path) -> Any:
    """Open a file behind its byte order mark, if it has one."""
    try:
        file = path.open("rb")
        start = file.read(4)
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}") from None
    if start.startswith(WIDE_MARKS) or start == codecs.BOM_UTF32_BE:
        file.close()
        raise DataError(f"{path} is UTF-16 or UTF-32: save it as UTF-8")
    file.seek(3 if start.startswith(codecs.BOM_UTF8) else 0)
    return file


def _as_text(raw: Any, newline: str | None = None) -> TextIO:
    """Decode a file; a byte that is not UTF-8 becomes a lone surrogate, so that its row can be told."""
    return io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline=newline)


def _undecoded(text: str) -> bool:
    return not text.isascii() and _LONE.search(text) is not None


def _decoder(twice: list[str]) -> json.JSONDecoder:
    """Return a decoder that puts an object's repeated keys into ``twice``, and takes NaN and infinities as null."""

    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            twice.append(next(name for name in names if names.count(name) > 1))
        return made

    return json.JSONDecoder(object_pairs_hook=make, parse_constant=lambda _: None)


def _repeated(twice: list[str]) -> BadRowError:
    return BadRowError(f"the key {twice[0]!r:.40} is there twice: keep one of them")


def _parse(line: bytes) -> Any:
    """Return what a line of JSON holds, or what is wrong with it."""
    try:
        twice: list[str] = []
        row = _decoder(twice).decode(line.decode("utf-8"))
        return _repeated(twice) if twice else row
    except UnicodeDecodeError as error:
        return BadRowError(
            f"not UTF-8 (byte {error.object[error.start]:#04x} at column {error.start + 1})"
        )
    except RecursionError:
        return BadRowError("not JSON (nested too deep)")
    except json.JSONDecodeError as error:
        return BadRowError(f"not JSON ({error.msg} at column {error.colno})")
    except ValueError as error:  # a number of too many digits
        return BadRowError(f"not JSON ({error})")
