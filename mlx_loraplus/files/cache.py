"""The cache folder, and the error for a path that can't be written."""

import errno
import os
from pathlib import Path

from ..errors import ConfigError, OutputError
from ..userpaths import path_of

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path:
    """Return the cache folder: $MLX_LORAPLUS_CACHE, or ~/.cache/mlx_loraplus.

    The folder may not exist yet.

    Raises:
        ConfigError: $MLX_LORAPLUS_CACHE is not a path.
    """
    named = os.environ.get("MLX_LORAPLUS_CACHE")
    if not named:
        return Path.home() / ".cache" / "mlx_loraplus"

    return path_of(named, "MLX_LORAPLUS_CACHE", ConfigError)


def write_error(path: Path, error: OSError) -> OutputError:
    """Return the error for a path that can't be written, with the reason and advice."""
    advice = "choose another place"
    if Path(os.path.realpath(path)).is_relative_to(cache_folder().resolve()):
        advice = "set MLX_LORAPLUS_CACHE to another folder"
    if error.errno in _NO_SPACE:
        advice = f"free some space, or {advice}"

    # The system reports a file instead of a folder in several ways.
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        for parent in path.parents:
            if parent.is_file():
                reason = f"{parent} is a file, not a folder"
    return OutputError(f"can't write {path}: {reason}; {advice}")
