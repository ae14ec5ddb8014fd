"""``python -m mlx_loraplus.export``; the command is in ``cli.py``."""

from ..cli import export as main

if __name__ == "__main__":
    main()
