"""Folders that are written, replaced or removed as a whole."""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError
from .atomic import is_temporary, sync, temporary_name
from .broken_links import check_links
from .cache import cache_folder, write_error
from .folder_kinds import Contents, check_contents
from .writable import check_writable

IsOurs = Callable[[str], bool]  # whether this package writes a path, relative to the folder
_DAY = 86_400.0  # seconds
_MAX_AGE = 30 * _DAY  # after which an unused folder of the cache is removed


def _all_ours(_: str) -> bool:
    return True


def cached_folder(section: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder ``section/key`` of the cache, and build it if it is missing.

    If two processes build the folder at the same time, the one that is finished first is kept.

    Args:
        section: A folder of the cache.
        key: The name of the folder in it.
        build: Called with an empty folder to fill.

    Raises:
        OutputError: The cache can't be written.
    """
    folder = cache_folder() / section / key
    if folder.is_dir():
        return folder

    with replacing_folder(folder, first_stays=True) as new:
        # Younger leftovers may belong to a process that is still writing.
        remove_leftovers(folder.parent, seconds=_DAY)
        build(new)
    return folder


def remove_unused(section: str) -> None:
    """Remove the folders in a section of the cache that have not been used for a month.

    Code that uses such a folder must update its modification time.
    """
    for folder in (cache_folder() / section).glob("[!.]*"):
        # Another process may remove it at the same time.
        with suppress(OSError):
            age = time.time() - folder.stat().st_mtime
            if age > _MAX_AGE:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing_folder(
    path: Path, *, first_stays: bool = False, is_ours: IsOurs = _all_ours
) -> Generator[Path]:
    """Create a temporary folder to fill, and rename it to ``path`` if the block succeeds.

    The content is flushed to the disk before the folder is renamed. A link at ``path`` stays a
    link.

    Args:
        path: The folder to write.
        first_stays: Keep a folder that another process has created at ``path`` in the meantime.
        is_ours: Returns whether this package writes a path. All other files in the old folder
            belong to the user and are moved to the new folder.

    Raises:
        OutputError: The folder can't be written. The new folder is removed, and ``path`` is left
            unchanged.
    """
    check_links(path, "the folder")
    given, path = path, path.resolve()
    temporary = path.with_name(temporary_name(path))
    try:
        # The caller fills the temporary folder.
        temporary.mkdir(parents=True)
        yield temporary
        for each in (*temporary.rglob("*"), temporary):
            sync(each)

        # Move the temporary folder to ``path``.
        if first_stays:
            _rename_if_first(temporary, path)
        elif others_in(path, is_ours):
            _swap(path, temporary, is_ours)
        else:
            remove_folder(path)
            temporary.rename(path)
        sync(path.parent)
    except OutputError:  # a file in the folder could not be written
        raise
    except OSError as error:
        raise write_error(given, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_if_first(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``, unless another process has created ``path`` first."""
    try:
        new.rename(path)
    except OSError:
        if not path.is_dir():
            raise


def others_in(folder: Path, is_ours: IsOurs) -> list[Path]:
    """Return the user's files in a folder, relative to it and sorted.

    Files, links and empty folders count, at any depth.
    """
    if not folder.is_dir():
        return []

    others: list[Path] = []
    for path in folder.rglob("*"):
        is_filled_folder = path.is_dir() and not path.is_symlink() and any(path.iterdir())
        inside = path.relative_to(folder)
        if not is_filled_folder and not is_ours(inside.as_posix()):
            others.append(inside)
    return sorted(others)


def _swap(path: Path, new: Path, is_ours: IsOurs) -> None:
    """Replace an old folder by a new one, and move the user's files to the new one.

    ``remove_leftovers`` does not match the old folder's temporary name, so a crash loses no file
    of the user.
    """
    old = path.with_name(f".replaced-{secrets.token_hex(8)}-{path.name[:60]}")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise

    # A file of the user is dropped if the new folder has a file with the same name.
    for other in others_in(old, is_ours):
        if not os.path.lexists(path / other):
            (path / other).parent.mkdir(parents=True, exist_ok=True)
            (old / other).rename(path / other)
    shutil.rmtree(old, ignore_errors=True)


def check_free(
    path: Path, read: Sequence[str], *, overwrite: bool, refused: Iterable[Contents] = ()
) -> None:
    """Check that the folder ``save_path`` can be written and replaced.

    Args:
        path: The folder.
        read: Paths, or names that may be paths, that are read.
        overwrite: Whether a folder that is not empty may be replaced.
        refused: What the folder must not hold, even with ``overwrite``.

    Raises:
        OutputError: ``path`` or the folder around it can't be written; it is a file, is named like
            one, or is a link that leads nowhere; it is or contains the current folder or a path
            that is read; it holds what is refused; or it is not empty and ``overwrite`` is off.
    """
    check_writable(path, "--save-path")
    if not path.exists():
        check_contents(path, refused, "--save-path")  # the name itself
        return

    # Replacing the folder must not remove the current folder or a path that is read.
    for name in (*read, "."):
        needed = Path(name).expanduser()
        if needed.exists() and needed.resolve().is_relative_to(path.resolve()):
            kept = "the current folder" if name == "." else f"{name}, which is read"
            raise OutputError(f"--save-path {path} is or contains {kept}: give another folder")

    check_contents(path, refused, "--save-path")
    if any(path.iterdir()) and not overwrite:
        raise OutputError(
            f"{path} is not empty: give another --save-path, or --overwrite to replace the files in"
            " it that have the same names"
        )
    # The folder is replaced by one that is made beside it.
    check_writable(path.resolve(), "--save-path", is_file=True)


def remove_folder(path: Path, is_ours: IsOurs = _all_ours) -> None:
    """Remove a folder if it exists; a crash never leaves a part of it under this name.

    If the folder also holds files of the user, only our own files in it are removed, one by one.
    """
    if path.is_symlink():
        path.unlink()
    elif others_in(path, is_ours):
        for each in path.iterdir():
            if is_ours(each.name) and not each.is_dir():
                each.unlink()
    # Removing takes time, so the folder is renamed first.
    elif path.exists():
        removed = path.with_name(temporary_name(path, ".removed-"))
        path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(folder: Path, seconds: float = 0.0) -> None:
    """Remove temporary files and folders that a killed process left in ``folder``.

    Args:
        folder: The folder to clean.
        seconds: Minimum age. With 0, only the holder of the folder's lock may call this.
    """
    for path in folder.glob(".*"):
        if not is_temporary(path.name):
            continue
        with suppress(FileNotFoundError):  # its process has just renamed it
            age = time.time() - path.lstat().st_mtime
            if seconds and age < seconds:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
