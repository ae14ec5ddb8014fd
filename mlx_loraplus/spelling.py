"""Write the settings in a message as flags or as names.

Messages about settings are written once, with flags. YAML files and Python have names instead.
"""

import re
from collections.abc import Iterable

FLAG = re.compile(r"--?[A-Za-z]")
"""The beginning of a flag, and not of a negative number."""

_FLAG = re.compile(r"--[a-z][a-z-]*[a-z]")

# Where a command starts in a message; the rest of the message keeps its flags.
_COMMAND = re.compile(r"mlx_loraplus[. ][a-z]")


def flag_of(name: str) -> str:
    """Return the flag of a setting or an option, e.g. ``--lr-ratio`` for ``lr_ratio``."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def in_names(message: str, names: Iterable[str]) -> str:
    """Return a message with ``lr_ratio`` instead of ``--lr-ratio``.

    Args:
        message: One problem, with flags.
        names: The settings that are written as names; other flags are kept.
    """
    known = {flag_of(name): name for name in names}
    command = _COMMAND.search(message)
    end = command.start() if command else len(message)
    named = _FLAG.sub(lambda match: known.get(match[0], match[0]), message[:end])
    return named + message[end:]
