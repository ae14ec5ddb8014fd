"""Open files of rows and documents, whose text is UTF-8 with or without a byte order mark."""

import codecs
import io
import re
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError
from .file_forms import check_start

# Maximum number of bytes in a row, so that a file without line ends does not fill the memory
LONGEST_ROW = 64 * 2**20

# Number of characters to read at once
PIECE = 2**20

TO_UTF8 = (
    "if the file has another encoding, convert it, such as with iconv -f WINDOWS-1252 -t UTF-8 FILE"
    " > NEW_FILE, and replace the file with it"
)
"""What to do about bytes that are not UTF-8."""

RawRow = tuple[int, Any]
"""The line or the number of a row, and its value or what is wrong with it."""

_UNDECODED_BYTE = re.compile("[\udc80-\udcff]")
_CONTROL = re.compile("[\1-\7\16-\32\34-\37]")  # but not those of terminals
_START = 512  # bytes that tell what a file is


def open_bytes(path: Path) -> Any:
    """Open a file for reading bytes, positioned after its byte order mark.

    Raises:
        DataError: The file can't be opened, or is not text in UTF-8.
    """
    try:
        file = path.open("rb")
        start = file.read(_START)
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}") from None

    try:
        check_start(path, start)
    except DataError:
        file.close()
        raise
    file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
    return file


def as_text(raw: Any, newline: str | None = None) -> TextIO:
    """Decode a file as UTF-8.

    An invalid byte becomes a lone surrogate, so that its row can be found and reported.
    """
    return io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline=newline)


def has_undecoded(text: str) -> bool:
    """Return whether a text contains bytes that are not UTF-8."""
    return not text.isascii() and _UNDECODED_BYTE.search(text) is not None


def read_sample(raw: Any, size: int) -> str:
    """Return the first characters of a file; the file position is kept."""
    start = raw.tell()
    sample = raw.read(size).decode("utf-8", "replace")
    raw.seek(start)
    return sample


def is_binary(sample: str) -> bool:
    """Return whether a text has as many control characters as UTF-16 or a binary file."""
    return len(_CONTROL.findall(sample)) > len(sample) / 100
