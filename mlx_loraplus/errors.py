"""Everything that this package raises on purpose.

::

    LoRAPlusError                 an error that the user can fix; commands exit with code 2
    ├── ConfigError               a flag, a YAML key or a keyword argument
    ├── DataError                 a data folder, a file or a row
    ├── ModelError                a model's name, folder, GGUF file or weights
    ├── AdapterError              an adapter's folder, or an adapter that does not fit its base
    ├── OutputError               a path that can't be written, or must not be overwritten
    ├── DeviceError               memory ran out, or the GPU failed or was stopped by the system
    ├── BackendError              MLX has no backend for this machine, or its backend can't start
    └── PeerError                 another process of the run was lost

A message is one line: what is wrong, the value, what is allowed, and what to do next. Problems that
are found together are reported together, joined by ``join_problems``. Any other exception that
escapes is a bug and keeps its traceback.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_MAX_COMPARED = 64  # characters; the time to compare names grows with the square of their length
_SHORTEST_BEGINNING = 3  # characters; a shorter name begins too many others
_MOST_SUGGESTED = 3


class LoRAPlusError(Exception):
    """The base class of the tree above: an error that the user can fix."""

    reported = False
    """True if this error has already been shown, here or by another process."""


class ConfigError(LoRAPlusError, ValueError):
    """A setting that is unknown, out of range, or in conflict with another one."""


class DataError(LoRAPlusError, ValueError):
    """Data that can't be read, or rows that can't be trained on."""


class ModelError(LoRAPlusError, ValueError):
    """A model that can't be found, read or used."""


class AdapterError(LoRAPlusError, ValueError):
    """An adapter that can't be read or does not belong to its base."""


class OutputError(LoRAPlusError, OSError):
    """A path that can't be written, or must not be overwritten."""


class DeviceError(LoRAPlusError, RuntimeError):
    """Memory ran out, or the GPU failed, or the system stopped the GPU's work."""


class BackendError(LoRAPlusError, ImportError):
    """MLX has no backend for this machine, or its backend finds no driver or no GPU."""


class PeerError(LoRAPlusError, RuntimeError):
    """Another process of the run has ended, hangs, or can no longer be reached."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name, e.g. ``" (did you mean 'a' or 'b'?)"``.

    The hint lists the most similar of the known names. It is empty if no name is similar.
    """
    matches = nearest_names(name, known)
    if not matches:
        return ""
    return f" (did you mean {' or '.join(map(repr, matches))}?)"


def nearest_names(name: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """Return the known names that are most similar to a name, at most three.

    A name that differs only in upper and lower case is the only one. Names that begin with the
    given one come first.

    Args:
        name: The name that is unknown.
        known: The names that exist.
        cutoff: The least similarity, from 0 to 1.
    """
    written = name[:_MAX_COMPARED].casefold()
    spellings = {word.casefold(): word for word in known}
    if written in spellings:
        return [spellings[written]]

    begun: list[str] = []
    if len(written) >= _SHORTEST_BEGINNING:
        begun = [word for word in spellings if word.startswith(written)]
    close = get_close_matches(written, list(spellings), cutoff=cutoff)
    found = [*begun, *(word for word in close if word not in begun)]
    return [spellings[word] for word in found[:_MOST_SUGGESTED]]


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as ``"1 row"`` or ``"1,200 rows"``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"


def join_problems(problems: Sequence[str], most: int = 8, count: int | None = None) -> str:
    """Join problems into one line.

    Args:
        problems: The problems, one phrase each.
        most: Maximum number of problems to include.
        count: Number of problems if ``problems`` are only the first of them.
    """
    total = len(problems) if count is None else count
    line = "; ".join(problems[:most])
    if total > most:
        line += f"; and {total - most:,} more"
    return line
