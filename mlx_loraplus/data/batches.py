"""Turn examples into batches: little padding, few shapes, and a seeded order.

The order is a pure function of (seed, epoch, index).

Rows are shuffled, cut into windows, sorted by length inside each window, and cut into batches whose
order is shuffled again. Every example is used once an epoch, the last partial batch too. Batches
are padded to the few shapes of a ``ShapeLadder``, so that a compiled step is traced a few times
only. The order needs the lengths alone: examples may stay on disk until their batch comes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .dataset import Examples
from .sampling_weights import WeightedExamples
from .shape_ladder import ShapeLadder, multiple_of_8
from .tokenize import Example

# Batches sorted together: enough to leave little padding, few enough to keep the order random
WINDOW = 64
# What the ladder of shapes is fitted to: so many batches, or epochs of a small set
LADDER_BATCHES, LADDER_EPOCHS = 2_000, 20


@dataclass(frozen=True)
class Batch:
    """Padded rows, and where in them there is something to learn.

    Where rows are packed, ``segments`` is 1, 2, ... for the first, second, ... example of a row and
    0 for padding.
    """

    tokens: np.ndarray  # inputs, padded on the right: (rows, length) int32
    # flat indices of the hidden states that predict a target: (targets,) int32
    positions: np.ndarray
    targets: np.ndarray  # the tokens predicted there: (targets,) int32
    weights: np.ndarray  # 1 for a target, 0 where the list is padded: (targets,) float32
    supervised: int  # targets that are real
    useful: int  # input tokens that are no padding
    used: np.ndarray  # input tokens of each row that are no padding: (rows,)
    segments: np.ndarray | None = None  # (rows, length) int32
    sources: tuple[str, ...] = ()  # where each example came from, "train.jsonl:17"


class Batches:
    """The endless, seeded sequence of a run's batches; ``batches[n]`` is the n-th since the start.

    It keeps nothing from one batch to the next but the order of an epoch: so n is all that a
    checkpoint has to hold, and on several machines each can take its own rows of ``rows_of(n)``.

    Args:
        examples: Tokens and which of them are supervised.
        batch_size: Rows in a batch.
        seed: Seed of the order.
        shares: Processes that a batch's rows are dealt to: a batch that one collates has so many
            rows fewer.

    Attributes:
        per_epoch: Batches in an epoch.
        seen: Examples in an epoch.
        most_rows: Of one share.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int, shares: int = 1):
        self.examples = examples
        self.batch_size = batch_size
        self.most_rows = -(-batch_size // shares)
        self.seed = seed
        self.lengths = lengths_of(examples)
        self.targets = targets_of(examples)
        self.seen = (
            len(examples.longest) if isinstance(examples, WeightedExamples) else len(examples)
        )
        self.per_epoch = -(-self.seen // batch_size)
        self._epoch = -1
        self._order: tuple[np.ndarray, np.ndarray]
        self._ladder: ShapeLadder | None = None  # fitted when the first batch is read

    def __getitem__(self, index: int) -> Batch:
        return self.collate(self.rows_of(index))

    def rows_of(self, index: int) -> list[np.ndarray]:
        """Return the n-th batch's rows, each as the indices of its examples.

        They are a pure function of (seed, epoch, index).
        """
        epoch, within = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffle(epoch), epoch
        return self._rows(within)

    def shape_of(self, rows: Sequence[np.ndarray]) -> tuple[int, int, int]:
        """Return the (rows, length, targets) of a batch, padding included."""
        length = max(int(self.lengths[row].sum()) for row in rows)
        targets = sum(int(self.targets[row].sum()) for row in rows)
        return self.most_rows, *self.ladder.shape(length, targets)

    def collate(self, rows: Sequence[np.ndarray]) -> Batch:
        """Read a batch's rows and lay them out, padded to their ``shape_of``."""
        examples = [[self.examples[int(i)] for i in row] for row in rows]
        padded_rows, length, targets = self.shape_of(rows)
        empty: list[list[Example]] = [[]] * (padded_rows - len(rows))
        return lay_out([*examples, *empty], length, targets)

    @property
    def ladder(self) -> ShapeLadder:
        """The shapes that batches are padded to: a pure function of the examples and the seed."""
        if self._ladder is None:
            self._ladder = self._fit_ladder()
        return self._ladder

    def _fit_ladder(self) -> ShapeLadder:
        """Fit the ladder to the run's first batches, or shares of them."""
        lengths: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        for epoch in range(min(LADDER_EPOCHS, -(-LADDER_BATCHES // self.per_epoch))):
            rows, _ = self._shuffle(epoch)
            starts = np.arange(0, len(rows), self.most_rows)
            lengths.append(np.maximum.reduceat(self.lengths[rows], starts))
            targets.append(np.add.reduceat(self.targets[rows], starts))
        longest = int(self.lengths.max())
        return ShapeLadder.fit(np.concatenate(lengths), np.concatenate(targets), longest)

    def largest(self) -> tuple[int, int]:
        """Return the (rows, length) of the largest batch, or share of it."""
        return self.most_rows, multiple_of_8(int(self.lengths.max()))

    def _rows(self, within: int) -> list[np.ndarray]:
        """Return the rows of the epoch's batch number ``within``."""
        rows, batches = self._order
        start = batches[within] * self.batch_size
        return list(rows[start : start + self.batch_size, None])

    def _of_epoch(self, epoch: int) -> np.ndarray:
        """Return the examples that an epoch sees: all, unless they are weighted."""
        if isinstance(self.examples, WeightedExamples):
            return self.examples.of_epoch(epoch)
        return np.arange(self.seen)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the examples in the order that is cut into batches, and the batches' order."""
        generator = np.random.default_rng([self.seed, epoch])
        rows = generator.permutation(self._of_epoch(epoch))
        for start in range(0, len(rows), WINDOW * self.batch_size):
            window = rows[start : start + WINDOW * self.batch_size]
            window[:] = window[np.argsort(self.lengths[window], kind="stable")]
        return rows, generator.permutation(self.per_epoch)


def in_order(
    examples: Sequence[Example], batch_size: int, share: slice = slice(None)
) -> Iterator[Batch]:
    """Yield all examples, or a share of them, once, sorted by length: for evaluation."""
    rows = np.argsort(lengths_of(examples), kind="stable")[share]
    for start in range(0, len(rows), batch_size):
        yield collate([examples[int(i)] for i in rows[start : start + batch_size]])


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples to one length of the ladder and list what is supervised."""
    return lay_out([[example] for example in examples])


def lay_out(
    rows: Sequence[Sequence[Example]],
    length: int | None = None,
    count: int | None = None,
    *,
    packed: int | None = None,
) -> Batch:
    """Lay each row's examples one after another, pad the rows, and list what is supervised.

    An example's inputs end before its last supervised token: nothing is learned from what follows.
    Its first token is never supervised, so no target lies across the seam of two examples.

    Args:
        rows: Each row's examples; a row may be empty.
        length: Tokens to pad the rows to; by default the least multiple of 8.
        count: Targets to pad the list to; by default the least multiple of 8.
        packed: The length of packed rows, in place of ``length``. The batch has segments then, and
            its targets are padded to the ladder of ``round_up``.
    """
    longest = max(sum(map(inputs_of, row)) for row in rows)
    width: int = packed or length or multiple_of_8(longest)
    tokens, segments = (
        np.zeros((len(rows), width), np.int32),
        np.zeros((len(rows), width), np.int32),
    )
    positions, targets = [], []
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, start=1):
            supervised = np.flatnonzero(example.supervised)
            end = start + int(supervised[-1])
            tokens[row, start:end] = example.tokens[: end - start]
            segments[row, start:end] = segment
            # The state before a token predicts it.
            positions.append(row * width + start + supervised - 1)
            targets.append(example.tokens[supervised])
            start = end
    supervised = sum(map(len, positions))
    padded = round_up(supervised) if packed else count or multiple_of_8(supervised)
    padding = (0, padded - supervised)
    return Batch(
        tokens=tokens,
        positions=np.pad(np.concatenate(positions), padding).astype(np.int32),
        targets=np.pad(np.concatenate(targets), padding).astype(np.int32),
        weights=np.pad(np.ones(supervised, np.float32), padding),
        supervised=supervised,
        useful=int(np.count_nonzero(segments)),
        used=np.count_nonzero(segments, axis=1),
        segments=segments if packed else None,
        sources=tuple(example.source for examples in rows for example in examples),
    )


def round_up(count: int) -> int:
    """Return ``count`` rounded up to a multiple of 8, or of an eighth of an octave if larger."""
    step = max(8, 1 << max((count - 1).bit_length() - 4, 0))
    return -(-count // step) * step


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Return ``inputs_of`` every example, (examples,), without reading those that are on disk."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([inputs_of(example) for example in examples], np.int64)


def targets_of(examples: Sequence[Example]) -> np.ndarray:
    """Return how many tokens of every example are supervised: (examples,)."""
    if isinstance(examples, Examples):
        return examples.targets
    return np.array([np.count_nonzero(example.supervised) for example in examples], np.int64)


def trimmed(batch: Batch) -> Batch:
    """Return a batch without the padding that is only there so that shapes repeat.

    What is not compiled needs no shape twice. Packed batches stay as they are.
    """
    if batch.segments is not None:
        return batch

    # Columns and rows at the end that hold no example.
    length = batch.tokens.shape[1]
    used = batch.used
    columns = multiple_of_8(int(used.max()))
    filled = int(np.count_nonzero(used))
    count = multiple_of_8(batch.supervised)

    row, column = np.divmod(batch.positions[:count], length)
    return replace(
        batch,
        tokens=batch.tokens[:filled, :columns],
        positions=np.where(batch.weights[:count] > 0, row * columns + column, 0).astype(np.int32),
        targets=batch.targets[:count],
        weights=batch.weights[:count],
        used=used[:filled],
    )


def inputs_of(example: Example) -> int:
    """Return the number of tokens that the model sees: those before the last supervised one."""
    return int(np.flatnonzero(example.supervised)[-1])
