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

from .errors import ConfigError, OutputError
from .userpaths import user_path

LOCK = ".lock"
_LEFTOVER = re.compile(
    r"\.(removed-)?\d+-[0-9a-f]{16}(-.*)?", re.DOTALL
)  # as _temporary_name makes them
_HOLDER_SIZE = 20  # of the number of a process
_OPEN_SAFELY = (
    os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
)  # no link is followed, and no pipe waited for


def cache_folder() -> Path:
    """Return the cache folder: $MLX_LORAPLUS_CACHE, or ~/.cache/mlx_loraplus. It may not exist yet.

    Raises:
        ConfigError: $MLX_LORAPLUS_CACHE is no path.
    """
    named = os.environ.get("MLX_LORAPLUS_CACHE")
    try:
        return Path(user_path(named)) if named else Path.home() / ".cache" / "mlx_loraplus"
    except ValueError as problem:
        raise ConfigError(f"MLX_LORAPLUS_CACHE {problem}, not {named!r:.80}") from None


def cached_folder(room: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the cache's folder ``room/key``, built if it is not there; of two processes at once, the first builds it.

    Raises:
        OutputError: The cache can't be written.
    """
    folder = cache_folder() / room / key
    if not folder.is_dir():
        with replacing_folder(folder, first_stays=True) as new:
            remove_leftovers(
                folder.parent, seconds=86400
            )  # younger ones may be another process's at work
            build(new)
    return folder


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """Open a file beside ``path`` for writing; sync it and rename it into place when the block ends well.

    The file has a new, random name in a folder that is held open, so that nobody can lead the
    writing elsewhere. A link at ``path`` is replaced, not followed; a file's permissions are kept.

    Raises:
        OutputError: The folder can't be made or written, or the disk is full; an older file is left
            as it was.
    """
    temporary, home = _temporary_name(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        home = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        new = os.open(
            temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_SAFELY, 0o666, dir_fd=home
        )
        with os.fdopen(new, "w+b") as file:
            _copy_mode(path.name, home, file.fileno())
            yield file
            file.flush()
            _sync(file.fileno())
        os.rename(temporary, path.name, src_dir_fd=home, dst_dir_fd=home)
        _sync(home)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        if home is not None:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=home)
            os.close(home)


def _temporary_name(path: Path, prefix: str = ".") -> str:
    """Return a name that nobody can guess, of this process and for ``path``, short enough for any file system."""
    return f"{prefix}{os.getpid()}-{secrets.token_hex(8)}-{path.name[:60]}"


def _copy_mode(name: str, home: int, descriptor: int) -> None:
    """Give a new file the permissions of the one that it will replace, if that is an ordinary file."""
    with suppress(OSError):
        there = os.stat(name, dir_fd=home, follow_symlinks=False)
        if stat.S_ISREG(there.st_mode):
            os.fchmod(descriptor, stat.S_IMODE(there.st_mode) & 0o777)


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``: a reader sees all of it or the old file. Raises as ``replacing`` does."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing_folder(
    path: Path, *, first_stays: bool = False, is_ours: Callable[[str], bool] = lambda _: True
) -> Generator[Path]:
    """Make a folder beside ``path`` to fill; sync it and rename it into place when the block ends well, in one step.

    Where ``path`` is a link, it stays one. ``first_stays``: what another process has put there
    meanwhile is kept. ``is_ours``: files that the old folder holds at other paths are a person's,
    and are moved to the new one.

    Raises:
        OutputError: As ``replacing``; nothing is left of the new folder then, and ``path`` is as it
            was.
    """
    path = path.resolve()
    temporary = path.with_name(_temporary_name(path))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for place in (*temporary.rglob("*"), temporary):
            sync(place)
        if first_stays:
            _rename_first(temporary, path)
        elif others_in(path, is_ours):
            _swap(path, temporary, is_ours)
        else:
            remove_folder(path)
            temporary.rename(path)
        sync(path.parent)
    except OutputError:  # one of its files could not be written
        raise
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_first(new: Path, path: Path) -> None:
    """Rename a folder, unless another process was first."""
    try:
        new.rename(path)
    except OSError:
        if not path.is_dir():
            raise


def others_in(folder: Path, is_ours: Callable[[str], bool]) -> list[Path]:
    """Return the files, links and empty folders in a folder, at any depth, whose paths in it are not ours."""
    if not folder.is_dir():
        return []
    found = [
        place
        for place in folder.rglob("*")
        if place.is_symlink() or not place.is_dir() or not any(place.iterdir())
    ]
    inside = (place.relative_to(folder) for place in found)
    return sorted(path for path in inside if not is_ours(path.as_posix()))


def _swap(path: Path, new: Path, is_ours: Callable[[str], bool]) -> None:
    """Put a new folder in the place of an old one, and move over what is a person's.

    The old one's name on the way is not one of those that are cleared away after a crash.
    """
    old = path.with_name(f".replaced-{secrets.token_hex(8)}-{path.name[:60]}")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    for other in others_in(old, is_ours):
        if not os.path.lexists(path / other):
            (path / other).parent.mkdir(parents=True, exist_ok=True)
            (old / other).rename(path / other)
    shutil.rmtree(old, ignore_errors=True)


def check_free(path: Path, read: Sequence[str], *, overwrite: bool) -> None:
    """Refuse a folder to write, ``save_path``, that holds something, or something that must not go with it.

    Raises:
        OutputError: It is a file; it is or holds the current folder or one of what is ``read``; or
            it is not empty while ``overwrite`` is off.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"save_path {path} is a file: give a folder")
    needed = [
        place.resolve() for name in (*read, ".") if (place := Path(name).expanduser()).exists()
    ]
    if any(place.is_relative_to(path.resolve()) for place in needed):
        raise OutputError(
            f"save_path {path} is what is read, or holds it or the current folder: give another"
            " folder"
        )
    if any(path.iterdir()) and not overwrite:
        raise OutputError(
            f"{path} is not empty: give another --save-path, or --overwrite (it replaces what has"
            " the names to write)"
        )


def remove_folder(path: Path, is_ours: Callable[[str], bool] = lambda _: True) -> None:
    """Remove a folder, if it is there, so that a crash halfway leaves none of that name.

    ``is_ours``: where it holds files of other names too, they stay.
    """
    if path.is_symlink():
        path.unlink()
    elif others_in(path, is_ours):
        for place in path.iterdir():
            if is_ours(place.name) and not place.is_dir():
                place.unlink()
    elif path.exists():
        gone = path.with_name(_temporary_name(path, ".removed-"))
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(folder: Path, seconds: float = 0.0) -> None:
    """Remove what a process that was killed while writing left behind, at least so many seconds ago.

    Without a time only the holder of the folder's lock may call this.
    """
    for path in folder.glob(".*"):
        with suppress(FileNotFoundError):  # another process has just given it its name
            if not _LEFTOVER.fullmatch(path.name) or (
                seconds and time.time() - path.lstat().st_mtime < seconds
            ):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def read_bounded(path: Path, most: int = 1 << 26) -> bytes:
    """Return a file's bytes; what should be small, from a stranger, is refused where it is not.

    Raises:
        OSError: It can't be read, is no ordinary file, or has more than ``most`` bytes.
    """
    with open_ordinary(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size:,} bytes, allowed are {most:,}")
        return file.read(most + 1)


def open_ordinary(path: Path) -> BinaryIO:
    """Open a file for reading, without waiting where it is a pipe.

    Raises:
        OSError: It can't be read, or is no ordinary file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not an ordinary file")
    return os.fdopen(descriptor, "rb")


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
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
        file = _open_lock(path, os.O_RDWR | os.O_CREAT)
    except OutputError:
        raise
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
    """Raise OutputError if another process holds ``folder``, or its lock's file is none of ours; change nothing."""
    path = folder / LOCK
    try:
        file = _open_lock(path, os.O_RDONLY)
    except OutputError:
        raise
    except OSError:  # there is none, or it can't be read: locking it will tell
        return
    with file:
        _take(file, fcntl.LOCK_SH, folder)


def _open_lock(path: Path, mode: int) -> TextIO:
    """Open a lock's file, changing nothing in it.

    Raises:
        OutputError: It is a link, or another thing that no run has made: writing to it would change
            a stranger's file.
        OSError: It can't be opened.
    """
    stranger = OutputError(
        f"{path} is not the lock of a run: remove it, or give another --adapter-path"
    )
    try:
        descriptor = os.open(path, mode | _OPEN_SAFELY, 0o666)
    except OSError as error:
        if path.is_symlink() or path.is_dir():
            raise stranger from None
        raise error from None
    status = os.fstat(descriptor)
    ordinary = (
        stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size <= _HOLDER_SIZE
    )
    if not ordinary or not re.fullmatch(rb"[0-9]*", os.pread(descriptor, _HOLDER_SIZE, 0)):
        os.close(descriptor)
        raise stranger
    return os.fdopen(
        descriptor, "r+" if mode & os.O_RDWR else "r", encoding="utf-8", errors="replace"
    )


def _take(file: TextIO, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"another run (process {_holder(file) or 'unknown'}) is at work in {folder}: wait for"
            " it, or give another --adapter-path"
        ) from None
    except OSError:  # a network drive without locks: go on without
        return


def _holder(file: TextIO) -> str:
    """Return the number of the process that wrote itself into a lock's file."""
    file.seek(0)
    return "".join(character for character in file.read(_HOLDER_SIZE) if character.isdigit())


def _write_holder(file: TextIO, number: str) -> None:
    with suppress(OSError):  # on a full disk the lock holds without a name
        file.seek(0)
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
    place = (
        "set MLX_LORAPLUS_CACHE"
        if path.is_relative_to(cache_folder().resolve())
        else "choose another place"
    )
    return OutputError(f"can't write {path}: {error.strerror or error}; free some space or {place}")
