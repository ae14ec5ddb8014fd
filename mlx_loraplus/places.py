"""Where this package keeps what it makes, and how it writes: whole files or none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError


def cache_folder() -> Path:
    """Return the cache folder: $MLX_LORAPLUS_CACHE, or ~/.cache/mlx_loraplus. It may not exist yet."""
    return Path(os.environ.get("MLX_LORAPLUS_CACHE") or Path.home() / ".cache" / "mlx_loraplus").expanduser()


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
