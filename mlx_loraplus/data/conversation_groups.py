"""Find the rows that belong to one conversation, so that a split does not divide it.

Two rows belong together if

- their conversations begin alike, up to and including the user's first message; or
- the text or the prompt of one is a beginning of the other's text; see
  ``prefix_digests``.

A text that more than ``MOST_BRANCHES`` conversations continue is a common opening, such as an
instruction, and joins no conversations. The time is linear in the data, except for sorting a few
numbers of each row, and only these numbers are in memory.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from .dataset import Shard

MOST_BRANCHES = 8
_BLOCK = 2**10  # rows whose beginnings are looked up together


def find_conversations(shards: Sequence[Shard]) -> list[np.ndarray]:
    """Return the conversation of each row, as a number that all rows of a conversation share.

    Returns:
        For each shard, the conversations of its rows, (rows,) int64.
    """
    if not shards:
        return []

    # Start with one conversation for all rows that begin with the same messages
    _, groups = np.unique(_of_all(shards, "opening_digest"), return_inverse=True)

    # Look up which texts and prompts are beginnings of other rows
    texts = _of_all(shards, "text_digest")
    prompts = _of_all(shards, "prompt_text_digest")
    known, first = np.unique(np.concatenate([texts, prompts]), return_index=True)
    owners = np.concatenate([groups, groups])[first]
    stops = np.cumsum([len(shard.rows) for shard in shards])
    pairs: list[np.ndarray] = []
    for shard, shard_groups in zip(shards, np.split(groups, stops[:-1]), strict=True):
        pairs += _continuations(shard, shard_groups, known, owners)
    begun, conversations = _distinct(pairs, len(groups))

    # Leave out common openings
    is_other = owners[begun] != conversations
    begun, conversations = begun[is_other], conversations[is_other]
    is_rare = np.bincount(begun, minlength=len(known))[begun] <= MOST_BRANCHES

    # Join the conversations that remain, and those of rows with the same text
    has_text = texts > 0
    same_text = owners[np.searchsorted(known, texts[has_text])]
    joined = _join(
        len(groups),
        np.concatenate([owners[begun[is_rare]], same_text]),
        np.concatenate([conversations[is_rare], groups[has_text]]),
    )
    return np.split(joined[groups], stops[:-1])


def _of_all(shards: Sequence[Shard], name: str) -> np.ndarray:
    """Return a field of ROW for the rows of all shards, one shard after another."""
    return np.concatenate([shard.rows[name] for shard in shards])


def _continuations(
    shard: Shard, groups: np.ndarray, known: np.ndarray, owners: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield pairs of a known text and a conversation that continues it, (pairs, 2) int64.

    Of a growing conversation, each row is paired only with the next longer one.

    Args:
        shard: The shard.
        groups: The conversation of each row, (rows,).
        known: The digests that are looked up, sorted.
        owners: The conversation of each known digest.
    """
    stops = np.cumsum(shard.rows["beginning_count"], dtype=np.int64)
    for first in range(0, len(groups), _BLOCK):
        # Read the digests of the beginnings of a block of rows
        block = slice(first, first + _BLOCK)
        start = int(stops[first - 1]) if first else 0
        count = int(stops[block][-1]) - start
        digests = np.zeros(0, np.uint64)
        if shard.beginnings is not None:
            digests = np.fromfile(shard.beginnings, np.uint64, count, offset=8 * start)

        # Find the digests that are known, and the rows that contain them
        places = np.minimum(np.searchsorted(known, digests), len(known) - 1)
        is_known = known[places] == digests
        found = places[is_known]
        rows = np.searchsorted(stops[block] - start, np.flatnonzero(is_known), side="right")

        # A beginning is continued by the next longer one in its row, the longest by the row itself
        continued = groups[block][rows]
        has_next = rows[1:] == rows[:-1]
        continued[:-1][has_next] = owners[found[1:][has_next]]
        yield np.stack([found, continued], axis=1)


def _distinct(pairs: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct pairs, as an array of first numbers and an array of second numbers.

    Args:
        pairs: Arrays of pairs.
        count: A number that is greater than every second number.
    """
    # Store each pair as one number
    numbers = [np.zeros(0, np.int64)]
    numbers += [np.unique(each[:, 0] * count + each[:, 1]) for each in pairs]
    first, second = np.divmod(np.unique(np.concatenate(numbers)), max(count, 1))
    return first, second


def _join(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return a number for each of ``count`` groups, which is the same for groups that are joined.

    Args:
        count: The number of groups.
        first: One group of each pair to join, (pairs,).
        second: The other group of each pair, (pairs,).
    """
    joined = np.arange(count)
    differs = first != second
    parents: dict[int, int] = {}

    # Union-find, with path halving
    def root(group: int) -> int:
        while parents.get(group, group) != group:
            parents[group] = parents.get(parents[group], parents[group])
            group = parents[group]
        return group

    for one, other in zip(first[differs].tolist(), second[differs].tolist(), strict=True):
        low, high = sorted((root(one), root(other)))
        parents[high] = low
    for group in parents:
        joined[group] = root(group)
    return joined
