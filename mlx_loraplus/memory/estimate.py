"""Predict the memory of training from a model's shapes alone, before any weight is loaded.

Permanent memory is weights + adapters + moments. Temporary memory comes in phases; the largest
sets the peak:

    head        the activations of all blocks + the head's slices
    backward    the activations of all blocks + what one block's backward pass makes;
                with checkpointing every block's input + one block's activations + the same
    update      gradients + the arrays that the update rule makes
    validation  one block's forward pass, or the head's slices

T = rows · length tokens; e bytes per activation (float32: 4, bfloat16: 2). What a block saves for
the backward pass follows from ``kernels/attention.py`` (q, k, v, out and a logarithm a head, no
scores), ``elementwise.py`` (gated MLPs save their inputs) and ``adapters/lora.py`` (``add_product``
saves the input of the layer below). How many more arrays MLX holds at once was measured by
``scripts/study/memory_grid`` on a CPU: ``Coefficients``.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, fields

from ..config import RunConfig
from ..files import cache_folder, read_bounded
from ..kernels.attention import CHUNK
from ..kernels.cross_entropy import CHUNK_BYTES, CHUNK_ROWS

# In the cache folder: this machine's own coefficients, from scripts/study/calibrate.
COEFFICIENTS = "memory.json"

# Arrays that a rule keeps of each parameter; Adafactor keeps rows and columns instead.
_MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1, "lion": 1, "muon": 1}
_UPDATE = {"adamw": 2.4, "adam": 2.4, "sgd": 1.6, "lion": 2.2, "adafactor": 1.7, "muon": 2.3}
"""The step's arrays, gradients among them, in numbers for each that trains; measured."""


@dataclass(frozen=True)
class Coefficients:
    """How many arrays of a kind MLX holds at once. On Metal, which fuses kernels, all may differ.

    Attributes:
        slices: Of a slice of the head's logits, where there are several; of a single one seven.
        mlp: m, of (T, intermediate) in an MLP's backward pass, besides what is kept.
        mlp_again: m', of these besides, where the MLP was computed again just before.
        scores: s, of (rows, heads, 512, keys) float32 in that of attention's last chunk.
        scores_before: s', of these in the chunk before, whose memory is not given back yet.
        stream: h, of (T, hidden) in both.
    """

    slices: float = 10.1
    mlp: float = 12.0
    mlp_again: float = 2.5
    scores: float = 7.4
    scores_before: float = 5.9
    stream: float = 3.0


def coefficients() -> Coefficients:
    """Return this machine's coefficients as measured by ``scripts/study/calibrate``, or the defaults."""
    try:
        found = json.loads(read_bounded(cache_folder() / COEFFICIENTS, 1 << 12))
        return Coefficients(**{item.name: float(found[item.name]) for item in fields(Coefficients)})
    except (OSError, ValueError, KeyError, TypeError):
        return Coefficients()


@dataclass(frozen=True)
class BatchShape:
    """The shape of a step's input, the bytes e of an activation, and whether rows are packed."""

    rows: int
    length: int
    itemsize: int
    packed: bool = False

    def of(self, numbers: float) -> float:
        """Return the bytes of ``numbers`` values for each token: T e numbers."""
        return self.rows * self.length * self.itemsize * numbers


@dataclass(frozen=True)
class Block:
    """A transformer block's sizes, in numbers per token unless stated otherwise.

    Attributes:
        hidden: H, of the residual stream.
        norms: Normalizations of H numbers, each of which keeps its input.
        heads: Query heads.
        queries: Q, heads · head_dim.
        keys: K, key heads · head_dim; values have as many.
        kept_twice: Queries and keys are kept twice: normalized and not, or joined with the values
            and apart.
        window: Keys that a query sees at most, or None for all.
        native: Attention is MLX's own and keeps its scores, since the model's masks are its own.
        mlp: F of gated MLPs; 0 where there are none.
        experts: F of experts' gated MLPs times the experts of a token.
        routed: Experts of a token.
        inputs: What adapters keep of what layers were given.
        outputs: What is kept of what layers return: by adapters, and of layers in neither attention
            nor an MLP.
    """

    hidden: int
    norms: int
    heads: int
    queries: int
    keys: int
    kept_twice: bool
    window: int | None
    native: bool
    mlp: int
    experts: int
    routed: int
    inputs: int
    outputs: int

    def mlp_kept(self) -> int:
        """Return what MLPs keep: gate and up, 2F.

        Experts also keep the product, and their sorted inputs and outputs.
        """
        kept = 2 * self.mlp
        if self.experts:
            kept += 3 * self.experts + 2 * self.routed * self.hidden
        return kept

    def kept(self, batch: BatchShape) -> int:
        """Return the bytes that the block saves for the backward pass.

        T e (norms H + attention + MLP + adapters' share) + 4 T heads, or + 4 rows heads length²
        with native attention. Attention keeps q, k, v and out, and queries and keys that are kept
        twice again: 2Q + 2K (+ Q + K).
        """
        attention = (3 if self.kept_twice else 2) * (self.queries + self.keys)
        numbers = (
            self.norms * self.hidden + attention + self.mlp_kept() + self.inputs + self.outputs
        )
        scores = 4 * batch.rows * batch.length * self.heads * (batch.length if self.native else 1)
        return int(batch.of(numbers)) + scores

    def seen(self, length: int, back: int) -> int:
        """Return queries · keys of a row in attention's last chunk, or in one ``back`` chunks before.

        A chunk of 512 queries sees all keys up to its end, or those from the window's first chunk
        on.
        """
        start = (length - 1) // CHUNK * CHUNK - back * CHUNK
        if start < 0:
            return 0
        stop = min(start + CHUNK, length)
        first = 0 if self.window is None else max(0, start - self.window + 1) // CHUNK * CHUNK
        return (stop - start) * (stop - first)

    def scores(self, batch: BatchShape, parts: Coefficients) -> float:
        """Return the bytes of attention's scores and masks: s S + s' S'.

        They are those of the last two chunks, or of the two before if these are larger.

        S = 4 rows heads queries keys of the later chunk, S' of the earlier. The masks of packed
        rows, which are same example, seen before, and both, take 3 rows queries keys.
        """
        last, before, early = (
            4 * batch.rows * self.heads * self.seen(batch.length, back) for back in range(3)
        )
        both = max(
            parts.scores * last + parts.scores_before * before,
            parts.scores * before + parts.scores_before * early,
        )
        return both + (3 * batch.rows * self.seen(batch.length, 0) if batch.packed else 0)

    def forward(self, batch: BatchShape, parts: Coefficients) -> int:
        """Return the temporary bytes of a forward pass that saves nothing.

        T e h H + max(T e m F, s S + s' S')
        """
        mlp = batch.of(parts.mlp * max(self.mlp, 4 * self.experts / 3))
        return int(batch.of(parts.stream * self.hidden) + max(mlp, self.scores(batch, parts)))

    def backward(self, batch: BatchShape, parts: Coefficients, *, checkpoint: bool) -> int:
        """Return the temporary bytes of a block's backward pass: its MLP's or its attention's.

            T e h H + max(T e (m + m') F, s S + s' S' - T e (what the MLP kept))

        m' is there with checkpointing. The MLP's activations are gone when attention's turn comes.
        """
        arrays = parts.mlp + parts.mlp_again * checkpoint
        mlp = batch.of(arrays * max(self.mlp, 4 * self.experts / 3))
        attention = self.scores(batch, parts) - batch.of(self.mlp_kept())
        return int(batch.of(parts.stream * self.hidden) + max(mlp, attention))


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine memory: shapes of the model and of its trainable parameters.

    Attributes:
        weights: Bytes of the base as it is loaded, from ``shapes.weight_bytes``.
        itemsize: Bytes of a number of the activations, e.
        hidden: H.
        vocabulary: Logits of the head.
        sliced: Whether the head is frozen, so that its logits come in slices.
        trained: Shapes of what trains, float32.
        shared: Numbers that adapters keep and that do not train, float32, such as PiSSA's start.
        adapted: (numbers, bytes) of every weight below an adapter.
        blocks: The transformer blocks.
        learning: How many blocks, the last ones, keep something.
        context: Tokens that the model was made for, or None.
    """

    weights: int
    itemsize: int
    hidden: int
    vocabulary: int
    sliced: bool
    trained: tuple[tuple[int, ...], ...]
    shared: int
    adapted: tuple[tuple[int, int], ...]
    blocks: tuple[Block, ...]
    learning: int
    context: int | None

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(map(math.prod, self.trained))

    def adapters(self) -> int:
        """Return the float32 bytes of all adapter arrays: 4 (trained + shared)."""
        return 4 * (self.trainable + self.shared)

    def gradients(self) -> int:
        """Return the bytes of the gradients, float32: 4 trained."""
        return 4 * self.trainable

    def moments(self, optimizer: str) -> int:
        """Return the bytes of an optimizer's state: 4 for each number that trains, twice for Adam.

        Adafactor keeps the means of rows and columns of each matrix: 4 (rows + columns).
        """
        if optimizer != "adafactor":
            return _MOMENTS[optimizer] * self.gradients()
        return 4 * sum(
            math.prod(s[:-1]) + math.prod((*s[:-2], *s[-1:])) if len(s) > 1 else sum(s)
            for s in self.trained
        )

    def update(self, optimizer: str) -> int:
        """Return the bytes of the update: gradients and the rule's arrays.

        They are 4 trained · 1.6 (SGD) to 2.4 (Adam).
        """
        return int(_UPDATE[optimizer] * self.gradients())

    def head(self, batch: BatchShape, targets: int, parts: Coefficients) -> int:
        """Return the bytes at the head: slices of logits, float32, and what they are computed from.

        A slice has the shape (min(targets, 512), width).

        A slice is as wide as 4 MiB allow; a head that trains makes whole logits of few rows, of 32
        MiB. Of the hidden states there are the trunk's, those of the targets, and their gradients:
        e H (2 T + 2 targets).
        """
        logits = 4 * self.vocabulary * min(targets, CHUNK_ROWS)
        slices = min(CHUNK_BYTES, logits) * (parts.slices if logits > CHUNK_BYTES else 7)
        if not self.sliced:
            slices = (
                14.5
                * 4
                * self.vocabulary
                * min(targets, max(8, 8 * CHUNK_BYTES // (4 * self.vocabulary)))
            )
        return int(slices) + self.itemsize * self.hidden * 2 * (batch.rows * batch.length + targets)

    def validation(self, batch: BatchShape, targets: int, parts: Coefficients) -> int:
        """Return the temporary bytes of a validation: a block's forward pass or the head's slices.

        A step of the same batch makes more, but where the blocks that learn are smaller than
        others.
        """
        return max(
            self.head(batch, targets, parts),
            *(block.forward(batch, parts) for block in set(self.blocks)),
        )

    def fuse(self) -> int:
        """Return the peak memory of fusing; each weight below an adapter has n numbers in b bytes.

        weights + adapters + Σ max(0, 17/16 n - b)      layers may need 8 bits to keep their change
        + max n (2 e + 48)                              the new layer, and 12 float32 parts
        + 1,024 e Σ (inputs + Q) + 256 e vocabulary     the layers' inputs of 1,024 tokens
        """
        wider = sum(max(0, 17 * numbers // 16 - size) for numbers, size in self.adapted)
        largest = max((numbers for numbers, _ in self.adapted), default=0)
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
    """The memory of a step at its peak, by purpose."""

    weights: int
    adapters: int
    moments: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.adapters + self.moments + self.activations + self.working


def estimate(
    sizes: Sizes,
    config: RunConfig,
    rows: int,
    length: int,
    targets: int | None = None,
    *,
    checkpoint: bool,
    parts: Coefficients | None = None,
) -> Memory:
    """Return the memory of a training step, or of a validation of the same batch if that is larger.

    Args:
        sizes: From ``measure``.
        config: The run's settings: its update rule, whether rows are packed, and whether gradients
            are carried along.
        rows: In the batch of one process.
        length: Tokens in a row, padding included.
        targets: Supervised positions; by default all.
        checkpoint: Keep each block's input only.
        parts: By default this machine's.
    """
    parts = parts or coefficients()
    targets = rows * length if targets is None else targets
    batch = BatchShape(rows, length, sizes.itemsize, config.data.pack)
    optimizer = config.optimizer.optimizer

    # What the blocks that learn keep, and what one of them makes on the way back.
    kinds = Counter(sizes.blocks[len(sizes.blocks) - sizes.learning :])
    activations = sum(count * block.kept(batch) for block, count in kinds.items())
    backward = [block.backward(batch, parts, checkpoint=checkpoint) for block in kinds]
    if checkpoint:
        activations = int(batch.of(sizes.hidden)) * sizes.learning
        backward = [made + block.kept(batch) for made, block in zip(backward, kinds, strict=True)]

    # The phases follow one another, so the largest counts.
    step = max(sizes.head(batch, targets, parts), *backward, sizes.update(optimizer) - activations)
    if config.grad_accumulation_steps > 1:
        step += sizes.gradients()
    working = max(step, sizes.validation(batch, targets, parts) - activations)
    return Memory(sizes.weights, sizes.adapters(), sizes.moments(optimizer), activations, working)
