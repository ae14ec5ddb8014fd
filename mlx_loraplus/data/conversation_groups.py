"""Find the rows that belong to one conversation, so that a split does not divide it.

Two rows belong together if

- their conversations begin alike, up to and including the user's first message, or the second one
  if the first is a greeting that many share; or
- the text or the prompt of one is a beginning of the other's text; see
  ``prefix_digests``; or
- one is a part of the other, or its end begins the other; see ``shared_parts``; or
- they are equal once they are cut at the maximum length.

Texts are compared twice: those with the same system message, and then all without it. The second
time, a single question with another answer does not count, because the system message may hold the
document that is asked about. A text that more than ``MOST_BRANCHES`` other conversations continue
is a common opening, such as an instruction, and joins no conversations. The same limit holds for
texts that are equal as far as they are compared, and for equal parts of rows that are cut at the
maximum length.

The time is linear in the data, except for sorting a few numbers of each row, and only these numbers
are in memory.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from .dataset import EncodedTable, Examples
from .join_groups import MOST_BRANCHES, distinct_pairs, join_pairs
from .pairs import Pairs
from .shared_parts import join_shared_parts

_BLOCK = 2**10  # rows whose beginnings are looked up together


def group_examples(*splits: Examples, with_parts: bool = True) -> list[np.ndarray]:
    """Return the conversation of each example of some splits, as a number.

    Args:
        splits: The splits.
        with_parts: Whether a row belongs to another that contains it; see ``shared_parts``.

    Returns:
        For each split, the conversations of its examples, (examples,) int64.
    """
    # Start with the conversation of each example's row
    tables = [table for split in splits for table in split.tables]
    found = iter(find_conversations(tables, with_parts=with_parts))
    of_splits = [split.pick([next(found) for _ in split.tables]) for split in splits]
    conversations = np.concatenate([np.zeros(0, np.int64), *of_splits])

    # Join the conversations of examples that were cut to the same tokens
    cut = np.concatenate([np.zeros(0, np.uint64), *map(_digest_cut, splits)])
    is_part = np.concatenate([np.zeros(0, bool), *map(_is_part, splits)])
    count = int(conversations.max(initial=-1)) + 1
    _, first, inverse = np.unique(cut, return_index=True, return_inverse=True)
    joins = (cut > 0) & ~(is_part & _is_common(inverse, conversations, count))
    joined = join_pairs(conversations[first[inverse]][joins], conversations[joins])
    stops = np.cumsum([len(split) for split in splits])
    return np.split(joined.apply(conversations), stops[:-1])


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
    for number, table in enumerate(examples.tables):
        if not table.documents:
            in_table = examples.spans["table"] == number
            stops = table.spans["stop"][uncut[in_table]]
            is_cut[in_table] = examples.spans["stop"][in_table] < stops
    return is_cut


def _is_part(examples: Examples) -> np.ndarray:
    """Return whether each example is one of several that a row was cut into, (examples,) bool."""
    numbers = (examples.spans["table"].astype(np.int64) << 48) | _uncut_spans(examples)
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def _uncut_spans(examples: Examples) -> np.ndarray:
    """Return the index of the span of its table that each example is from, (examples,)."""
    indices = np.zeros(len(examples), np.int64)
    for number, table in enumerate(examples.tables):
        in_table = examples.spans["table"] == number
        starts = examples.spans["start"][in_table]
        indices[in_table] = np.searchsorted(table.spans["start"], starts, side="right") - 1
    return indices


def _is_common(texts: np.ndarray, conversations: np.ndarray, count: int) -> np.ndarray:
    """Return whether each text is one that too many conversations share, (texts,) bool.

    Args:
        texts: A number for each text, which is the same for equal ones.
        conversations: The conversation of each text.
        count: A number that is greater than every conversation.
    """
    distinct, _ = distinct_pairs([np.stack([texts, conversations], axis=1)], count)
    return np.bincount(distinct, minlength=1)[texts] > MOST_BRANCHES + 1


def find_conversations(
    tables: Sequence[EncodedTable], *, with_parts: bool = True
) -> list[np.ndarray]:
    """Return the conversation of each row, as a number that all rows of a conversation share.

    Args:
        tables: The tables.
        with_parts: Whether a row belongs to another that contains it; see ``shared_parts``.

    Returns:
        For each table, the conversations of its rows, (rows,) int64.
    """
    if not tables:
        return []

    # Start with one conversation for all rows that begin with the same messages
    openings, is_greeting = _openings(tables)
    _, groups = np.unique(openings, return_inverse=True)
    is_joinable = np.ones(len(groups), bool)
    is_joinable[groups[is_greeting]] = False

    # Join those whose texts continue each other, with the same system message and with any
    systems = _of_all(tables, "system_digest")
    texts, prompts = _of_all(tables, "text_digest"), _of_all(tables, "prompt_text_digest")
    joins = [_find_joins(tables, groups, systems, texts, prompts)]

    # With any system message, a single question does not count as the beginning of a conversation
    is_single = _of_all(tables, "is_single") > 0
    if systems.any():
        prompts = np.where(is_single, 0, prompts)
        joins.append(_find_joins(tables, groups, np.zeros_like(systems), texts, prompts))
    first, second = (np.concatenate(each) for each in zip(*joins, strict=True))

    # Join those with the same text, however many there are; a single question and its answer must
    # also have the same system message. Of a long text, only a part is compared, which unrelated
    # texts may share
    is_whole = (texts > 0) & (_of_all(tables, "is_whole") > 0)
    same = (texts + np.where(is_single, systems, 0))[is_whole]
    _, owners, inverse = np.unique(same, return_index=True, return_inverse=True)
    same_text = groups[is_whole]
    first = np.concatenate([first, same_text[owners[inverse]]])
    second = np.concatenate([second, same_text])
    joins = is_joinable[first] & is_joinable[second]
    joined = join_pairs(first[joins], second[joins]).apply(groups)

    # Join those that are windows of one conversation
    if with_parts:
        joined = join_shared_parts(tables, joined, is_joinable[groups])
    groups = joined
    stops = np.cumsum([len(table.rows) for table in tables])
    return np.split(groups, stops[:-1])


def _openings(tables: Sequence[EncodedTable]) -> tuple[np.ndarray, np.ndarray]:
    """Return a digest of each row's first messages, and whether it is only a greeting.

    If a short first message has more than ``MOST_BRANCHES`` different second ones, it is a
    greeting, and the conversations that it begins are told apart by their second message. Rows
    that consist of the greeting and its answer count as one conversation, which joins no others.
    """
    openings, deeper = _of_all(tables, "opening_digest"), _of_all(tables, "deeper_digest")
    goes_on = deeper > 0
    if not goes_on.any():
        return openings, goes_on

    _, numbers = np.unique(openings, return_inverse=True)
    _, seconds = np.unique(deeper[goes_on], return_inverse=True)
    pairs = np.stack([numbers[goes_on], seconds], axis=1)
    greetings, _ = distinct_pairs([pairs], len(openings))
    is_greeting = np.bincount(greetings, minlength=len(openings))[numbers] > MOST_BRANCHES
    return np.where(is_greeting & goes_on, deeper, openings), is_greeting & ~goes_on


def _find_joins(
    tables: Sequence[EncodedTable],
    groups: np.ndarray,
    systems: np.ndarray,
    texts: np.ndarray,
    prompts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of conversations to join, because a text of one begins a text of the other.

    Args:
        tables: The tables.
        groups: The conversation of each row of all tables, (rows,).
        systems: A number that is added to the digests of each row, so that only rows with the same
            number are compared, (rows,) uint64.
        texts: The digest of each row's text, (rows,) uint64.
        prompts: The digest of each row's prompt, or 0 if it does not count, (rows,) uint64.
    """
    # All texts that may begin others
    texts, prompts = (np.where(each > 0, each + systems, each) for each in (texts, prompts))
    known, first = np.unique(np.concatenate([texts, prompts]), return_index=True)
    owners = np.concatenate([groups, groups])[first]

    # Look up which of them are texts or beginnings of other rows
    has_text = texts > 0
    own = np.searchsorted(known, texts[has_text])
    pairs: list[np.ndarray] = [np.stack([own, groups[has_text]], axis=1)]
    stops = np.cumsum([len(table.rows) for table in tables])[:-1]
    groups_and_systems = zip(np.split(groups, stops), np.split(systems, stops), strict=True)
    for table, (own_groups, own_systems) in zip(tables, groups_and_systems, strict=True):
        pairs += _continuations(table, own_groups, own_systems, known, owners)
    begun, conversations = distinct_pairs(pairs, len(groups))

    # Leave out common openings
    is_other = owners[begun] != conversations
    begun, conversations = begun[is_other], conversations[is_other]
    is_rare = np.bincount(begun, minlength=len(known))[begun] <= MOST_BRANCHES
    return owners[begun[is_rare]], conversations[is_rare]


def _of_all(tables: Sequence[EncodedTable], name: str) -> np.ndarray:
    """Return a field of ROW for the rows of all tables, one table after another."""
    return np.concatenate([table.rows[name] for table in tables])


def _continuations(
    table: EncodedTable,
    groups: np.ndarray,
    systems: np.ndarray,
    known: np.ndarray,
    owners: np.ndarray,
) -> Iterator[np.ndarray]:
    """Yield pairs of a known text and a conversation that continues it, (pairs, 2) int64.

    Of a growing conversation, each row is paired only with the next longer one.

    Args:
        table: The table.
        groups: The conversation of each row, (rows,).
        systems: A number to add to the digests of each row, (rows,) uint64.
        known: The digests that are looked up, sorted.
        owners: The conversation of each known digest.
    """
    stops = np.cumsum(table.rows["beginning_count"], dtype=np.int64)
    for first in range(0, len(groups), _BLOCK):
        # Read the digests of the beginnings of a block of rows
        block = slice(first, first + _BLOCK)
        start = int(stops[first - 1]) if first else 0
        count = int(stops[block][-1]) - start
        digests = np.zeros(0, np.uint64)
        if table.beginnings is not None:
            digests = np.fromfile(table.beginnings, np.uint64, count, offset=8 * start)
            digests += np.repeat(systems[block], table.rows["beginning_count"][block])

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
