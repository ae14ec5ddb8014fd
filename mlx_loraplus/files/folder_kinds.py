"""What a folder holds, so that nothing is written among the files of something else."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from ..errors import OutputError

Contents = Literal["a run", "a sweep", "an adapter", "a model", "data"]

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")

FILE_SUFFIXES = (*DATA_SUFFIXES, ".gguf", ".safetensors", ".bin", ".npz", ".yaml", ".yml", ".html")

# What a folder holds → patterns of the names of files by which it is recognized.
_MARKS: dict[Contents, tuple[str, ...]] = {
    "a run": ("history.jsonl",),
    "a sweep": ("trials.jsonl",),
    "an adapter": ("adapters.safetensors",),
    "a model": ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model*.bin"),
    "data": (
        *(f"train{suffix}" for suffix in DATA_SUFFIXES),
        *(f"train-*-of-*{suffix}" for suffix in DATA_SUFFIXES),
    ),
}


def check_contents(folder: Path, refused: Iterable[Contents], flag: str) -> None:
    """Check that a folder holds nothing that must not be mixed with what will be written.

    Args:
        folder: The folder to write; it may not exist.
        refused: What it must not hold.
        flag: The flag that gives the folder, for the error message.

    Raises:
        OutputError: It holds one of these.
    """
    if not folder.exists():
        _check_name(folder, flag)
    if not folder.is_dir():
        return

    names = sorted(entry.name for entry in folder.iterdir())
    for kind in refused:
        for name in names:
            if any(fnmatchcase(name.lower(), pattern) for pattern in _MARKS[kind]):
                raise OutputError(f"{folder} holds {kind} ({name}): give another {flag}")


def _check_name(folder: Path, flag: str) -> None:
    """Check that the name of a new folder is not meant for a file.

    Raises:
        OutputError: It is.
    """
    suffix = folder.suffix.lower()
    if suffix in FILE_SUFFIXES:
        hint = ""
        if suffix == ".gguf":
            hint = " (export --to gguf writes .gguf files into a folder)"
        raise OutputError(
            f"{folder} is the name of a file, and a folder will be written{hint}: give {flag} a"
            f" name without {suffix}, such as {folder.with_suffix('')}"
        )


def check_apart(folder: Path, read: Sequence[str], flag: str) -> None:
    """Check that a folder to write is not among the folders that are read.

    Args:
        folder: The folder to write; it may not exist.
        read: Paths, or names that may be paths.
        flag: The flag that gives the folder, for the error message.

    Raises:
        OutputError: It is one of these.
    """
    for name in read:
        if folder.is_dir() and Path(name).is_dir() and folder.samefile(name):
            raise OutputError(f"{folder} is also read by this run: give another {flag}")
