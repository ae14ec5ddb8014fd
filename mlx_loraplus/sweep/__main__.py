"""``python -m mlx_loraplus.sweep``; the command is in ``cli.py``."""

from ..cli import sweep as main

if __name__ == "__main__":
    main()
