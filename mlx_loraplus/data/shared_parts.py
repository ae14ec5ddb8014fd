"""Find the rows whose whole text is a part of another row's, or whose end begins another row.

Such rows are windows of one conversation (its turns 3 to 6), a chat that a template has rendered
after its system message, or a chat whose first message holds the system message. Parts begin and
end where a line or sentence does; ``prefix_digests`` stores these places.

A row is looked up by its first sentences, and a chat that a template has written also by those of
its first turn, because another row may have another system message. To be joined, both texts must
then agree up to the end of one of them. First sentences that too many others share, such as a
greeting, find nothing.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from .dataset import EncodedTable
from .join_groups import MOST_BRANCHES, Joins
from .prefix_digests import PART, inverses

_BLOCK = 2**8  # rows whose parts are looked up together
_SHORTEST_OVERLAP = 64  # characters of an end that begins another row, without white space


def join_shared_parts(
    tables: Sequence[EncodedTable], groups: np.ndarray, is_joinable: np.ndarray
) -> np.ndarray:
    """Return the group of each row, after joining the groups that share a part.

    Args:
        tables: The tables.
        groups: The group of each row of all tables, (rows,).
        is_joinable: Whether the group of each row may be joined, (rows,) bool.
    """
    keys, rows, places = _own_parts(tables)
    keys[~is_joinable[rows]] = 0
    known = np.unique(keys)
    found = np.concatenate(list(_contained(tables, known)))
    found = found[is_joinable[found[:, 1]]]
    if not len(found):
        return groups

    # The longest row of each group that contains a key
    lengths = np.concatenate([table.rows["part_count"] for table in tables])
    found = found[np.argsort(-lengths[found[:, 1]], kind="stable")]
    containing = _rare(found, groups, len(known))

    # The shortest row of each group that begins with one of these keys
    wanted = known[np.unique(containing[:, 0])]
    starts = np.flatnonzero(np.isin(keys, wanted))
    starts = starts[np.argsort(lengths[rows[starts]], kind="stable")]
    numbers = np.searchsorted(known, keys[starts])
    first = np.stack([numbers, rows[starts], places[starts]], axis=1)
    beginning = _rare(first, groups, len(known))

    # Compare the texts of the pairs that are not joined yet
    texts = _Texts(tables)
    joins = Joins()
    stops = np.searchsorted(beginning[:, 0], np.arange(len(known) + 1))
    for key, container, place in containing.tolist():
        for _, row, first_place in beginning[stops[key] : stops[key + 1]].tolist():
            pair = (joins.root(int(groups[row])), joins.root(int(groups[container])))
            if pair[0] == pair[1]:
                continue
            text = _from(texts.read(row), first_place)
            if _agree(text, _from(texts.read(container), place)):
                joins.add(*pair)
    return joins.apply(groups)


def _own_parts(tables: Sequence[EncodedTable]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the parts by which rows are looked up: their keys, rows and places, (parts,) each.

    The first part of each row comes first, then the first turn of each rendered chat.
    """
    first = np.concatenate([table.rows["part_key"] for table in tables])
    turns = np.concatenate([table.rows["turns_key"] for table in tables])
    places = np.concatenate([table.rows["first_turn"] for table in tables])
    chats = np.flatnonzero(turns)
    return (
        np.concatenate([first, turns[chats]]),
        np.concatenate([np.arange(len(first)), chats]),
        np.concatenate([np.zeros(len(first), np.int64), places[chats]]),
    )


def _contained(tables: Sequence[EncodedTable], known: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the known keys after the beginning of each row, (found, 3): key, row, place in it."""
    yield np.zeros((0, 3), np.int64)
    first_row = 0
    for table in tables:
        counts = table.rows["part_count"].astype(np.int64)
        stops = np.cumsum(counts)
        for first in range(0, len(counts), _BLOCK):
            block = slice(first, first + _BLOCK)
            start = int(stops[first - 1]) if first else 0
            parts = _read_parts(table, start, int(stops[block][-1]) - start)

            # Row and place of each part; the first place of a row is its beginning
            rows = np.repeat(np.arange(len(counts[block])), counts[block])
            places = np.arange(len(parts)) - (stops[block] - counts[block] - start)[rows]
            numbers = np.minimum(np.searchsorted(known, parts["key"]), len(known) - 1)
            is_known = (known[numbers] == parts["key"]) & (parts["key"] > 0)
            found = np.flatnonzero(is_known & (places > 0))
            yield np.stack([numbers, first_row + first + rows, places], axis=1)[found]
        first_row += len(counts)


def _rare(found: np.ndarray, groups: np.ndarray, keys: int) -> np.ndarray:
    """Return the first row of each group that has a key, for the keys that few groups have.

    Args:
        found: Keys, rows and places, (found, 3).
        groups: The group of each row.
        keys: The number of keys.

    Returns:
        Keys, rows and places in the order of the keys, (pairs, 3).
    """
    numbers = found[:, 0] * (int(groups.max()) + 1) + groups[found[:, 1]]
    _, first = np.unique(numbers, return_index=True)
    distinct = found[first]
    counts = np.bincount(distinct[:, 0], minlength=keys)
    return distinct[counts[distinct[:, 0]] <= MOST_BRANCHES]


class _Texts:
    """Reads the parts of single rows."""

    def __init__(self, tables: Sequence[EncodedTable]):
        self.tables = tables
        self.first_rows = np.cumsum([0, *(len(table.rows) for table in tables)])
        self.stops = [np.cumsum(table.rows["part_count"], dtype=np.int64) for table in tables]

    def read(self, row: int) -> np.ndarray:
        """Return the places of a row of all tables, (parts,) PART."""
        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        stops = self.stops[number]
        own = row - int(self.first_rows[number])
        start = int(stops[own - 1]) if own else 0
        return _read_parts(self.tables[number], start, int(stops[own]) - start)


def _read_parts(table: EncodedTable, start: int, count: int) -> np.ndarray:
    if table.parts is None or not count:
        return np.zeros(0, PART)
    return np.fromfile(table.parts, PART, count, offset=PART.itemsize * start)


def _from(parts: np.ndarray, place: int) -> np.ndarray:
    """Return the places of the text that begins at one of them, (parts,) PART."""
    start = int(parts["start"][place])
    rest = parts[place:].copy()
    rest["digest"] = (rest["digest"] - rest["digest"][0]) * inverses()[start]
    rest["start"] -= start
    return rest


def _agree(text: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two texts agree up to where one of them ends, given their places.

    The first text may be the longer one if they agree in enough characters.
    """
    length = int(min(text["start"][-1], other["start"][-1]))
    if length < text["start"][-1] and length < _SHORTEST_OVERLAP:
        return False

    # The digests of both up to there, if a line or a sentence of both ends there
    digest = _digest_at(text, length)
    return digest is not None and digest == _digest_at(other, length)


def _digest_at(text: np.ndarray, length: int) -> int | None:
    """Return the digest of the first characters of a text, or None if no line ends there."""
    index = int(np.searchsorted(text["start"], length))
    return int(text["digest"][index]) if text["start"][index] == length else None
