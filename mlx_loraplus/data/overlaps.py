"""Find duplicate training rows, and validation and test rows that are also in another split."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .conversation_groups import group_examples
from .dataset import Examples
from .sources import SplitName

# Maximum number of pairs of rows that a message names
_MAX_PAIRS = 5
_SINGULAR = {"duplicates": "duplicate", "rows that are": "row that is", "rows whose": "row whose"}


@dataclass(frozen=True)
class Overlap:
    """Rows that occur twice in a split, or in two splits.

    Attributes:
        what: Description of the rows.
        count: Number of rows.
        pairs: Locations of the first rows, each with that of the row that it repeats.
        split: The split of the rows.
    """

    what: str
    count: int
    pairs: list[tuple[str, str]]
    split: SplitName

    @property
    def leak(self) -> bool:
        """Whether the rows make a validation or test loss too optimistic."""
        return self.split != "train"

    def __str__(self) -> str:
        """Return the overlap in one line."""
        line = f"{self.count:,} {self.what}"
        if self.count == 1:
            for many, one in _SINGULAR.items():
                line = line.replace(many, one)
        if not self.pairs:
            return line

        pairs = ", ".join(f"{one} = {other}" for one, other in self.pairs)
        more = ", …" if self.count > _MAX_PAIRS else ""
        return f"{line} ({pairs}{more})"


def find_overlaps(splits: Mapping[SplitName, Examples]) -> Iterator[Overlap]:
    """Yield the overlaps of each kind with train, including those with a count of 0.

    Overlaps of test with valid, by which the best adapter is chosen, follow if there are some.
    """
    yield _duplicates(_first_examples(splits["train"]))

    evaluated: list[SplitName] = []
    for split in ("valid", "test"):
        if len(splits.get(split, ())):
            evaluated.append(split)
            yield from _leaks(split, "train", splits)

    if len(evaluated) == 2:
        for overlap in _leaks("test", "valid", splits):
            if overlap.count:
                yield overlap


def _first_examples(examples: Examples) -> Examples:
    """Return the first example of each row, so that the parts of one row are not compared."""
    return examples.take(examples.first_of_rows())


def _duplicates(train: Examples) -> Overlap:
    """Return the training rows that repeat an earlier training row."""
    digests = train.of_rows("row_digest")
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    earliest = first[inverse]
    repeated = np.flatnonzero(earliest != np.arange(len(digests)))

    pairs = _pairs(train, repeated, train, earliest[repeated])
    return Overlap("duplicates in train", len(repeated), pairs, "train")


def _leaks(
    split: SplitName, other: SplitName, splits: Mapping[SplitName, Examples]
) -> Iterator[Overlap]:
    """Yield the rows of a split that are in another: whole, by prompt, and by conversation."""
    # All parts of a row belong to its conversation, so the first ones are enough afterwards
    in_other, in_split = group_examples(splits[other], splits[split])
    in_other = in_other[splits[other].first_of_rows()]
    in_split = in_split[splits[split].first_of_rows()]

    others, examples = _first_examples(splits[other]), _first_examples(splits[split])
    kinds = {
        f"{split} rows that are in {other}": (
            others.of_rows("row_digest"),
            examples.of_rows("row_digest"),
        ),
        f"{split} rows whose prompt is in {other}, with another answer": (
            others.of_rows("prompt_digest"),
            examples.of_rows("prompt_digest"),
        ),
        f"{split} rows whose conversation or text is partly in {other}": (in_other, in_split),
    }

    # The parts of one document may be in both splits
    is_part_of_both = np.zeros(len(examples), bool)
    if examples.tables is others.tables:
        has_documents = np.array([table.documents for table in examples.tables], bool)
        is_in_both = np.isin(examples.row_numbers(), others.row_numbers())
        is_part_of_both = is_in_both & has_documents[examples.spans["table"]]

    # Count each row only for the first kind of overlap that it has
    is_counted = is_part_of_both.copy()
    for what, (known, digests) in kinds.items():
        is_leak = np.isin(digests, known) & ~is_counted
        is_counted |= is_leak

        values, first = np.unique(known, return_index=True)
        rows = np.flatnonzero(is_leak)
        other_rows = first[np.searchsorted(values, digests[rows])]
        yield Overlap(what, len(rows), _pairs(examples, rows, others, other_rows), split)


def _pairs(
    split: Examples, rows: np.ndarray, others: Examples, other_rows: np.ndarray
) -> list[tuple[str, str]]:
    """Return the locations of the first rows and of the rows that they repeat."""
    pairs: list[tuple[str, str]] = []
    for row, other_row in zip(rows[:_MAX_PAIRS], other_rows[:_MAX_PAIRS], strict=True):
        pairs.append((split.place(int(row)), others.place(int(other_row))))
    return pairs
