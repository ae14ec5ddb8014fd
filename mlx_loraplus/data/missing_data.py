"""Suggest what was probably meant by a name of data that is not found."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..hub_access import hub_id_in
from ..models.known_models import MODELS
from ..userpaths import similar_paths

_MOST_SHOWN = 3
_PATTERN = "*?["

# Suffixes of files that are not read → what to do with such a file
_CONVERT = {
    ".gz .zst .bz2 .xz .zip": "decompress it first",
    ".ndjson": "rename it to .jsonl",
    ".xlsx .xls .ods": "save its sheet as .csv",
    ".arrow .feather .orc": "save it as Parquet",
    ".md .rst .tex": "rename it to .txt",
}


def file_type_hint(path: Path) -> str:
    """Return a hint for a file whose type is not supported, or ""."""
    for suffixes, advice in _CONVERT.items():
        if path.suffix.lower() in suffixes.split():
            return f" ({advice})"
    return ""


def show_name(path: Path) -> str:
    """Return the name of a file for a message of one line."""
    return path.name if path.name.isprintable() else repr(path.name)


def check_spaces(names: Sequence[str]) -> None:
    """Check that several names are not the parts of one path with spaces, divided by a shell.

    Raises:
        DataError: Joined with spaces, the names are an existing path.
    """
    joined = " ".join(names)
    if len(names) > 1 and Path(joined).exists():
        raise DataError(f"data not found: {names[0]!r}; put quotes around {joined!r}")


def missing_hint(name: str) -> str:
    """Return a hint for a name that is neither a path nor a hub id; "" if nothing is similar."""
    if name.lower() in MODELS:
        return " (it is a model: are --model and --data swapped?)"
    if hub_id := hub_id_in(name):
        return f" (its hub id is {hub_id})"
    if name.startswith(("https://", "http://")):
        return " (URLs are not supported: download the file first)"

    # A shell expands a pattern only without quotes.
    if any(character in name for character in _PATTERN):
        parent = Path(name).parent
        found = sorted(map(str, parent.glob(Path(name).name)))
        if found:
            files = " ".join(found[:_MOST_SHOWN])
            return f" (patterns are not expanded: give the files, such as {files})"

    parts = [part.strip() for part in name.split(",")]
    if len(parts) > 1 and all(part and Path(part).exists() for part in parts):
        return f" (give several one by one, without commas: {' '.join(parts)})"
    return similar_paths(Path(name))
