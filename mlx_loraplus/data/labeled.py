"""Answers that are labeled desirable or undesirable, and batches of them.

KTO also needs answers to other prompts. Each example therefore has a *mismatched* answer: the
tokens of its own prompt, followed by the answer of the example d places before it. The distance d
is the same for all examples, so that every answer is used once. It is chosen so that as few answers
as possible belong to an equal prompt after all; of several such distances, it is the smallest.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from ..config import ObjectiveConfig
from ..errors import counted
from .batches import Batch, Batches, lay_out
from .dataset import EncodedTable, Examples
from .pairs import ComparedExamples
from .stored_rows import KIND_NAMES
from .tokenize import Example

# The largest distance from which a mismatched answer is taken
_FARTHEST = 64


class LabeledExamples(ComparedExamples):
    """The labeled answers of a split.

    Args:
        tables: The tables that hold the tokens.
        spans: The position of each answer in the tables, (examples,) SPAN.

    Attributes:
        is_desirable: The label of each answer, (examples,) bool.
        prompts: A digest of each prompt, (examples,).
    """

    def __init__(self, tables: Sequence[EncodedTable], spans: np.ndarray):
        super().__init__(tables, spans)
        self.is_desirable = self.of_rows("kind") == KIND_NAMES.index("desirable")
        self.prompts = self.of_rows("prompt_digest")

    @property
    def both(self) -> tuple[Examples, Examples]:
        """The answers and the mismatched answers."""
        return self, self.mismatched

    @cached_property
    def mismatched(self) -> "MismatchedAnswers":
        """The mismatched answer of each example."""
        return MismatchedAnswers(self, np.roll(np.arange(len(self)), self._distance))

    @property
    def matched(self) -> int:
        """The number of mismatched answers that belong to an equal prompt after all."""
        return self._count_matched(self._distance)

    @cached_property
    def desirable(self) -> Examples:
        """The desirable answers."""
        return Examples(self.tables, self.spans[self.is_desirable])

    def take(self, indices: np.ndarray) -> "LabeledExamples":
        """Return the examples with these indices, in this order, without their reference."""
        return LabeledExamples(self.tables, self.spans[indices])

    def fingerprint(self) -> str:
        """Return a digest of the examples: their tokens, labels and order."""
        digest = hashlib.blake2b(super().fingerprint().encode(), digest_size=16)
        digest.update(self.is_desirable.tobytes())
        digest.update(str(self._distance).encode())
        return digest.hexdigest()

    @cached_property
    def _distance(self) -> int:
        """The distance from which mismatched answers are taken, as the module describes."""
        farthest = min(len(self) - 1, _FARTHEST)
        return min(range(1, farthest + 1), key=self._count_matched, default=1)

    def _count_matched(self, distance: int) -> int:
        """Return how many examples have the prompt of the example ``distance`` places before."""
        return int(np.count_nonzero(self.prompts == np.roll(self.prompts, distance)))


class MismatchedAnswers(Examples):
    """The prompt of each example, followed by the answer of another one.

    They are cut to the length of the longest example, so that they never need more memory.

    Args:
        examples: The examples that the prompts are from.
        others: The index of the example that each answer is from, (examples,).
    """

    def __init__(self, examples: Examples, others: np.ndarray):
        super().__init__(examples.tables, examples.spans.copy())
        self.examples = examples
        self.others = others
        self.longest = int(examples.lengths.max(initial=0)) + 1

        # Compute the sizes of the mismatched answers before they are cut.
        supervised = [SupervisedRuns(table.supervised) for table in examples.tables]
        prompts = _prompt_lengths(examples, supervised)
        self.lengths[:] = prompts + (examples.lengths - prompts)[others]
        self.target_counts[:] = examples.target_counts[others]

        # Correct the sizes of those that are cut.
        starts = (examples.spans["start"] + prompts)[others]
        stops = starts + self.longest - prompts
        of_table = examples.spans["table"][others]
        for number, runs in enumerate(supervised):
            cut = np.flatnonzero((self.lengths >= self.longest) & (of_table == number))
            start, stop = starts[cut], stops[cut]
            self.lengths[cut] = prompts[cut] + runs.last_before(stop) - start
            self.target_counts[cut] = runs.count(start, stop)

    def __getitem__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, index: int
    ) -> Example:
        own, other = self.examples[index], self.examples[int(self.others[index])]
        end, start = int(own.supervised.argmax()), int(other.supervised.argmax())
        tokens = np.concatenate([own.tokens[:end], other.tokens[start:]])
        supervised = np.concatenate([own.supervised[:end], other.supervised[start:]])
        return Example(tokens[: self.longest], supervised[: self.longest], own.place)


def note_labels(examples: LabeledExamples, objective: ObjectiveConfig, split: str) -> list[str]:
    """Return notes on the labels and prompts of a split.

    The KTO paper advises weights with w_D n_D / (w_U n_U) in [1, 4/3], where n_D and n_U are the
    numbers of desirable and undesirable answers. A tenth more or less is not reported.
    """
    notes: list[str] = []
    count = len(examples)
    if not count:
        return notes

    # Report answers for which there is no other prompt.
    if examples.matched:
        notes.append(
            f"{examples.matched:,} of {counted(count, 'mismatched answer')}, from which the KL is"
            f" estimated, {'belongs' if examples.matched == 1 else 'belong'} to the same prompt,"
            " because prompts repeat; add rows with other prompts"
        )
    if split != "train":
        return notes

    # Compare the weighted numbers of both labels.
    desirable = int(examples.is_desirable.sum())
    undesirable = count - desirable
    if desirable in (0, count):
        missing = "undesirable" if desirable else "desirable"
        notes.append(
            f"warning: no answer is labeled {missing}; kto needs desirable and undesirable answers"
        )
        return notes

    good, bad = objective.kto_weights
    ratio = good * desirable / (bad * undesirable)
    if not 0.9 <= ratio <= 1.1 * 4 / 3:
        balanced = (bad * undesirable / desirable, bad)
        if ratio > 1:
            balanced = (good, good * desirable / undesirable)
        advised = " ".join(f"{weight:.3g}" for weight in balanced)
        notes.append(
            f"warning: {desirable:,} desirable and {counted(undesirable, 'undesirable answer')}"
            f" do not have equal weight; --kto-weights {advised} balances them"
        )
    return notes


class SupervisedRuns:
    """The supervised tokens of a table as runs of adjacent tokens, to look up many at once.

    Args:
        supervised: Whether each token is supervised, (tokens,) bool.
    """

    def __init__(self, supervised: np.ndarray):
        changes = np.flatnonzero(supervised[1:] != supervised[:-1]) + 1
        first = [0] if supervised[:1].any() else []
        last = [len(supervised)] if supervised[-1:].any() else []
        edges = np.concatenate([first, changes, last]).astype(np.int64)
        self.starts, self.ends = edges[::2], edges[1::2]
        self.counts = np.concatenate([[0], np.cumsum(self.ends - self.starts)])  # before each run

    def first_from(self, places: np.ndarray) -> np.ndarray:
        """Return the first supervised token at each place or after it; it must exist."""
        run = np.searchsorted(self.ends, places, side="right")
        return np.maximum(self.starts[run], places)

    def last_before(self, places: np.ndarray) -> np.ndarray:
        """Return the last supervised token before each place; it must exist."""
        run = np.searchsorted(self.starts, places) - 1
        return np.minimum(self.ends[run], places) - 1

    def count(self, firsts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Return the number of supervised tokens from each of ``firsts`` to its stop.

        Each of ``firsts`` is itself supervised.
        """
        begins = np.searchsorted(self.ends, firsts, side="right")
        ends = np.searchsorted(self.starts, stops) - 1
        until_stop = self.counts[ends] + np.minimum(self.ends[ends], stops) - self.starts[ends]
        return until_stop - (self.counts[begins] + firsts - self.starts[begins])


def _prompt_lengths(examples: Examples, supervised: Sequence[SupervisedRuns]) -> np.ndarray:
    """Return the number of tokens before the first supervised one, (examples,).

    The first token of an example is never supervised.
    """
    lengths = np.zeros(len(examples), np.int64)
    for number, runs in enumerate(supervised):
        in_table = np.flatnonzero(examples.spans["table"] == number)
        starts = examples.spans["start"][in_table]
        lengths[in_table] = runs.first_from(starts + 1) - starts
    return lengths


class LabeledBatches(Batches):
    """``Batches`` of labeled answers, each with a batch of their mismatched answers.

    Both are padded to the same shape.

    Attributes:
        labeled: The examples.
    """

    def __init__(self, examples: LabeledExamples, batch_size: int, seed: int, processes: int = 1):
        super().__init__(examples, batch_size, seed, processes)
        self.labeled = examples
        self.lengths = np.maximum(examples.lengths, examples.mismatched.lengths)
        self.target_counts = np.maximum(examples.target_counts, examples.mismatched.target_counts)

    def collate(self, rows: Sequence[np.ndarray]) -> Batch:
        """Read the answers of a batch and lay them out, padded to the shape from ``shape_of``."""
        members = np.concatenate(rows)
        shape = self.shape_of(rows)
        mismatched = self._lay_out(self.labeled.mismatched, members, 1, shape)
        batch = self._lay_out(self.labeled, members, 0, shape)

        labels = np.zeros(shape[0], np.float32)
        labels[: len(members)] = self.labeled.is_desirable[members]
        return replace(batch, labels=labels, mismatched=mismatched)

    def _lay_out(
        self, examples: Examples, members: np.ndarray, column: int, shape: tuple[int, int, int]
    ) -> Batch:
        """Lay out answers with their column of the reference; rows beyond them are empty."""
        rows, length, targets = shape
        filled = [[examples[int(index)]] for index in members]
        empty: list[list[Example]] = [[]] * (rows - len(filled))

        reference = np.zeros(rows, np.float32)
        reference[: len(filled)] = self.labeled.reference[members, column]
        batch = lay_out([*filled, *empty], length, targets)
        return replace(batch, pairs=len(members), reference=reference)
