"""The names of data files in a folder: splits, shards, and files that nothing reads."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from ..errors import DataError
from .readers import READERS

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")

# The names that files and hub splits may have for each split
SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    **dict.fromkeys(
        ("valid", "validation", "validate", "val", "dev", "eval", "evaluation"), "valid"
    ),
}  # fmt: skip

_SHARD_NUMBER = re.compile(r"-(\d+)-of-(\d+)$")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def stem_of(path: Path) -> str:
    """Return a file's name in lower case, without the suffix and the shard number."""
    return _SHARD_NUMBER.sub("", path.stem).lower()


def check_shards(files: Sequence[Path]) -> None:
    """Check that all shards of a file are there, such as train-00000-of-00003.jsonl to 00002.

    Raises:
        DataError: Some shards are missing.
    """
    # Collect the numbers of the shards with the same name and count.
    shards: dict[tuple[str, int], set[int]] = {}
    for path in files:
        match = _SHARD_NUMBER.search(path.stem)
        if match is not None:
            number, count = int(match[1]), int(match[2])
            shards.setdefault((stem_of(path), count), set()).add(number)

    for (stem, count), numbers in shards.items():
        found = len(numbers)
        if found < count:
            raise DataError(
                f"{files[0].parent} has only {found} of the {count} shards of {stem}: get the"
                f" others, or renumber these, beginning with {stem}-00000-of-{found:05}, to use"
                " them alone"
            )


def find_unused(folder: Path, used: Collection[Path]) -> list[str]:
    """Return notes on the files of a folder that look like data but are not used, if any."""
    names: list[str] = []
    for path in sorted(folder.iterdir()):
        is_compressed = path.suffix.lower() in _COMPRESSED
        suffix = Path(path.stem).suffix if is_compressed else path.suffix
        if suffix.lower() in READERS and path not in used and path.is_file():
            names.append(path.name)

    # Tools have a place of their own, in the rows.
    notes: list[str] = []
    tools = [name for name in names if Path(name).stem.lower() == "tools"]
    others = [name for name in names if name not in tools]
    if tools:
        notes.append(
            f"training does not read {', '.join(tools)} in {folder}: a row's tools are those in its"
            " field 'tools' (generate takes such a file as --tools)"
        )
    if others:
        notes.append(
            f"training does not read {', '.join(others):.200} in {folder}: it reads files that are"
            " named train, valid or test, and are not compressed"
        )
    return notes
