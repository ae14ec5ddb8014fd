"""Pictures of a run."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure


def plot_losses(history: Sequence[dict[str, Any]]) -> Figure:
    """Plot training and validation loss (nats per supervised token) against updates."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", ".-"), ("valid_loss", "validation", "o--")):
        points = [(event["update"], event[name]) for event in history if name in event]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="updates", ylabel="loss (nats per token)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend()
    return figure
