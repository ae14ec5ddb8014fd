"""Results as rich tables, in plain text and in a notebook; and the progress of slow work."""

import io
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

WIDTH = 120  # characters
_LINE_SECONDS = 10.0  # between two lines about the progress

_COMMAND = re.compile(r"mlx_loraplus\b|mlx\.launch|pip install|--\S.* --\S")
"""A command, or several flags, in a message."""

Item = TypeVar("Item")
Tracker = Callable[[Sequence[Any], str], Iterator[Any]]
"""Yields the items of a sequence, and shows the progress under a label."""


def wrap_words(text: str, width: int) -> str:
    """Wrap the lines of a message between words, so that they fit a terminal.

    A line with a command is not wrapped here: a line that the terminal wraps is copied as one line.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= width or _COMMAND.search(line):
            lines.append(line)
        else:
            lines += textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def untracked(items: Sequence[Item], label: str) -> Iterator[Item]:  # noqa: ARG001
    """Yield the items without showing anything."""
    yield from items


def tracked(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yield the items, and show the progress on standard error: a bar, or lines in a pipe."""
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        yield from track(items, label, console=console, transient=True)
        return

    shown = -_LINE_SECONDS
    for done, item in enumerate(items):
        if time.monotonic() - shown >= _LINE_SECONDS:
            sys.stderr.write(f"{label}: {done:,} of {len(items):,}\n")
            sys.stderr.flush()
            shown = time.monotonic()
        yield item


class RichDisplay:
    """A base class for results that define ``__rich__`` or ``__rich_console__``.

    It renders the results as text for ``print`` and as HTML for notebooks.
    """

    def __str__(self) -> str:
        """Return the result as text."""
        console = Console(width=WIDTH, color_system=None, force_jupyter=False)

        with console.capture() as captured:
            console.print(self)

        return captured.get()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> Any:
        console = Console(width=WIDTH, record=True, file=io.StringIO(), force_jupyter=False)
        console.print(self)

        # Rich's own template is a whole page; a notebook's cell needs only the text.
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
