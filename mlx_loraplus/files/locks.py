"""Locks that let only one process at a time work in a folder."""

import os
import re
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ..errors import OutputError
from .atomic import SAFE_FLAGS
from .writable import unwritable

LOCK = ".lock"  # contains the process ID of its holder; empty after a normal end
_MAX_SIZE = 20  # maximum number of bytes in a process ID


@contextmanager
def locked(folder: Path) -> Generator[str | None]:
    """Lock a folder for this process. The lock is released even if the process is killed.

    The folder is that of a run or a sweep: errors name the setting ``adapter_path``.

    Yields:
        The ID of the process that held the lock before, if that process was killed.

    Raises:
        OutputError: Another process holds the lock, ``.lock`` is not a lock, or the folder can't be
            created or written.
    """
    # The file usually stays after the lock is released, because removing it would race with other
    # processes. It is removed only if nothing else was written, as after a refused setting.
    path = folder / LOCK
    # Path.exists would raise in a folder that can't be entered.
    absent = [
        each
        for each in (folder, *folder.parents)
        if not os.path.exists(each)  # noqa: PTH110
    ]
    before = _names(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_lock(path, os.O_RDWR | os.O_CREAT)
    except OutputError:
        raise
    except OSError as error:
        raise unwritable(folder, "adapter_path", folder, error) from error

    with file:
        _acquire(file, folder)
        killed = _read_holder(file)
        _write_holder(file, str(os.getpid()))
        try:
            yield killed or None
        finally:
            _write_holder(file, "")
            with suppress(OSError):
                if LOCK not in before and _names(folder) == before | {LOCK}:
                    path.unlink()
                    for each in absent:
                        each.rmdir()


def _names(folder: Path) -> set[str]:
    """Return the names in a folder; none if it does not exist or is not readable."""
    with suppress(OSError):
        return {entry.name for entry in folder.iterdir()}
    return set()


def check_unlocked(folder: Path) -> None:
    """Check that no other process holds a folder's lock, without creating or changing a file.

    Raises:
        OutputError: Another process holds the lock, or ``.lock`` is not a lock.
    """
    try:
        file = _open_lock(folder / LOCK, os.O_RDONLY)
    except OutputError:
        raise
    except OSError:  # no lock yet, or not readable, which ``locked`` reports
        return

    with file:
        _acquire(file, folder)


def _open_lock(path: Path, mode: int) -> TextIO:
    """Open a lock without changing its content.

    Raises:
        OutputError: The file is a link, or holds something other than a process ID. Writing to it
            would change a file of another program.
        OSError: The file can't be opened.
    """
    not_ours = OutputError(
        f"{path} is not the lock of a run: remove it, or give another --adapter-path"
    )
    try:
        descriptor = os.open(path, mode | SAFE_FLAGS, 0o666)
    except OSError:
        if path.is_symlink() or path.is_dir():
            raise not_ours from None
        raise

    if not _is_lock(descriptor):
        os.close(descriptor)
        raise not_ours
    text_mode = "r+" if mode & os.O_RDWR else "r"
    return os.fdopen(descriptor, text_mode, encoding="utf-8", errors="replace")


def _is_lock(descriptor: int) -> bool:
    """Return whether a file has a single hard link and holds only a process ID, or nothing."""
    # If the file has a second hard link, it may belong to another program.
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > _MAX_SIZE:
        return False
    content = os.pread(descriptor, _MAX_SIZE, 0)
    return re.fullmatch(rb"[0-9]*", content) is not None


def _acquire(file: TextIO, folder: Path) -> None:
    """Lock an open file until it is closed.

    Raises:
        OutputError: Another process holds the lock.
    """
    # Imported here, because ``import mlx_loraplus`` imports this module but no other package.
    # filelock.FileLock would open the file itself, so it could neither refuse a file that is not a
    # lock nor read which process was killed.
    from filelock import lock_descriptor

    try:
        acquired = lock_descriptor(file.fileno(), blocking=False)
    except OSError:  # a network drive without locks: continue without one
        return

    if not acquired:
        holder = _read_holder(file) or "unknown"
        raise OutputError(
            f"another run (process {holder}) is using {folder}: wait until it ends, or give another"
            " --adapter-path"
        )


def _read_holder(file: TextIO) -> str:
    """Return the process ID in a lock, or an empty string."""
    file.seek(0)
    content = file.read(_MAX_SIZE)
    return "".join(character for character in content if character.isdigit())


def _write_holder(file: TextIO, number: str) -> None:
    with suppress(OSError):  # on a full disk, the lock works without the number
        file.seek(0)
        file.truncate(0)
        file.write(number)
        file.flush()
