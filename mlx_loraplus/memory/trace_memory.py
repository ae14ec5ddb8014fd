"""Predict the memory of compiled steps, which MLX keeps besides its arrays.

``mx.compile`` keeps a trace, a list of the primitives of a step, for each shape:

    bytes = 650 · primitives
    primitives = blocks (600 + 200 with checkpointing) + chunks of rows · (100 + 34 slices)

The chunks of rows and the slices of the vocabulary are those of ``kernels/cross_entropy.py``. The
numbers were measured on a CPU, on Llama and Gemma 3 of 2 to 12 blocks and lengths of 64 to 2,100
tokens: 634 to 660 bytes per primitive, and 460 to 680 primitives per block. Resident memory may
grow by half as much again. The width of a model does not matter.
"""

import math

from ..kernels.cross_entropy import CHUNK_POSITIONS
from .estimate import Sizes

MAX_TRACES = 16
"""Maximum number of traces that a run keeps."""

_BYTES = 650  # of a primitive
_BLOCK, _AGAIN = 600, 200  # primitives of a block, and of computing it again
_CHUNK, _SLICE = 100, 34  # primitives of a chunk of rows, and of each of its slices


def all_traces(sizes: Sizes, positions: int, *, checkpoint: bool) -> int:
    """Return the bytes of all traces of a run whose largest batch has this many positions.

    A run has many shapes, so it keeps ``MAX_TRACES`` traces. Most batches have at most half as many
    targets as the largest batch has positions.
    """
    return MAX_TRACES * trace_bytes(sizes, positions // 2, checkpoint=checkpoint)


def trace_bytes(sizes: Sizes, targets: int, *, checkpoint: bool) -> int:
    """Return the bytes of one trace.

    Args:
        sizes: From ``measure``.
        targets: Number of supervised positions of the batch.
        checkpoint: Whether blocks are checkpointed.
    """
    blocks = len(sizes.blocks) * _BLOCK + sizes.learning * _AGAIN * checkpoint
    logits = 4 * sizes.vocabulary * min(targets, CHUNK_POSITIONS)
    slices = math.ceil(logits / sizes.choices.slice_bytes)
    chunks = math.ceil(targets / CHUNK_POSITIONS)
    return _BYTES * (blocks + chunks * (_CHUNK + _SLICE * slices))
