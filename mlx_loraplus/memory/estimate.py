"""Predict the memory of training from a model's shapes alone, before any weight is loaded.

Permanent memory is weights + adapters + moments. Temporary memory comes in phases; the largest
sets the peak:

    head        the activations of all blocks + the head's slices
    backward    the activations of all blocks + the temporary arrays of one block's backward pass;
                with checkpointing, the inputs of all blocks + the activations of one block
                + the temporary arrays of its backward pass
    update      gradients + the temporary arrays of the update rule
    validation  one block's forward pass, or the head's slices

T = rows · length is the number of tokens, and e the bytes per activation (float32: 4, bfloat16: 2).
What a block saves and needs is in ``blocks.py``. The number of arrays that MLX holds at once was
measured by ``scripts/study/memory_grid`` on a CPU; see ``Coefficients``.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field, fields

from ..config import TrainConfig
from ..device import Backend, backend
from ..files import cache_folder, read_bounded
from ..kernels.choices import StepChoices, default_choices
from ..kernels.cross_entropy import CHUNK_POSITIONS
from .blocks import BatchShape, Block, Coefficients

# File in the cache folder with the coefficients of this machine, from scripts/study/calibrate.
COEFFICIENTS = "memory.json"

# Arrays that an update rule keeps per parameter; Adafactor keeps row and column means instead.
_MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1, "lion": 1, "muon": 1}
_UPDATE = {"adamw": 2.4, "adam": 2.4, "sgd": 1.6, "lion": 2.2, "adafactor": 1.7, "muon": 2.3}
"""Measured size of an update's arrays with the gradients, in elements per trainable parameter."""

# More arrays of an update that joins the small parameters of adapters: elements per trainable
# parameter, and the most bytes.
_JOINED = {"adamw": 4.6, "adam": 4.6, "sgd": 1.4, "lion": 1.5, "adafactor": 0, "muon": 0}
_MOST_JOINED = 64 << 20

# On a GPU: the bytes that a slice of the head's logits needs, for each byte of the slice in float32
# and each byte per activation. It was measured on a CPU, with the operations that replace a GPU's
# kernels there.
_NATIVE_SLICES = 12.2 / 4

# A soft cap of the logits needs more arrays of a slice: the scores, their tanh and its gradient.
_CAPPED_SLICES = 2.4


def coefficients() -> Coefficients:
    """Return this machine's coefficients, from ``scripts/study/calibrate``, or the defaults."""
    try:
        found = json.loads(read_bounded(cache_folder() / COEFFICIENTS, 1 << 12))
        return Coefficients(**{item.name: float(found[item.name]) for item in fields(Coefficients)})
    except (OSError, ValueError, KeyError, TypeError):
        return Coefficients()


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine memory: shapes of the model and of its trainable parameters.

    Attributes:
        weights: Bytes of the base as it is loaded, from ``model_shapes.weight_bytes``.
        itemsize: e, the bytes per activation.
        hidden: H, the width of the residual stream.
        vocabulary: Number of logits of the head.
        sliced: Whether the head is frozen, so that its logits are computed in slices.
        capped: Whether the logits have a soft cap.
        trained: Shapes of the trainable parameters, 4 bytes each.
        shared: Number of frozen float32 values that adapters hold, such as PiSSA's start.
        adapted: (elements, bytes) of the base weight of every adapter.
        bits: Bits per number of the largest of these weights; 16 if it is not quantized.
        blocks: The transformer blocks.
        learning: Number of blocks, counted from the last, that save activations.
        context: Longest input that the model supports, in tokens, or None.
        choices: How a step is computed, which depends on the device.
        backend: What computes it.
    """

    weights: int
    itemsize: int
    hidden: int
    vocabulary: int
    sliced: bool
    capped: bool
    trained: tuple[tuple[int, ...], ...]
    shared: int
    adapted: tuple[tuple[int, int], ...]
    bits: int
    blocks: tuple[Block, ...]
    learning: int
    context: int | None
    choices: StepChoices = field(default_factory=default_choices)
    backend: Backend = field(default_factory=backend)

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(map(math.prod, self.trained))

    def adapters(self) -> int:
        """Return the bytes of adapter arrays or of trained weights: 4 (trained + shared)."""
        return 4 * (self.trainable + self.shared)

    def gradients(self) -> int:
        """Return the bytes of the gradients, float32: 4 trained."""
        return 4 * self.trainable

    def moments(self, optimizer: str) -> int:
        """Return the bytes of an optimizer's state: 4 per trainable parameter, or 8 for Adam.

        Adafactor keeps the row and column means of each matrix: 4 (rows + columns).
        """
        if optimizer != "adafactor":
            return _MOMENTS[optimizer] * self.gradients()
        means = 0
        for shape in self.trained:
            if len(shape) > 1:
                means += math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))
            else:
                means += sum(shape)
        return 4 * means

    def update(self, optimizer: str) -> int:
        """Return the bytes of the gradients and of the update rule's temporary arrays.

        They are between 4 trained · 1.6 (SGD) and 4 trained · 2.4 (Adam). For adapters, whose small
        arrays are joined, up to 64 MiB more, between 4 trained · 1.4 and 4 trained · 4.6.
        """
        size = int(_UPDATE[optimizer] * self.gradients())
        if self.adapted:
            size += min(int(_JOINED[optimizer] * self.gradients()), _MOST_JOINED)
        return size

    def head(self, batch: BatchShape, targets: int, parts: Coefficients) -> int:
        """Return the bytes at the head: slices of float32 logits, and hidden states.

        A slice has the shape (min(targets, 512), width) and takes at most ``slice_bytes``; all
        slices of a head have about the same width. A head that trains computes full logits instead,
        of few rows at a time (8 ``slice_bytes``). The hidden states of the trunk and of the
        targets, with the gradients of both, take e H (2 T + 2 targets).
        """
        slice_bytes = self.choices.slice_bytes
        logits = 4 * self.vocabulary * min(targets, CHUNK_POSITIONS)
        arrays = parts.slices
        if self.choices.cross_entropy == "native":
            arrays = _NATIVE_SLICES * self.itemsize
        arrays += _CAPPED_SLICES * self.capped

        # The slices of a frozen head, or the full logits of one that trains.
        count = max(1, math.ceil(logits / slice_bytes))
        slices = logits / count * (arrays if count > 1 else 7)
        if not self.sliced:
            rows = max(8, 8 * slice_bytes // (4 * self.vocabulary))
            slices = 14.5 * 4 * self.vocabulary * min(targets, rows)

        hidden = 2 * self.itemsize * self.hidden * (batch.rows * batch.length + targets)
        return int(slices) + hidden

    def validation(self, batch: BatchShape, targets: int, parts: Coefficients) -> int:
        """Return the temporary bytes of a validation: a block's forward pass or the head's slices.

        A training step of the same batch needs more, unless the blocks that train are smaller than
        the others.
        """
        return max(
            self.head(batch, targets, parts),
            *(block.forward(batch, parts) for block in set(self.blocks)),
        )

    def fuse(self) -> int:
        """Return the peak memory of fusing, if an adapter's base has n elements in b bytes.

        weights + adapters + Σ max(0, 17/16 n - b)      a fused layer may need 8 bits
        + max n (2 e + 48)                              the new layer, and 12 float32 parts
        + 1,024 e Σ (inputs + Q) + 256 e vocabulary     the layers' inputs for 1,024 tokens
        """
        wider = sum(max(0, 17 * elements // 16 - size) for elements, size in self.adapted)
        largest = max((elements for elements, _ in self.adapted), default=0)
        given = 1024 * self.itemsize * sum(block.inputs + block.queries for block in self.blocks)
        given += 256 * self.itemsize * self.vocabulary
        return (
            self.weights
            + self.adapters()
            + wider
            + 2 * self.itemsize * largest
            + 48 * min(largest, 2**22)
            + given
        )


@dataclass(frozen=True)
class Memory:
    """The peak memory of a step in bytes, by purpose.

    ``traces`` are on the heap of the process; all other parts are MLX's arrays.
    """

    weights: int
    adapters: int
    moments: int
    activations: int
    working: int
    traces: int = 0

    @property
    def arrays(self) -> int:
        """The peak memory of MLX's arrays, in bytes."""
        return self.weights + self.adapters + self.moments + self.activations + self.working

    @property
    def total(self) -> int:
        """The peak memory, in bytes."""
        return self.arrays + self.traces


def batch_shape(sizes: Sizes, config: TrainConfig, rows: int, length: int) -> BatchShape:
    """Return what the memory of a batch depends on."""
    return BatchShape(
        rows,
        length,
        sizes.itemsize,
        packed=config.data.pack,
        blocks=sizes.choices.attention == "native",
        native_delta=sizes.choices.delta_rule == "native",
        backend=sizes.backend,
    )


def estimate(
    sizes: Sizes,
    config: TrainConfig,
    rows: int,
    length: int,
    targets: int | None = None,
    *,
    checkpoint: bool,
    parts: Coefficients | None = None,
) -> Memory:
    """Return the memory of a training step or of a validation, whichever is larger.

    Args:
        sizes: From ``measure``.
        config: The run's settings. They give the update rule, and whether rows are packed and
            gradients accumulated.
        rows: Rows in the batch of one process.
        length: Tokens in a row, including padding.
        targets: Number of supervised positions; by default all positions.
        checkpoint: Save only the input of each block.
        parts: The coefficients; by default those of this machine.
    """
    parts = parts or coefficients()
    targets = rows * length if targets is None else targets
    batch = batch_shape(sizes, config, rows, length)
    optimizer = config.optimizer.optimizer

    # The activations that the trained blocks save, and the temporary arrays of a backward pass.
    kinds = Counter(sizes.blocks[len(sizes.blocks) - sizes.learning :])
    activations = sum(count * block.kept(batch) for block, count in kinds.items())
    backward = [block.backward(batch, parts, checkpoint=checkpoint) for block in kinds]
    if checkpoint:
        activations = int(batch.of(sizes.hidden)) * sizes.learning
        backward = [size + block.kept(batch) for size, block in zip(backward, kinds, strict=True)]

    # The phases do not overlap, so the largest sets the peak.
    step = max(sizes.head(batch, targets, parts), *backward, sizes.update(optimizer) - activations)
    if config.grad_accumulation_steps > 1:
        step += sizes.gradients()
    working = max(step, sizes.validation(batch, targets, parts) - activations)
    return Memory(sizes.weights, sizes.adapters(), sizes.moments(optimizer), activations, working)
