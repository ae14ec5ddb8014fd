"""What a folder holds, so that nothing is written among the files of something else."""

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
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

_RESULTS: tuple[Contents, ...] = ("a run", "a sweep", "an adapter", "a model")
"""What a folder holds that this package has written."""

_PACKAGE = Path(__file__).resolve().parents[1]

_SYSTEM_FOLDERS = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/opt", "/proc", "/sbin", "/sys", "/usr"),
    *("/var", "/Applications", "/Library", "/System", "/Volumes", "/private"),
)

_FREE_NAME = "runs/first"


def check_contents(folder: Path, refused: Iterable[Contents], flag: str) -> None:
    """Check that the files to write in a folder will not be mixed with those of something else.

    Args:
        folder: The folder to write; it may not exist.
        refused: What the folder must not hold.
        flag: The flag that gives the folder, for the error message.

    Raises:
        OutputError: The folder holds one of ``refused``; is a folder of the system; is or contains
            the home folder; is inside this package or the checkpoints of a run; is the
            current folder and holds other files; or is new and has the name of a file.
    """
    _check_place(folder, flag)
    if not folder.exists():
        _check_name(folder, flag)
    if not folder.is_dir():
        return

    names = sorted(entry.name for entry in folder.iterdir())
    for kind in refused:
        for name in names:
            if _marks(name, kind):
                raise OutputError(f"{folder} holds {kind} ({name}): give another {flag}")


def describe_contents(folder: Path) -> str:
    """Return what a folder holds, and the file that shows it, as in "data (train.jsonl)"; or ""."""
    if not folder.is_dir():
        return ""
    names = sorted(entry.name for entry in folder.iterdir())
    found = (f"{kind} ({name})" for kind in _MARKS for name in names if _marks(name, kind))
    return next(found, "")


def _check_place(folder: Path, flag: str) -> None:
    """Check that a folder is not a place for other files, such as the home folder.

    Raises:
        OutputError: The folder is such a place.
    """
    # The home folder is inside the root, and inside the folder of all home folders.
    place = folder.resolve()
    what = ""
    if place == Path(place.anchor):
        what = "the root of the file system"
    elif Path.home().resolve().is_relative_to(place):
        what = "your home folder, or contains it"
    elif place.is_relative_to(_PACKAGE):
        what = "inside the folder of mlx_loraplus itself"
    elif _is_in_checkpoints(place):
        what = "among the checkpoints of a run"
    elif any(place == Path(name).resolve() for name in _system_folders()):
        what = "a folder of the system"
    elif place == Path.cwd():
        names = sorted(entry.name for entry in place.iterdir() if not entry.name.startswith("."))
        results = [name for name in names for kind in _RESULTS if _marks(name, kind)]
        if names and not results:
            what = f"the current folder, which holds other files ({names[0]})"
    if what:
        raise OutputError(
            f"{folder} is {what}: give {flag} a folder of its own, such as {_FREE_NAME}"
        )


def _system_folders() -> list[str]:
    """Return the folders that belong to the system, with the one for temporary files."""
    folders = list(_SYSTEM_FOLDERS)
    with suppress(OSError):  # there is none if the disk is full
        folders.append(tempfile.gettempdir())
    return folders


def _is_in_checkpoints(place: Path) -> bool:
    """Return whether a folder is a run's folder of checkpoints, or is inside of it."""
    folders = [folder for folder in (place, *place.parents) if folder.name == "checkpoints"]
    return any((folder.parent / name).is_file() for folder in folders for name in _MARKS["a run"])


def _marks(name: str, kind: Contents) -> bool:
    """Return whether a file's name marks a folder as one of a kind."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in _MARKS[kind])


def _check_name(folder: Path, flag: str) -> None:
    """Check that the name of a new folder does not have the suffix of a file.

    Raises:
        OutputError: The name has such a suffix.
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
