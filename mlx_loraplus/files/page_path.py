"""Where a page is saved, checked before the work that fills it."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ..errors import OutputError
from ..userpaths import path_of
from .writable import check_writable


def check_save_path(
    save_path: str | PathLike[str], *, overwrite: bool, suffixes: Sequence[str] = (".html",)
) -> Path:
    """Check that a page can be saved, and return its path.

    Args:
        save_path: The file to write.
        overwrite: Whether an existing file may be replaced.
        suffixes: The suffixes that the file may have.

    Raises:
        OutputError: The suffix is unknown, the path is a folder or can't be written, or the file
            exists and ``overwrite`` is off.
    """
    path = path_of(save_path, "--save-path", OutputError)
    if path.suffix not in suffixes:
        raise OutputError(f"--save-path {path} must end in {', '.join(suffixes)}")
    check_writable(path, "--save-path", is_file=True)
    if path.is_dir():
        raise OutputError(f"--save-path {path} is a folder: give a file in it")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already: give another --save-path, or --overwrite")
    return path
