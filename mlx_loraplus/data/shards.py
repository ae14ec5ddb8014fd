"""The names of data files in a folder: shards, and files that nothing reads."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from ..errors import DataError
from .readers import READERS

_SHARD_NUMBER = re.compile(r"-(\d+)-of-(\d+)$")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def stem_of(path: Path) -> str:
    """Return a file's name in lower case, without the suffix and the shard number."""
    return _SHARD_NUMBER.sub("", path.stem).lower()


def check_shards(files: Sequence[Path]) -> None:
    """Check that no shard is missing, such as train-00001-of-00003.jsonl.

    Raises:
        DataError: A file is named as one of several shards, and others are not there.
    """
    shards: dict[tuple[str, int], set[int]] = {}
    for path in files:
        match = _SHARD_NUMBER.search(path.stem)
        if match is not None:
            number, count = int(match[1]), int(match[2])
            shards.setdefault((stem_of(path), count), set()).add(number)

    for (stem, count), numbers in shards.items():
        if len(numbers) < count:
            raise DataError(
                f"{files[0].parent} has only {len(numbers)} of the {count} shards of {stem}: get"
                " the others, or rename the files without their numbers to use these alone"
            )


def find_unused(folder: Path, used: Collection[Path]) -> list[str]:
    """Return a note on the files of a folder that look like data and are not used."""
    names: list[str] = []
    for path in sorted(folder.iterdir()):
        name = Path(path.stem) if path.suffix.lower() in _PACKED else path
        if name.suffix.lower() in READERS and path not in used and path.is_file():
            names.append(path.name)
    if not names:
        return []
    return [
        f"files in {folder} that are not used: {', '.join(names):.200}; the files that are used"
        " are named train, valid or test, and are not compressed"
    ]
