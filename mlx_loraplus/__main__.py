"""``python -m mlx_loraplus COMMAND …``; the commands are in ``cli.py``."""

from .cli import main

if __name__ == "__main__":
    main()
