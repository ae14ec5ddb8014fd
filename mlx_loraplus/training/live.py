"""A run in a notebook, while it goes."""

import sys
from typing import Any

from .history import Run
from .loop import Event


def in_notebook() -> bool:
    """Tell whether this runs in a kernel that has a page to show things on."""
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


class LivePlot:
    """Shows a run in one place of a notebook: a picture of its losses, or a line where the page shows no HTML."""

    def __init__(self) -> None:
        self._place: Any = None

    def __call__(self, run: Run, _: Event) -> None:
        """Show the run as it stands after an event."""
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        if self._place is None:
            self._place = display(run, display_id=True)
        else:
            self._place.update(run)
