"""Where this package keeps what it makes, and how it writes: whole files and folders or none, one run in a folder."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from .errors import OutputError

LOCK = ".lock"
_LEFTOVER = re.compile(r"\.(removed-)?\d+-")


def cache_folder() -> Path:
    """Return the cache folder: $MLX_LORAPLUS_CACHE, or ~/.cache/mlx_loraplus. It may not exist yet."""
    return Path(os.environ.get("MLX_LORAPLUS_CACHE") or Path.home() / ".cache" / "mlx_loraplus").expanduser()


def cached_folder(room: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the cache's folder ``room/key``, built if it is not there; of two processes at once, the first builds it.

    Raises:
        OutputError: The cache can't be written.
    """
    folder = cache_folder() / room / key
    if not folder.is_dir():
        with replacing_folder(folder, first_stays=True) as new:
            remove_leftovers(folder.parent, seconds=86400)  # younger ones may be another process's at work
            build(new)
    return folder


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """Open a file beside ``path`` for writing; sync it and rename it into place when the block ends well.

    Raises:
        OutputError: The folder can't be made or written, or the disk is full; an older file is left as it was.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``: a reader sees all of it or the old file. Raises as ``replacing`` does."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing_folder(path: Path, *, first_stays: bool = False) -> Generator[Path]:
    """Make a folder beside ``path`` to fill; sync it and rename it into place when the block ends well, in one step.

    Where ``path`` is a link, it stays one. ``first_stays``: what another process has put there meanwhile is kept.

    Raises:
        OutputError: As ``replacing``; nothing is left of the new folder then, and ``path`` is as it was.
    """
    path = path.resolve()
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for place in (*temporary.rglob("*"), temporary):
            sync(place)
        if not first_stays:
            remove_folder(path)
        try:
            temporary.rename(path)
        except OSError:
            if not (first_stays and path.is_dir()):
                raise
        sync(path.parent)
    except OutputError:  # one of its files could not be written
        raise
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(path: Path, read: Sequence[str], *, overwrite: bool) -> None:
    """Refuse a folder to write, ``save_path``, that holds something, or something that must not go with it.

    Raises:
        OutputError: It is a file; it is or holds the current folder or one of what is ``read``; or it is not empty
            while ``overwrite`` is off.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"save_path {path} is a file: give a folder")
    needed = [place.resolve() for name in (*read, ".") if (place := Path(name).expanduser()).exists()]
    if any(place.is_relative_to(path.resolve()) for place in needed):
        raise OutputError(f"save_path {path} is what is read, or holds it or the current folder: give another folder")
    if any(path.iterdir()) and not overwrite:
        raise OutputError(f"{path} is not empty: give another --save-path, or --overwrite")


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, so that a crash halfway leaves none of that name."""
    if path.exists():
        gone = path.with_name(f".removed-{os.getpid()}-{path.name}")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(folder: Path, seconds: float = 0.0) -> None:
    """Remove what a process that was killed while writing left behind, at least so many seconds ago.

    Without a time only the holder of the folder's lock may call this.
    """
    for path in folder.glob(".*"):
        with suppress(FileNotFoundError):  # another process has just given it its name
            if not _LEFTOVER.match(path.name) or (seconds and time.time() - path.stat().st_mtime < seconds):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def read_bounded(path: Path, most: int = 1 << 26) -> bytes:
    """Return a file's bytes; what should be small, from a stranger, is refused where it is not.

    Raises:
        OSError: It can't be read, is no ordinary file, or has more than ``most`` bytes.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not an ordinary file")
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, allowed are {most:,}")
    return path.read_bytes()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Generator[str | None]:
    """Hold a folder for this process alone; the lock ends with the process, however that ends.

    Yields:
        The process that held it before and was cut off, or None.

    Raises:
        OutputError: Another process holds it, or it can't be made or written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise _unwritten(path, error) from error
    with file:
        _take(file, fcntl.LOCK_EX, folder)
        before = _holder(file)
        _write_holder(file, str(os.getpid()))
        try:
            yield before or None
        finally:
            _write_holder(file, "")


def check_unlocked(folder: Path) -> None:
    """Raise OutputError if another process holds ``folder``; change nothing."""
    if (folder / LOCK).is_file() and os.access(folder / LOCK, os.R_OK):
        with (folder / LOCK).open(encoding="utf-8", errors="replace") as file:
            _take(file, fcntl.LOCK_SH, folder)


def _take(file: TextIO, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"another run (process {_holder(file) or 'unknown'}) is at work in {folder}: wait for it, or give another "
            "--adapter-path"
        ) from None
    except OSError:  # a network drive without locks: go on without
        return


def _holder(file: TextIO) -> str:
    """Return the number of the process that wrote itself into a lock's file."""
    file.seek(0)
    return "".join(character for character in file.read(20) if character.isdigit())


def _write_holder(file: TextIO, number: str) -> None:
    with suppress(OSError):  # on a full disk the lock holds without a name
        file.truncate(0)
        file.write(number)
        file.flush()


def _sync(descriptor: int) -> None:
    """Flush a file to the disk itself: on a Mac fsync alone stops at the drive's cache."""
    full: int | None = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # not every file system has it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def _unwritten(path: Path, error: OSError) -> OutputError:
    place = "set MLX_LORAPLUS_CACHE" if path.is_relative_to(cache_folder().resolve()) else "choose another place"
    return OutputError(f"can't write {path}: {error.strerror or error}; free some space or {place}")
