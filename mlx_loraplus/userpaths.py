"""Paths as users write them: ~ is expanded, and obvious mistakes are refused."""

import os
import re
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from .errors import ConfigError, nearest_names

LONGEST, LONGEST_PART = 1024, 255  # bytes, the limits of macOS
_TEXT_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml")
_SHELL_VARIABLE = re.compile(r"(^|/)\$\w|\$\{\w+\}")
_SIMILAR = 0.6  # the least similarity of a name that may be meant
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def user_path(name: str | os.PathLike[str]) -> str:
    """Return a path for the system, with ``~`` and ``~name`` replaced by home folders.

    Raises:
        ValueError: The text can't be a path, or is obviously a mistake. The message begins with
            "must", so that the name of a setting can precede it.
    """
    text = os.fspath(name)

    # Text that no file system accepts, or that is obviously a mistake.
    if not text:
        raise ValueError("must be a path")
    if text != text.strip():
        raise ValueError("must not begin or end with a space or a line break")
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise ValueError("must not contain control characters")
    try:
        encoded = text.encode(errors="surrogateescape")
        encoded.decode()
    except UnicodeError:
        raise ValueError("must be valid UTF-8") from None
    longest_part = max(len(part) for part in encoded.split(b"/"))
    if len(encoded) > LONGEST or longest_part > LONGEST_PART:
        raise ValueError(f"must have at most {LONGEST:,} bytes, and {LONGEST_PART} between slashes")

    # Path.expanduser would raise for an unknown user.
    expanded = os.path.expanduser(text)  # noqa: PTH111
    if text.startswith("~") and expanded == text:
        raise ValueError(
            "must begin with an existing user's home folder (~ or ~name); write ./~ for a file"
            " whose name begins with ~"
        )
    if _SHELL_VARIABLE.search(text) and not Path(text).exists():
        raise ValueError("must not contain a shell variable: write the path out, or use ~")
    return expanded


def shell_word(path: str | os.PathLike[str]) -> str:
    """Return a path as one word of a command, which no program takes for a flag."""
    text = os.fspath(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def looks_like_file(text: str) -> bool:
    """Return whether a text that should be a prompt looks like the name of a text file."""
    is_one_word = len(text.split()) == 1
    return is_one_word and Path(text).suffix.lower() in _TEXT_SUFFIXES


def path_of(value: str | os.PathLike[str], name: str, error: type[Exception]) -> Path:
    """Return the path that a user gives under a name.

    Raises:
        Exception: ``user_path`` refuses it; the type is ``error``.
    """
    try:
        return Path(user_path(value))
    except ValueError as problem:
        raise error(f"{name} {problem}, not {os.fspath(value)!r:.80}") from None


def similar_paths(path: Path, suffixes: Collection[str] | None = None) -> str:
    """Return a hint that names the folders and files beside a missing path with similar names.

    Args:
        path: The missing path.
        suffixes: The suffixes of the files to consider; by default, all files are.
    """
    beside: dict[str, str] = {}
    for entry in path.parent.glob("*"):
        if suffixes is None or entry.suffix.lower() in suffixes or entry.is_dir():
            beside[entry.name] = str(entry)
    matches = [beside[name] for name in nearest_names(path.name, beside, _SIMILAR)]
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""


def divided_path(parts: Sequence[str]) -> int:
    """Return how many words from the first are one existing path, which a shell has divided.

    It is 0 if the words are no such path, or the first one exists itself.
    """
    if not parts or Path(parts[0]).exists():
        return 0
    counts = range(len(parts), 1, -1)
    return next((count for count in counts if Path(" ".join(parts[:count])).exists()), 0)


def check_not_divided(paths: Sequence[str]) -> None:
    """Check that several paths are not the words of one path with spaces.

    Raises:
        ConfigError: The first words are.
    """
    if count := divided_path(paths):
        raise ConfigError(
            f"there is no folder {paths[0]!r}: put quotes around {' '.join(paths[:count])!r}"
        )


def public_name(name: str) -> str:
    """Return a hub id unchanged, and the last part of a path, so that no private path is shown."""
    looks_like_id = _HUB_ID.fullmatch(name) is not None and not name.startswith(".")
    if looks_like_id and not Path(name).exists():
        return name
    return Path(name).resolve().name


def public_names(paths: Iterable[str]) -> dict[str, str]:
    """Map each path to its last part, with a number if several paths have the same last part."""
    found: dict[str, str] = {}
    for path in paths:
        short = Path(path).resolve().name
        same = [name for name in found.values() if name == short or name.startswith(f"{short} (")]
        found[path] = f"{short} ({len(same) + 1})" if same else short
    return found
