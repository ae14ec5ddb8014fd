"""Whether a path can be written, tried before the work whose results go there."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from ..errors import OutputError
from .atomic import temporary_name
from .broken_links import check_links

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def check_writable(path: Path, name: str, *, is_file: bool = False) -> None:
    """Check that a folder, or the folder of a file, can be written, or else created.

    Permissions do not say so for every file system. Therefore, an empty folder with a temporary
    name is made in the nearest folder that exists, and removed again. The time of that folder's
    last change is put back where the system lets us, because a command that is refused later must
    change nothing.

    Args:
        path: The folder or file; it may not exist.
        name: The name of the setting that gives the path, for error messages.
        is_file: Whether the path is that of a file.

    Raises:
        OutputError: A link on the way leads nowhere, a file is in the way, no file can have this
            name, or the nearest folder that exists can't be entered or written.
    """
    check_links(path, name)
    nearest = path.absolute()
    if is_file:
        nearest = nearest.parent
    # Path's methods would raise in a folder that can't be entered.
    while not os.path.exists(nearest):  # noqa: PTH110
        nearest = nearest.parent
    if not os.path.isdir(nearest):  # noqa: PTH112
        where = "" if nearest == path.absolute() else f": {nearest}"
        advice = "another place" if is_file else "a folder"
        raise OutputError(f"{name} {path}{where} is a file: give {advice}")

    probe = nearest / temporary_name(path)
    try:
        # The name of the probe is short, so the path itself is looked up too.
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
        before = nearest.stat()
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise unwritable(path, name, nearest, error) from error

    # The folder may be another user's, or on a drive that sets no times.
    with suppress(OSError):
        os.utime(nearest, ns=(before.st_atime_ns, before.st_mtime_ns))


def unwritable(path: Path, name: str, place: Path, error: OSError) -> OutputError:
    """Return the error for the path of a setting that can't be written.

    Args:
        path: The path as the user gave it.
        name: The name of the setting.
        place: The folder that can't be written.
        error: The error of the system.
    """
    advice = "choose another place"
    if error.errno in _NO_SPACE:
        advice = f"free some space, or {advice}"
    where = "" if place == path.absolute() else f"in {place}: "
    reason = error.strerror or str(error)
    return OutputError(f"{name} {path} can't be written ({where}{reason}): {advice}")
