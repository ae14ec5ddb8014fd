"""Replace files as a whole: a reader sees either the old content or the new content."""

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .cache import write_error

SAFE_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # do not follow links or wait for pipes
_TEMPORARY = re.compile(r"\.(removed-)?\d+-[0-9a-f]{16}(-.*)?", re.DOTALL)


def temporary_name(path: Path, prefix: str = ".") -> str:
    """Return a name for a temporary file or folder next to ``path``.

    The name can't be guessed, is unique to this process, and is short enough for any file system.
    """
    return f"{prefix}{os.getpid()}-{secrets.token_hex(8)}-{path.name[:60]}"


def is_temporary(name: str) -> bool:
    """Return whether a name was made by ``temporary_name``."""
    return _TEMPORARY.fullmatch(name) is not None


def _final_path(path: Path) -> Path:
    """Return a path with the final names of temporary folders, for messages to the user."""
    names: list[str] = []
    for part in path.parts:
        found = _TEMPORARY.fullmatch(part)
        final_name = found[2][1:] if found and found[2] else part
        names.append(final_name)
    return Path(*names)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Generator[BinaryIO]:
    """Open a temporary file for writing, and rename it to ``path`` if the block succeeds.

    If ``durable``, the content is on the disk before the file is renamed. The temporary file has a
    random name and its folder stays open, so no other process can redirect the output. A link at
    ``path`` is replaced, not followed. The permissions of an older file are kept.

    Args:
        path: The file to replace.
        durable: Whether the content must survive a power cut. This takes several milliseconds.

    Raises:
        OutputError: The folder can't be created or written, or the disk is full. An older file is
            left unchanged.
    """
    temporary = temporary_name(path)
    folder: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

        # The caller writes the temporary file.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | SAFE_FLAGS
        descriptor = os.open(temporary, flags, 0o666, dir_fd=folder)
        with os.fdopen(descriptor, "w+b") as file:
            _copy_mode(path.name, folder, file.fileno())
            yield file
            file.flush()
            if durable:
                _flush_to_disk(file.fileno())

        # Rename the file only after its content is on the disk.
        os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        if durable:
            _flush_to_disk(folder)
    except OSError as error:
        raise write_error(_final_path(path), error) from error
    finally:
        if folder is not None:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            os.close(folder)


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write ``content`` to ``path`` as ``replacing`` does.

    Raises:
        OutputError: The file can't be written.
    """
    with replacing(path, durable=durable) as file:
        file.write(content)


def _copy_mode(name: str, folder: int, descriptor: int) -> None:
    """Give a new file the permissions of the ordinary file that it will replace."""
    with suppress(OSError):
        old = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISREG(old.st_mode):
            os.fchmod(descriptor, stat.S_IMODE(old.st_mode) & 0o777)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


def _flush_to_disk(descriptor: int) -> None:
    """Flush to the disk itself; on a Mac, fsync only flushes to the drive's cache."""
    full_sync: int | None = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:
        with suppress(OSError):  # some file systems do not support it
            fcntl.fcntl(descriptor, full_sync)
            return

    os.fsync(descriptor)
