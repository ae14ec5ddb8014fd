"""Links that lead nowhere, and other entries of a folder that are not ordinary files.

Path's methods would raise in a folder that can't be entered; those of os.path return False.
"""

# ruff: noqa: PTH110, PTH112, PTH113, PTH114

import os
from pathlib import Path

from ..errors import OutputError


def check_links(path: Path, name: str) -> None:
    """Check that no link on the way to a folder leads nowhere or in a circle.

    Args:
        path: The folder to write; it may not exist.
        name: The name of the setting that gives the folder, for the error message.

    Raises:
        OutputError: A link leads nowhere or in a circle.
    """
    for part in (*reversed(path.parents), path):
        if _leads_nowhere(part):
            raise OutputError(
                f"{name} {path}: {part} is {describe_entry(part)}: correct or remove the link, or"
                " give another folder"
            )


def describe_entry(path: Path) -> str:
    """Return what is at a path that is not an ordinary file, with an article."""
    if _leads_nowhere(path):
        return f"a link that leads nowhere (to {str(path.readlink())!r:.200})"
    return "a folder" if os.path.isdir(path) else "not an ordinary file"


def is_not_ordinary_file(path: Path) -> bool:
    """Return whether a path exists, but is not an ordinary file."""
    return os.path.lexists(path) and not os.path.isfile(path)


def _leads_nowhere(path: Path) -> bool:
    return os.path.islink(path) and not os.path.exists(path)
