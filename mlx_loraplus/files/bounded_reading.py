"""Read files of unknown origin without waiting for a pipe or filling the memory."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

LFS_ADVICE = "a pointer of Git LFS, not the file itself: run git lfs pull in its folder"


def read_bounded(path: Path, most: int = 1 << 26) -> bytes:
    """Return the bytes of a file that should be small.

    Args:
        path: The file.
        most: Maximum size, in bytes.

    Raises:
        OSError: The file can't be read, is not an ordinary file, or is larger than ``most``.
    """
    with open_ordinary(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size:,} bytes, allowed are {most:,}")
        return file.read(most + 1)


def is_lfs_pointer(start: bytes) -> bool:
    """Return whether a file that begins with these bytes is a pointer of Git LFS.

    A clone without Git LFS has such a text of three lines in place of each large file.
    """
    return start.startswith(b"version https://git-lfs.github.com/spec/")


def open_ordinary(path: Path) -> BinaryIO:
    """Open a file for reading, without waiting if it is a pipe.

    Raises:
        OSError: The file can't be read, or is not an ordinary file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not an ordinary file")
    return os.fdopen(descriptor, "rb")
