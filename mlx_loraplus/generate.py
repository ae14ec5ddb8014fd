"""``python -m mlx_loraplus.generate``; the command is in ``cli.py``."""

from .cli import generate as main

if __name__ == "__main__":
    main()
