"""``python -m mlx_loraplus.doctor``; the command is in ``cli.py``."""

from .cli import doctor as main

if __name__ == "__main__":
    main()
