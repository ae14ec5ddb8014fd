"""``python -m mlx_loraplus.chat``; the command is in ``cli.py``."""

from .cli import chat as main

if __name__ == "__main__":
    main()
