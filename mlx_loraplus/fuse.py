"""``python -m mlx_loraplus.fuse``; the command is in ``cli.py``."""

from .cli import fuse as main

if __name__ == "__main__":
    main()
