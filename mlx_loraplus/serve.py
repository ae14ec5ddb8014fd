"""``python -m mlx_loraplus.serve``; the command is in ``cli.py``."""

from .cli import serve as main

if __name__ == "__main__":
    main()
