"""What rich prints in a terminal, shown alike elsewhere: as text, and in a notebook."""

import io
from typing import Any

from rich.console import Console


class Shown:
    """A base of what has ``__rich__`` or ``__rich_console__``: it is also its own text and its own HTML."""

    def __str__(self) -> str:
        """Return it as text."""
        console = Console(width=120, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> Any:
        console = Console(width=120, record=True, file=io.StringIO(), force_jupyter=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
