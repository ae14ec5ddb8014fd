"""Losses over two settings as a picture and as a table for the terminal."""

from collections.abc import Mapping
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
_LIGHT = 0.6  # share of the colours above which ink is dark
_FEW = 60  # cells up to which each shows its number


@dataclass(frozen=True)
class Heatmap:
    """Positive losses on a grid, the least darkest; those above 100 times the least share a colour."""

    title: str
    x_name: str
    y_name: str
    x: tuple[float, ...]  # ascending
    y: tuple[float, ...]
    losses: np.ndarray  # (y, x); not finite where it diverged
    marks: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # name → (y, x) indices of a cell; two at most

    @property
    def _norm(self) -> LogNorm:
        known = np.ma.masked_invalid(self.losses)
        return LogNorm(known.min(), min(known.max(), 100 * known.min()))

    def draw(self, axes: Axes) -> Any:
        """Draw it, and return the image for a colour bar."""
        norm, shown = self._norm, np.ma.masked_invalid(self.losses)
        image = axes.imshow(shown, origin="lower", norm=norm, cmap=_VIRIDIS, aspect="auto")
        axes.set_xticks(range(len(self.x)), [f"{value:.3g}" for value in self.x])
        axes.set_yticks(range(len(self.y)), [f"{value:.3g}" for value in self.y])
        if len(self.x) > 8:
            axes.tick_params("x", rotation=45)
        axes.set(title=self.title, xlabel=self.x_name, ylabel=self.y_name)
        if self.losses.size <= _FEW:
            for (row, column), loss in np.ndenumerate(self.losses):
                text = f"{loss:.3f}" if np.isfinite(loss) else "diverged"
                ink = "w" if np.isfinite(loss) and norm(loss) < _LIGHT else "k"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
        frames = (("white", 0.45), ("red", 0.38))  # colour, half the width
        for (name, (row, column)), (colour, half) in zip(self.marks.items(), frames, strict=False):
            corner, size = (column - half, row - half), 2 * half
            axes.add_patch(Rectangle(corner, size, size, fill=False, lw=2, color=colour, label=name))
        return image

    def __rich__(self) -> Group:
        """Return it as a table, each cell in its colour, the marks' initials behind its number."""
        names = (f"{self.y_name} \\ {self.x_name}", *(f"{value:.3g}" for value in self.x))
        table, norm = Table(*(Column(name, justify="right") for name in names)), self._norm
        for row in reversed(range(len(self.y))):
            cells = []
            for column, loss in enumerate(self.losses[row]):
                marks = "".join(f" {name[0]}" for name, cell in self.marks.items() if cell == (row, column))
                if np.isfinite(loss):
                    share = float(norm(loss))
                    ink = "black" if share > _LIGHT else "white"
                    cells.append(Text(f"{loss:.4f}{marks}", f"{ink} on {to_hex(_VIRIDIS(share))}"))
                else:
                    cells.append(Text(f"diverged{marks}", "dim"))
            table.add_row(f"{self.y[row]:.3g}", *cells)
        legend = "".join(f", {name[0]}: {name}" for name in self.marks)
        return Group(f"{self.title}{legend}", table)
