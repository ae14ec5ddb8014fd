"""Results that print as rich tables: the same content as plain text and in a notebook."""

import io
from typing import Any

from rich.console import Console

WIDTH = 120  # characters


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
