"""What a person writes as a path: ~ is the home folder, and what can only be a slip is refused."""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

LONGEST, LONGEST_PART = 1024, 255  # bytes, what macOS takes


def user_path(name: str | os.PathLike[str]) -> str:
    """Return a path as the system takes it, ``~`` and ``~name`` replaced by home folders.

    Raises: ValueError, whose text begins with "must", where it can't be a path or is surely not the
    one that is meant.
    """
    text = os.fspath(name)
    if not text:
        raise ValueError("must be a path")
    if text != text.strip():
        raise ValueError("must have no spaces or line ends around it")
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise ValueError("must have no control characters in it")

    parts = (len(part.encode(errors="surrogateescape")) for part in text.split("/"))
    if len(text.encode(errors="surrogateescape")) > LONGEST or max(parts) > LONGEST_PART:
        raise ValueError(f"must have at most {LONGEST:,} bytes, and {LONGEST_PART} between slashes")

    expanded = os.path.expanduser(text)  # noqa: PTH111 (Path's own raises where there is no such user)
    if text.startswith("~") and expanded == text:
        raise ValueError(
            "must begin with the home folder of a user there is (~ or ~name), or with ./~"
        )
    if text.startswith("$") and not Path(text).exists():
        raise ValueError(
            "must be written out, since variables are for the shell: ~ is the home folder"
        )
    return expanded


def public_name(name: str) -> str:
    """Return a hub id as it is, and of a path the last part: the rest is nobody's business."""
    is_id = (
        re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name)
        and not name.startswith(".")
        and not Path(name).exists()
    )
    return name if is_id else Path(name).resolve().name


def public_names(names: Iterable[str]) -> dict[str, str]:
    """Return path → its last part, numbered where several have the same."""
    found: dict[str, str] = {}
    for name in names:
        short = Path(name).resolve().name
        number = 1 + sum(
            other == short or other.startswith(f"{short} (") for other in found.values()
        )
        found[name] = short if number == 1 else f"{short} ({number})"
    return found
