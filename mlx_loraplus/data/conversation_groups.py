"""Find the rows that belong to one conversation, so that a split does not divide it.

Two rows belong together if

- their conversations begin alike, up to and including the user's first message; or
- the text or the prompt of one is a beginning of the other's text; see
  ``prefix_digests``; or
- they are equal once they are cut at the maximum length.

Texts are compared twice: those with the same system message, and then all texts without it. A text
that more than ``MOST_BRANCHES`` other conversations continue is a common opening, such as an
instruction to which each row's system message adds a document, and joins no conversations. Up to
that many rows that ask the same question are joined, also if their system messages hold different
documents. The same limit holds for texts that are equal as far as they are compared, and for equal
parts of rows that are split at the maximum length.

The time is linear in the data, except for sorting a few numbers of each row, and only these numbers
are in memory.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from .dataset import Examples, Shard
from .pairs import Pairs

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
    is_part = np.concatenate([np.zeros(0, bool), *map(_is_part, splits)])
    count = int(conversations.max(initial=-1)) + 1
    _, first, inverse = np.unique(cut, return_index=True, return_inverse=True)
    joins = (cut > 0) & ~(is_part & _is_common(inverse, conversations, count))
    joined = _join(count, conversations[first[inverse]][joins], conversations[joins])
    stops = np.cumsum([len(split) for split in splits])
    return np.split(joined[conversations], stops[:-1])


def _digest_cut(examples: Examples) -> np.ndarray:
    """Return a digest of the tokens of each example that is a part of a row, and 0 for all others.

    Of a pair, both answers count, and it is enough that one of them is cut.
    """
    answers = examples.both if isinstance(examples, Pairs) else (examples,)
    is_cut = np.any([_is_cut(each) for each in answers], axis=0)

    digests = np.zeros(len(examples), np.uint64)
    for index in np.flatnonzero(is_cut).tolist():
        digest = hashlib.blake2b(digest_size=8)
        for each in answers:
            tokens = each[index].tokens
            digest.update(len(tokens).to_bytes(8))
            digest.update(tokens.tobytes())
        digests[index] = int.from_bytes(digest.digest())
    return digests


def _is_cut(examples: Examples) -> np.ndarray:
    """Return whether each example ends before its row or answer does, (examples,) bool.

    The parts of documents are cut anywhere and do not count.
    """
    is_cut = np.zeros(len(examples), bool)
    uncut = _uncut_spans(examples)
    for number, shard in enumerate(examples.shards):
        if not shard.documents:
            in_shard = examples.spans["shard"] == number
            stops = shard.spans["stop"][uncut[in_shard]]
            is_cut[in_shard] = examples.spans["stop"][in_shard] < stops
    return is_cut


def _is_part(examples: Examples) -> np.ndarray:
    """Return whether each example is one of several that a row was split into, (examples,) bool."""
    numbers = (examples.spans["shard"].astype(np.int64) << 48) | _uncut_spans(examples)
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def _uncut_spans(examples: Examples) -> np.ndarray:
    """Return the index of the span of its shard that each example is from, (examples,)."""
    indices = np.zeros(len(examples), np.int64)
    for number, shard in enumerate(examples.shards):
        in_shard = examples.spans["shard"] == number
        starts = examples.spans["start"][in_shard]
        indices[in_shard] = np.searchsorted(shard.spans["start"], starts, side="right") - 1
    return indices


def _is_common(texts: np.ndarray, conversations: np.ndarray, count: int) -> np.ndarray:
    """Return whether each text is one that too many conversations share, (texts,) bool.

    Args:
        texts: A number for each text, which is the same for equal ones.
        conversations: The conversation of each text.
        count: A number that is greater than every conversation.
    """
    distinct, _ = _distinct([np.stack([texts, conversations], axis=1)], count)
    return np.bincount(distinct, minlength=1)[texts] > MOST_BRANCHES + 1


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

    # Join those with the same text and system message, however many there are. Of a long text, only
    # a part is compared, which unrelated texts may share
    texts = _of_all(shards, "text_digest")
    is_whole = (texts > 0) & (_of_all(shards, "is_whole") > 0)
    _, owners, inverse = np.unique(
        (texts + systems)[is_whole], return_index=True, return_inverse=True
    )
    same_text = groups[is_whole]
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
