"""``python -m mlx_loraplus.train``; the command is in ``cli.py``."""

from .cli import train as main

if __name__ == "__main__":
    main()
