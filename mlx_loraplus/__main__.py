"""What ``mlx_loraplus`` and ``python -m mlx_loraplus`` alone answer: the commands there are."""

import sys
from importlib.metadata import distribution


def main() -> None:
    """Name the commands."""
    names = (entry.name for entry in distribution("mlx_loraplus").entry_points if "." in entry.name)
    sys.stderr.write(f"error: give a command, each of which has --help: {', '.join(names)}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    main()
