"""Where this package keeps what it makes, and how it writes: whole files or none."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError


def cache_folder() -> Path:
    """Return the cache folder: $MLX_LORAPLUS_CACHE, or ~/.cache/mlx_loraplus. It may not exist yet."""
    return Path(os.environ.get("MLX_LORAPLUS_CACHE") or Path.home() / ".cache" / "mlx_loraplus").expanduser()


def cached_folder(room: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the cache's folder ``room/key``, built if it is not there.

    It is built under another name and renamed when whole, so a crash leaves nothing that looks like one, and two
    processes at once both end with the one that was first.

    Raises:
        OutputError: The cache can't be written.
    """
    home = cache_folder() / room
    folder = home / key
    if folder.is_dir():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(home)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=home))
    except OSError as problem:
        raise OutputError(f"the cache {home} can't be written: {problem.strerror}; set MLX_LORAPLUS_CACHE") from None
    try:
        build(building)
        for file in building.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        with suppress(OSError):  # another process was first: its folder is as good as ours
            building.rename(folder)
        if not folder.is_dir():
            raise OutputError(f"{folder} can't be written; remove what is there")
    except OSError as problem:
        if isinstance(problem, OutputError):
            raise
        raise OutputError(
            f"writing {home} failed: {problem.strerror}; free some space or set MLX_LORAPLUS_CACHE"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _remove_leftovers(home: Path) -> None:
    """Remove what a killed process left behind more than a day ago."""
    for folder in home.glob(".building-*"):
        if time.time() - folder.stat().st_mtime > 86400:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
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
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"can't write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``: a reader sees all of it or the old file. Raises as ``replacing`` does."""
    with replacing(path) as file:
        file.write(content)
