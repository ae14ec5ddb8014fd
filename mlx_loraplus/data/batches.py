"""Examples become batches: little padding, few shapes, an order that is a pure function of (seed, epoch).

Rows are shuffled, cut into windows, sorted by length inside each window, and cut into batches whose order is shuffled
again. Every example is used once an epoch, the last partial batch too. Lengths and supervised counts are rounded up to
a short ladder, so that a compiled step is traced a few times only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .templates import Example

WINDOW = 64  # batches sorted together: enough to leave little padding, few enough to keep the order random


@dataclass(frozen=True)
class Batch:
    """Padded rows, and where in them there is something to learn.

    Attributes:
        tokens: Inputs, padded on the right, (rows, length) int32.
        positions: Flat indices into (rows * length) of the hidden states that predict a target, (targets,) int32.
        targets: The tokens predicted there, (targets,) int32.
        weights: 1 for a target, 0 where the list is padded, (targets,) float32.
        supervised: How many targets are real.
        useful: How many input tokens are no padding.
        segments: Where rows are packed: 1, 2, ... for the first, second, ... example of a row and 0 for padding,
            (rows, length) int32; None where a row is one example.
        sources: Where each example came from, "train.jsonl:17".
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    supervised: int
    useful: int
    segments: np.ndarray | None = None
    sources: tuple[str, ...] = ()


class Batches:
    """The endless, seeded sequence of a run's batches; ``batches[n]`` is the n-th since the start.

    Args:
        examples: Tokens and which of them are supervised.
        batch_size: Rows in a batch.
        seed: Seed of the order.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int):
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.per_epoch = -(-len(examples) // batch_size)
        self._epoch = -1
        self._order: list[Any] = []

    def __getitem__(self, index: int) -> Batch:
        epoch, within = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffle(epoch), epoch
        return self._collate(self._order[within])

    def largest(self) -> tuple[int, int]:
        """Return the (rows, length) of the largest batch."""
        return self.batch_size, round_up(max(inputs_of(example) for example in self.examples))

    def _collate(self, batch: Any) -> Batch:
        return collate([self.examples[i] for i in batch])

    def _shuffle(self, epoch: int) -> list[Any]:
        generator = np.random.default_rng([self.seed, epoch])
        lengths = np.array([inputs_of(example) for example in self.examples])
        rows = generator.permutation(len(self.examples))
        batches = []
        for start in range(0, len(rows), WINDOW * self.batch_size):
            window = rows[start : start + WINDOW * self.batch_size]
            window = window[np.argsort(lengths[window], kind="stable")]
            batches += [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
        return [batches[i] for i in generator.permutation(len(batches))]


def in_order(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    """Yield all examples once, sorted by length: for evaluation."""
    rows = sorted(examples, key=inputs_of)
    for start in range(0, len(rows), batch_size):
        yield collate(rows[start : start + batch_size])


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples to one length of the ladder and list what is supervised."""
    length = round_up(max(inputs_of(example) for example in examples))
    return lay_out([[example] for example in examples], length, packed=False)


def lay_out(rows: Sequence[Sequence[Example]], length: int, *, packed: bool) -> Batch:
    """Lay each row's examples one after another, padded to ``length``, and list what is supervised.

    An example's inputs end before its last supervised token: nothing is learned from what follows. Its first token is
    never supervised, so no target lies across the seam of two examples.

    Args:
        rows: The examples of each row; a row may be empty.
        length: Of every row, in tokens.
        packed: Whether the batch tells the examples of a row apart, by ``segments``.
    """
    tokens, segments = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    positions, targets = [], []
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, start=1):
            end = start + inputs_of(example)
            tokens[row, start:end] = example.tokens[: end - start]
            segments[row, start:end] = segment
            supervised = np.flatnonzero(example.supervised)
            positions.append(row * length + start + supervised - 1)  # the state before a token predicts it
            targets.append(example.tokens[supervised])
            start = end
    supervised = sum(map(len, positions))
    padding = (0, round_up(supervised) - supervised)
    return Batch(
        tokens=tokens,
        positions=np.pad(np.concatenate(positions), padding).astype(np.int32),
        targets=np.pad(np.concatenate(targets), padding).astype(np.int32),
        weights=np.pad(np.ones(supervised, np.float32), padding),
        supervised=supervised,
        useful=int(np.count_nonzero(segments)),
        segments=segments if packed else None,
        sources=tuple(example.source for examples in rows for example in examples),
    )


def round_up(count: int) -> int:
    """Return the smallest rung of the ladder that is at least ``count``: multiples of 8, then eighths of an octave."""
    step = max(8, 1 << max((count - 1).bit_length() - 4, 0))
    return -(-count // step) * step


def inputs_of(example: Example) -> int:
    """Return how many of an example's tokens the model sees: those before the last supervised one."""
    return int(np.flatnonzero(example.supervised)[-1])
