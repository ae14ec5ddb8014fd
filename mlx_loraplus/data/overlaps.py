"""Rows that are twice in train, and rows and conversations of valid and test that train has too."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .dataset import Examples
from .sources import SplitName

_NAMED = 5  # pairs of places


@dataclass(frozen=True)
class Overlap:
    """Rows that are in a split twice, or in two splits."""

    what: str
    count: int
    pairs: list[
        tuple[str, str]
    ]  # places of the first of them, and of the training rows that they are equal to or begin as
    leak: bool  # whether they make a validation or test loss look better than it is

    def __str__(self) -> str:
        """Return it in one line."""
        places = ", ".join(f"{one} = {other}" for one, other in self.pairs)
        return f"{self.count:,} {self.what}" + (
            f" ({places}{', …' * (self.count > _NAMED)})" if places else ""
        )


def find_overlaps(splits: Mapping[SplitName, Examples]) -> Iterator[Overlap]:
    """Yield the overlaps of the splits that have rows, those without any rows in common too."""
    train = splits["train"].take(splits["train"].first_of_rows())
    whole, asked, begins = (train.of_rows(name) for name in ("whole", "asked", "begins"))
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(whole)))
    yield Overlap(
        "duplicates in train",
        len(again),
        _pairs(train, again, train, first[inverse[again]]),
        leak=False,
    )
    for split in ("valid", "test"):
        if not len(splits.get(split, ())):
            continue
        other = splits[split].take(splits[split].first_of_rows())
        same = np.isin(other.of_rows("whole"), whole)
        alike = np.isin(other.of_rows("asked"), asked) & ~same
        kin = np.isin(other.of_rows("begins"), begins) & ~same & ~alike
        for name, known, here, what in (
            ("whole", whole, same, f"{split} rows that are in train"),
            ("asked", asked, alike, f"{split} rows whose prompt is in train, with another answer"),
            ("begins", begins, kin, f"{split} rows whose conversation begins as one in train"),
        ):
            values, first = np.unique(known, return_index=True)
            rows = np.flatnonzero(here)
            there = first[np.searchsorted(values, other.of_rows(name)[rows])]
            yield Overlap(what, len(rows), _pairs(other, rows, train, there), leak=True)


def _pairs(
    split: Examples, here: np.ndarray, train: Examples, there: np.ndarray
) -> list[tuple[str, str]]:
    return [
        (split.place(int(i)), train.place(int(j)))
        for i, j in zip(here[:_NAMED], there[:_NAMED], strict=True)
    ]
