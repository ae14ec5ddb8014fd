"""Turn examples into batches with little padding, few shapes, and a seeded order.

The order is a pure function of the examples' lengths and of (seed, epoch, index).

The examples are shuffled and divided into sections, and each section is sorted by length. The
sections are divided into batches, and the order of the batches is shuffled. An epoch uses every
example once and includes the last, partial batch. Batches are padded to the few shapes of a
``ShapeLadder``, so that a compiled step is traced only a few times. Examples stay on disk until
their batch is read.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from .dataset import Examples
from .sampling_weights import WeightedExamples
from .shape_ladder import ShapeLadder, batch_sizes, multiple_of_8
from .tokenize import Example

# Batches in a section. More batches need less padding; fewer batches keep the order more random.
SORTED_TOGETHER = 64
# Maximum number of batches, and of epochs of a small data set, that the ladder is fitted to
LADDER_BATCHES, LADDER_EPOCHS = 2_000, 20


@dataclass(frozen=True)
class Batch:
    """Padded rows and the positions of their supervised tokens.

    If the rows are packed, ``segments`` is 1 for the first example of a row, 2 for the second one,
    and so on. It is 0 for padding.
    """

    tokens: np.ndarray  # inputs, padded on the right: (rows, length) int32
    # flat indices of the hidden states that predict a target: (targets,) int32
    positions: np.ndarray
    targets: np.ndarray  # the tokens to predict at these positions: (targets,) int32
    weights: np.ndarray  # 1 for a target, 0 where the list is padded: (targets,) float32
    target_count: int  # number of targets without padding
    token_count: int  # number of input tokens without padding
    row_lengths: np.ndarray  # number of input tokens in each row without padding: (rows,)
    segments: np.ndarray | None = None  # (rows, length) int32
    # number of pairs (each has two rows, the chosen answer first), or of labeled answers
    pairs: int = 0
    reference: np.ndarray | None = None  # log pi_ref of the answer in each row: (rows,) float32
    labels: np.ndarray | None = None  # 1 for a desirable answer, else 0: (rows,) float32
    mismatched: "Batch | None" = None  # the prompts of labeled answers with other answers
    places: tuple[str, ...] = ()  # location of each example's row, such as "train.jsonl:17"


class Batches:
    """The endless, seeded sequence of a run's batches; ``batches[n]`` is batch n of the run.

    The only state between batches is the order of the current epoch. To resume, a checkpoint
    only needs n. Each process reads only its part of ``rows_of(n)``.

    Args:
        examples: The examples to train on.
        batch_size: Rows in a batch; at most all examples.
        seed: Seed of the order.
        processes: Number of processes that divide the rows of a batch. Each process collates its
            part of the rows.

    Attributes:
        per_epoch: Batches in an epoch.
        epoch_size: Examples in an epoch.
        most_rows: Maximum number of rows of a batch that one process has.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int, processes: int = 1):
        self.examples = examples
        self.processes = processes
        self.seed = seed
        self.lengths = lengths_of(examples)
        self.target_counts = target_counts_of(examples)

        # With weights, an epoch uses a part of the examples, or some of them several times.
        self.epoch_size = len(examples)
        if isinstance(examples, WeightedExamples):
            self.epoch_size = len(examples.longest)

        # If there are fewer examples than batch_size, a batch has one row for each.
        self.batch_size = max(1, min(batch_size, self.epoch_size))
        self.most_rows = math.ceil(self.batch_size / processes)
        self.per_epoch = math.ceil(self.epoch_size / self.batch_size)

        self._epoch = -1
        self._order: tuple[np.ndarray, np.ndarray]  # of the current epoch
        self._ladder: ShapeLadder | None = None  # fitted when the first batch is read

    def __getitem__(self, index: int) -> Batch:
        return self.collate(self.rows_of(index))

    @property
    def full_rows(self) -> int:
        """The number of rows of a full batch, which has no more rows than an epoch."""
        return self.batch_size if self.per_epoch > 1 else len(self.rows_of(0))

    def rows_of(self, index: int) -> list[np.ndarray]:
        """Return the rows of batch ``index``, each as the indices of its examples.

        The rows are a pure function of (seed, epoch, index).
        """
        epoch, number = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffle(epoch), epoch
        return self._rows(number)

    def shape_of(self, rows: Sequence[np.ndarray]) -> tuple[int, int, int]:
        """Return the (rows, length, targets) of a batch, padding included."""
        length = max(int(self.lengths[row].sum()) for row in rows)
        targets = sum(int(self.target_counts[row].sum()) for row in rows)
        return self.most_rows, *self.ladder.shape(length, targets)

    def collate(self, rows: Sequence[np.ndarray]) -> Batch:
        """Read the examples of a batch and lay them out, padded to the shape from ``shape_of``."""
        examples = [[self.examples[int(i)] for i in row] for row in rows]
        padded_rows, length, targets = self.shape_of(rows)
        empty: list[list[Example]] = [[]] * (padded_rows - len(rows))
        return lay_out([*examples, *empty], length, targets)

    @property
    def ladder(self) -> ShapeLadder:
        """The shapes that batches are padded to; they depend only on the examples and the seed."""
        if self._ladder is None:
            self._ladder = self._fit_ladder()
        return self._ladder

    def _fit_ladder(self) -> ShapeLadder:
        """Fit the ladder to the run's first batches, or to one process's parts of them."""
        epochs = min(LADDER_EPOCHS, math.ceil(LADDER_BATCHES / self.per_epoch))
        sizes: list[np.ndarray] = []
        for epoch in range(epochs):
            indices, _ = self._shuffle(epoch)
            lengths, targets = self.lengths[indices], self.target_counts[indices]
            sizes.append(batch_sizes(lengths, targets, self.batch_size, self.processes))
        return ShapeLadder.fit(*np.concatenate(sizes, axis=1), longest=int(self.lengths.max()))

    def largest(self) -> tuple[int, int]:
        """Return the (rows, length) of the largest batch, or of one process's part of it."""
        return self.most_rows, multiple_of_8(int(self.lengths.max()))

    def _rows(self, number: int) -> list[np.ndarray]:
        """Return the rows of a batch by its number in the current epoch."""
        indices, batch_order = self._order
        start = batch_order[number] * self.batch_size
        members = indices[start : start + self.batch_size]

        # Without packing, each row holds one example.
        return [np.array([index]) for index in members]

    def _of_epoch(self, epoch: int) -> np.ndarray:
        """Return the indices of the examples that an epoch uses; without weights, of all."""
        if isinstance(self.examples, WeightedExamples):
            return self.examples.of_epoch(epoch)
        return np.arange(self.epoch_size)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the examples before batching, and the order of the batches."""
        generator = np.random.default_rng([self.seed, epoch])
        indices = generator.permutation(self._of_epoch(epoch))

        # Sort each section by length, so that a batch has examples of similar length.
        for start in range(0, len(indices), SORTED_TOGETHER * self.batch_size):
            section = indices[start : start + SORTED_TOGETHER * self.batch_size]
            section[:] = section[np.argsort(self.lengths[section], kind="stable")]

        return indices, generator.permutation(self.per_epoch)


def in_order(
    examples: Sequence[Example], batch_size: int, row_slice: slice = slice(None)
) -> Iterator[Batch]:
    """Yield batches for evaluation: all examples, or a part of them, once, the longest first.

    Batches are padded to few shapes as in training, the last one with empty rows.
    """
    for members, length, count in ordered_rows(examples, batch_size, row_slice):
        filled = [[examples[int(i)]] for i in members]
        empty: list[list[Example]] = [[]] * (batch_size - len(members))
        yield lay_out(filled + empty, length, count)


def ordered_rows(
    examples: Sequence[Example], batch_size: int, row_slice: slice = slice(None)
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield the examples of each batch, the longest first, with the batch's length and targets."""
    lengths, targets = lengths_of(examples), target_counts_of(examples)
    rows = np.argsort(-lengths, kind="stable")[row_slice]
    if not len(rows):
        return

    sizes = batch_sizes(lengths[rows], targets[rows], batch_size)
    ladder = ShapeLadder.fit(*sizes, longest=int(lengths[rows].max()))
    for start in range(0, len(rows), batch_size):
        members = rows[start : start + batch_size]
        yield members, *ladder.shape(int(lengths[members].max()), int(targets[members].sum()))


def one_per_row(examples: Sequence[Example]) -> Batch:
    """Put each example in its own row, pad the rows, and list the supervised tokens."""
    return lay_out([[example] for example in examples])


def lay_out(
    rows: Sequence[Sequence[Example]],
    length: int | None = None,
    padded_targets: int | None = None,
    *,
    packed: int | None = None,
) -> Batch:
    """Join the examples of each row, pad the rows, and list the supervised tokens.

    An example's inputs end before its last supervised token, because later tokens have no effect on
    training. The first token of an example is never supervised, so no target is predicted from the
    example before it.

    Args:
        rows: Each row's examples; a row may be empty.
        length: Tokens to pad the rows to; by default the smallest multiple of 8 that fits.
        padded_targets: Targets to pad the list to; by default the smallest multiple of 8 that fits.
        packed: The length of packed rows, used instead of ``length``. The batch then has segments,
            and the number of its targets is rounded up with ``round_up``.
    """
    longest = max(sum(map(inputs_of, row)) for row in rows)
    width: int = packed or length or multiple_of_8(longest)
    tokens = np.zeros((len(rows), width), np.int32)
    segments = np.zeros((len(rows), width), np.int32)

    # Put the examples of each row one after the other, and list the positions of their targets.
    positions, targets = [], []
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, start=1):
            supervised = np.flatnonzero(example.supervised)
            end = start + int(supervised[-1])
            tokens[row, start:end] = example.tokens[: end - start]
            segments[row, start:end] = segment
            # The hidden state at one token predicts the next token; positions count from the
            # first token of the first row.
            positions.append(row * width + start + supervised - 1)
            targets.append(example.tokens[supervised])
            start = end

    # Pad the list of targets.
    target_count = sum(map(len, targets))
    padded = round_up(target_count) if packed else padded_targets or multiple_of_8(target_count)
    padding = (0, padded - target_count)
    return Batch(
        tokens=tokens,
        positions=np.pad(np.concatenate(positions), padding).astype(np.int32),
        targets=np.pad(np.concatenate(targets), padding).astype(np.int32),
        weights=np.pad(np.ones(target_count, np.float32), padding),
        target_count=target_count,
        token_count=int(np.count_nonzero(segments)),
        row_lengths=np.count_nonzero(segments, axis=1),
        segments=segments if packed else None,
        places=tuple(example.place for examples in rows for example in examples),
    )


def round_up(count: int) -> int:
    """Return ``count`` rounded up to a multiple of 8, or of a larger power of 2 if it is large."""
    step = max(8, 1 << max((count - 1).bit_length() - 4, 0))
    return math.ceil(count / step) * step


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Return ``inputs_of`` every example, (examples,), without reading the tokens from disk."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([inputs_of(example) for example in examples], np.int64)


def target_counts_of(examples: Sequence[Example]) -> np.ndarray:
    """Return the number of supervised tokens of every example, (examples,)."""
    if isinstance(examples, Examples):
        return examples.target_counts
    return np.array([np.count_nonzero(example.supervised) for example in examples], np.int64)


def trimmed(batch: Batch) -> Batch:
    """Return a batch without the padding that only serves to repeat shapes.

    Code that is not compiled does not need this padding. Packed batches are returned unchanged.
    """
    if batch.segments is not None:
        return batch

    # Count the columns, rows and targets to keep.
    columns = multiple_of_8(int(batch.row_lengths.max()))
    filled = int(np.count_nonzero(batch.row_lengths))
    count = multiple_of_8(batch.target_count)
    weights = batch.weights[:count]

    # Flat indices change with the number of columns; those of padding stay 0.
    row, column = np.divmod(batch.positions[:count], batch.tokens.shape[1])
    positions = np.where(weights > 0, row * columns + column, 0)
    return replace(
        batch,
        tokens=batch.tokens[:filled, :columns],
        positions=positions.astype(np.int32),
        targets=batch.targets[:count],
        weights=weights,
        row_lengths=batch.row_lengths[:filled],
        reference=None if batch.reference is None else batch.reference[:filled],
        labels=None if batch.labels is None else batch.labels[:filled],
        mismatched=None if batch.mismatched is None else trimmed(batch.mismatched),
    )


def inputs_of(example: Example) -> int:
    """Return the number of input tokens, which are those before the last supervised token."""
    return int(np.flatnonzero(example.supervised)[-1])


def arrays_of(batch: Batch) -> tuple[mx.array, ...]:
    """Return a batch's arrays as the loss takes them.

    A packed batch also has segments. A batch of preferences has the log-probabilities of the
    reference, and labels if its answers are labeled.
    """
    arrays = (
        batch.tokens,
        batch.positions,
        batch.targets,
        batch.weights,
        batch.segments,
        batch.reference,
        batch.labels,
    )
    return tuple(mx.array(array) for array in arrays if array is not None)
