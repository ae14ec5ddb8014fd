"""Losses over two settings, as a picture and as a table for the terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_hex
from matplotlib.patches import Rectangle
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

_VIRIDIS = matplotlib.colormaps["viridis"].with_extremes(bad="lightgray")
_DARK_INK_ABOVE = 0.6  # fraction of the colour scale
_MAX_NUMBERS = 60  # a map with more cells shows colours only
_MAX_UPRIGHT = 8  # more tick labels than this are rotated
_COLOUR_RANGE = 100  # losses above this multiple of the smallest loss share one colour
_FRAMES = (("white", 0.45), ("red", 0.38))  # colour and half the width of each mark's frame


@dataclass(frozen=True)
class Heatmap:
    """Positive losses on a grid; the smallest loss is the darkest cell."""

    title: str
    x_name: str
    y_name: str
    x: tuple[float, ...]  # ascending
    y: tuple[float, ...]
    losses: np.ndarray  # (y, x); infinite where training diverged, NaN where nothing was tried
    marks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Name → (y, x) indices of a cell; two marks at most."""

    @property
    def _norm(self) -> LogNorm:
        known = np.ma.masked_invalid(self.losses)
        low = known.min()
        return LogNorm(low, min(known.max(), _COLOUR_RANGE * low))

    def draw(self, axes: Axes) -> Any:
        """Draw the map, and return the image for a colour bar."""
        image = axes.imshow(
            np.ma.masked_invalid(self.losses),
            origin="lower",
            norm=self._norm,
            cmap=_VIRIDIS,
            aspect="auto",
        )

        # Ticks and labels.
        axes.set_xticks(range(len(self.x)), _format(self.x))
        axes.set_yticks(range(len(self.y)), _format(self.y))
        if len(self.x) > _MAX_UPRIGHT:
            axes.tick_params("x", rotation=45)
        axes.set(title=self.title, xlabel=self.x_name, ylabel=self.y_name)

        if self.losses.size <= _MAX_NUMBERS:
            self._draw_numbers(axes)
        self._draw_marks(axes)
        return image

    def _draw_numbers(self, axes: Axes) -> None:
        norm = self._norm
        for (row, column), loss in np.ndenumerate(self.losses):
            text, ink = loss_text(loss, digits=3), "k"
            if np.isfinite(loss) and norm(loss) < _DARK_INK_ABOVE:
                ink = "w"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)

    def _draw_marks(self, axes: Axes) -> None:
        for (name, cell), (colour, half) in zip(self.marks.items(), _FRAMES, strict=False):
            row, column = cell
            corner = (column - half, row - half)
            size = 2 * half
            frame = Rectangle(corner, size, size, fill=False, lw=2, color=colour, label=name)
            axes.add_patch(frame)

    def __rich__(self) -> Group:
        """Return a table of coloured cells; a marked cell shows the mark's initial."""
        names = (f"{self.y_name} \\ {self.x_name}", *_format(self.x))
        table = Table(*(Column(name, justify="right") for name in names))
        norm = self._norm

        # The last row of the grid is the top row of the table.
        for row in reversed(range(len(self.y))):
            cells = [self._cell(row, column, norm) for column in range(len(self.x))]
            table.add_row(f"{self.y[row]:.3g}", *cells)

        legend = "".join(f", {name[0]}: {name}" for name in self.marks)
        return Group(f"{self.title}{legend}", table)

    def _cell(self, row: int, column: int, norm: LogNorm) -> Text:
        initials = [name[0] for name, cell in self.marks.items() if cell == (row, column)]
        marks = "".join(f" {initial}" for initial in initials)

        loss = self.losses[row, column]
        text = f"{loss_text(loss)}{marks}"
        if not np.isfinite(loss):
            return Text(text, "dim")

        fraction = float(norm(loss))
        ink = "black" if fraction > _DARK_INK_ABOVE else "white"
        return Text(text, f"{ink} on {to_hex(_VIRIDIS(fraction))}")


def loss_text(loss: float, digits: int = 4) -> str:
    """Return the text of a cell: its loss, or why it has none."""
    if math.isnan(loss):
        return "not tried"
    return f"{loss:.{digits}f}" if math.isfinite(loss) else "diverged"


def _format(values: Sequence[float]) -> list[str]:
    return [f"{value:.3g}" for value in values]
