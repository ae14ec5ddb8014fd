"""Where a page is saved, checked before the work that fills it."""

import os
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
    # Path's method would raise in a folder that can't be entered.
    if os.path.isdir(path):  # noqa: PTH112
        raise OutputError(
            f"--save-path {path} is a folder: give the name of a file, which ends in"
            f" {' or '.join(suffixes)}"
        )
    if path.suffix not in suffixes:
        raise OutputError(f"--save-path {path} must end in {', '.join(suffixes)}")
    check_writable(path, "--save-path", is_file=True)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already: give another --save-path, or --overwrite")
    return path
