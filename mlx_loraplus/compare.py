"""``python -m mlx_loraplus.compare``; the command is in ``cli.py``."""

from .cli import compare as main

if __name__ == "__main__":
    main()
