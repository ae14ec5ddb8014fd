"""The cache folder, and the error for a path that can't be written."""

import os
from pathlib import Path

from ..errors import ConfigError, OutputError
from ..userpaths import user_path


def cache_folder() -> Path:
    """Return the cache folder: $MLX_LORAPLUS_CACHE, or ~/.cache/mlx_loraplus.

    The folder may not exist yet.

    Raises:
        ConfigError: $MLX_LORAPLUS_CACHE is not a path.
    """
    named = os.environ.get("MLX_LORAPLUS_CACHE")
    if not named:
        return Path.home() / ".cache" / "mlx_loraplus"

    try:
        return Path(user_path(named))
    except ValueError as problem:
        raise ConfigError(f"MLX_LORAPLUS_CACHE {problem}, not {named!r:.80}") from None


def write_error(path: Path, error: OSError) -> OutputError:
    """Return the error for a path that can't be written, with advice."""
    advice = "choose another place"
    if path.is_relative_to(cache_folder().resolve()):
        advice = "set MLX_LORAPLUS_CACHE"

    reason = error.strerror or error
    return OutputError(f"can't write {path}: {reason}; free some space or {advice}")
