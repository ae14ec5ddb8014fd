"""Find the rows that belong to one conversation, so that a split does not divide it.

Two rows belong together if

- their conversations begin alike, up to and including the user's first message; or
- the text or the prompt of one is a beginning of the other's text; see
  ``prefix_digests``; or
- they are equal once they are cut at the maximum length.

Texts are compared twice: those with the same system message, and then all texts without it. A text
that more than ``MOST_BRANCHES`` conversations continue is a common opening, such as an instruction
to which each row's system message adds a document, and joins no conversations. The time is linear
in the data, except for sorting a few numbers of each row, and only these numbers are in memory.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from .dataset import Examples, Shard

MOST_BRANCHES = 8
_BLOCK = 2**10  # rows whose beginnings are looked up together


def group_examples(*splits: Examples) -> list[np.ndarray]:
    """Return the conversation of each example of some splits, as a number.

    Returns:
        For each split, the conversations of its examples, (examples,) int64.
    """
    # Start with the conversation of each example's row
    found = iter(find_conversations([shard for split in splits for shard in split.shards]))
    of_splits = [split.pick([next(found) for _ in split.shards]) for split in splits]
    conversations = np.concatenate([np.zeros(0, np.int64), *of_splits])

    # Join the conversations of examples that were cut to the same tokens
    cut = np.concatenate([np.zeros(0, np.uint64), *map(_digest_cut, splits)])
    _, first, inverse = np.unique(cut, return_index=True, return_inverse=True)
    is_cut = cut > 0
    count = int(conversations.max(initial=-1)) + 1
    joined = _join(count, conversations[first[inverse]][is_cut], conversations[is_cut])
    stops = np.cumsum([len(split) for split in splits])
    return np.split(joined[conversations], stops[:-1])


def _digest_cut(examples: Examples) -> np.ndarray:
    """Return a digest of the tokens of each example that is a part of a row, and 0 for all others.

    The parts of documents are cut anywhere and have no digest.
    """
    digests = np.zeros(len(examples), np.uint64)
    for number, shard in enumerate(examples.shards):
        if shard.documents:
            continue

        # Compare the ends with those before the maximum length was applied
        in_shard = np.flatnonzero(examples.spans["shard"] == number)
        spans = examples.spans[in_shard]
        whole = np.searchsorted(shard.spans["start"], spans["start"], side="right") - 1
        is_cut = spans["stop"] < shard.spans["stop"][whole]
        for index, span in zip(in_shard[is_cut], spans[is_cut], strict=True):
            tokens = shard.tokens[span["start"] : span["stop"]]
            digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
            digests[index] = int.from_bytes(digest)
    return digests


def find_conversations(shards: Sequence[Shard]) -> list[np.ndarray]:
    """Return the conversation of each row, as a number that all rows of a conversation share.

    Returns:
        For each shard, the conversations of its rows, (rows,) int64.
    """
    if not shards:
        return []

    # Start with one conversation for all rows that begin with the same messages
    _, groups = np.unique(_of_all(shards, "opening_digest"), return_inverse=True)

    # Join those whose texts continue each other, with the same system message and with any
    systems = _of_all(shards, "system_digest")
    joins = [_find_joins(shards, groups, systems)]
    if systems.any():
        joins.append(_find_joins(shards, groups, np.zeros_like(systems)))
    first, second = (np.concatenate(each) for each in zip(*joins, strict=True))

    # Join those with the same text and system message, however many there are
    texts = _of_all(shards, "text_digest")
    has_text = texts > 0
    _, owners, inverse = np.unique(
        (texts + systems)[has_text], return_index=True, return_inverse=True
    )
    same_text = groups[has_text]
    joined = _join(
        len(groups),
        np.concatenate([first, same_text[owners[inverse]]]),
        np.concatenate([second, same_text]),
    )
    stops = np.cumsum([len(shard.rows) for shard in shards])
    return np.split(joined[groups], stops[:-1])


def _find_joins(
    shards: Sequence[Shard], groups: np.ndarray, systems: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of conversations to join, because a text of one begins a text of the other.

    Args:
        shards: The shards.
        groups: The conversation of each row of all shards, (rows,).
        systems: A number that is added to the digests of each row, so that only rows with the same
            number are compared, (rows,) uint64.
    """
    # The digests of all texts and prompts
    texts, prompts = _of_all(shards, "text_digest"), _of_all(shards, "prompt_text_digest")
    texts, prompts = (np.where(each > 0, each + systems, each) for each in (texts, prompts))
    known, first = np.unique(np.concatenate([texts, prompts]), return_index=True)
    owners = np.concatenate([groups, groups])[first]

    # Look up which of them are texts or beginnings of other rows
    has_text = texts > 0
    own = np.searchsorted(known, texts[has_text])
    pairs: list[np.ndarray] = [np.stack([own, groups[has_text]], axis=1)]
    stops = np.cumsum([len(shard.rows) for shard in shards])[:-1]
    groups_and_systems = zip(np.split(groups, stops), np.split(systems, stops), strict=True)
    for shard, (own_groups, own_systems) in zip(shards, groups_and_systems, strict=True):
        pairs += _continuations(shard, own_groups, own_systems, known, owners)
    begun, conversations = _distinct(pairs, len(groups))

    # Leave out common openings
    is_other = owners[begun] != conversations
    begun, conversations = begun[is_other], conversations[is_other]
    is_rare = np.bincount(begun, minlength=len(known))[begun] <= MOST_BRANCHES
    return owners[begun[is_rare]], conversations[is_rare]


def _of_all(shards: Sequence[Shard], name: str) -> np.ndarray:
    """Return a field of ROW for the rows of all shards, one shard after another."""
    return np.concatenate([shard.rows[name] for shard in shards])


def _continuations(
    shard: Shard,
    groups: np.ndarray,
    systems: np.ndarray,
    known: np.ndarray,
    owners: np.ndarray,
) -> Iterator[np.ndarray]:
    """Yield pairs of a known text and a conversation that continues it, (pairs, 2) int64.

    Of a growing conversation, each row is paired only with the next longer one.

    Args:
        shard: The shard.
        groups: The conversation of each row, (rows,).
        systems: A number to add to the digests of each row, (rows,) uint64.
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
            digests += np.repeat(systems[block], shard.rows["beginning_count"][block])

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
