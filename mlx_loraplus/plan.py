"""``python -m mlx_loraplus.plan``; the command is in ``cli.py``."""

from .cli import plan as main

if __name__ == "__main__":
    main()
