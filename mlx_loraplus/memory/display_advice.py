"""Advice for steps whose work on the GPU would hold up the display."""

from ..device import Machine
from .estimate import Sizes

# A layer with more floating-point operations than this keeps a small GPU busy for seconds.
_LONG_LAYER = 5e12


def display_advice(sizes: Sizes, machine: Machine, rows: int, length: int) -> str | None:
    """Return advice if one layer would occupy a Mac's small GPU for several seconds.

    macOS stops a program that blocks the display for too long.
    """
    block = sizes.blocks[-1]
    layer = 2 * rows * length * block.hidden * max(block.mlp, block.experts, block.queries)
    attention = 4 * rows * min(length, 512) * length * block.queries
    if machine.backend != "metal" or max(layer, attention) < _LONG_LAYER:
        return None
    return (
        "a single layer may keep the GPU busy for seconds: if macOS stops the run for 'Impacting"
        " Interactivity', use smaller batches or shorter rows (--batch-size, with"
        " --grad-accumulation-steps), or a Mac without a display"
    )
