"""Where this package keeps what it makes once and uses again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: $MLX_LORAPLUS_CACHE, or ~/.cache/mlx_loraplus. It may not exist yet."""
    return Path(os.environ.get("MLX_LORAPLUS_CACHE") or Path.home() / ".cache" / "mlx_loraplus").expanduser()
