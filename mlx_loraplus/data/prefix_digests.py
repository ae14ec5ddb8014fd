"""Compute digests of a row's text, which show whether a row continues or repeats another.

Conversations are often given as growing prefixes: one row's prompt and answer are the beginning of
the next row's prompt. Plain text has no messages to compare. The text of all messages is therefore
compared, ignoring white space, case and what ``fold_text`` and ``plain_turns`` leave out. A
beginning counts if it

- has at least ``SHORTEST`` characters, and
- ends where one of the first ``_WORD_ENDS`` words ends, or a sentence or a line ends, or at either
  end of a tag, a symbol or a role such as ``User:``.

In writing without spaces, such as Chinese, each character counts as a word. After ``_WORD_ENDS``
words, the beginnings are further apart (one for each sixteenth more), so only the part of such a
long text up to the last of them is compared. The same holds after ``_MOST`` beginnings. Markup and
code have an end at every tag, so that this part is shorter than of prose. Texts that are equal up
to there may differ afterwards, which is why ``TextDigests.is_whole`` is stored.

The digest of a text's first n characters is Σ c_i b^i mod 2^64, with random numbers c_i for the
characters and a fixed odd number b. All beginnings of a text therefore cost one cumulative sum, and
so do those of its other parts: the digest up to the end, less that up to the start, over b^start.
The system message of a chat is not a part of the text. In a chat that a template has written, it
is, so ``TextDigests.first_turn`` says where the turns begin.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .fold_text import fold_text, plain_turns, start_of_turns
from .messages import is_chat, parse_json
from .rows import Row
from .thoughts import answer_of

SHORTEST = 10  # characters of a beginning, without white space
_SHORTEST_PART = 28  # characters of a row that may be a part of another
LONGEST = 2**16  # characters of a text that are compared
_MOST_PARTS = 2048  # places of a text where a part may begin
_WORD_ENDS = 1024  # beginnings of a text that may end at any word
_MOST = 2048  # beginnings of a text
_TAGS = "<[{#|→⇒•◆■▶§"  # characters that often begin a turn
_TAG_ENDS = ">]"
_SENTENCE_ENDS = ".!?:|}→⇒"  # followed by white space
_BASE = 0x9E3779B97F4A7C15
# The writing systems without spaces: Thai to Myanmar and Khmer, and from the Chinese radicals on
_UNSPACED = ((0x0E00, 0x10A0), (0x1780, 0x1800), (0x2E80, 0xA000), (0x20000, 0x32000))

PART = np.dtype([("start", "u4"), ("digest", "u8"), ("key", "u8")])
"""A place where a part of a text may begin: the number of characters before it, the digest of the
text up to it, and the digest of the sentences or lines after it, until these have
``_SHORTEST_PART`` characters; 0 if there are fewer."""


class TextDigests(NamedTuple):
    """Digests of a row's text.

    Attributes:
        text: Digest of the text, or of the part of a long text that is compared; 0 if it is too
            short.
        is_whole: Whether all of the text is compared.
        prompt: Digest of the prompt, or 0 if it is too short or too long.
        beginnings: Digests of the beginnings that count, shortest first, (beginnings,) uint64.
        parts: The places where a line or sentence begins, and the end of the text, (parts,) PART.
        first_turn: The index of the part with which the turns of a rendered chat begin, after its
            system message; 0 if there is none.
    """

    text: int
    is_whole: bool
    prompt: int
    beginnings: np.ndarray
    parts: np.ndarray
    first_turn: int = 0


def text_digests(row: Row) -> TextDigests:
    """Return the digests of a row's text; of two answers, the chosen one counts."""
    prompt, answer = _texts_of(row)
    head, turns, completion = _plain_parts(prompt, answer)
    characters = _characters(head + turns + completion)
    kept = np.flatnonzero(~np.strings.isspace(characters))
    is_short = len(prompt + answer) <= 2 * LONGEST and len(kept) <= LONGEST
    kept = kept[:LONGEST]
    if len(kept) < SHORTEST:
        return TextDigests(0, is_short, 0, np.zeros(0, np.uint64), np.zeros(0, PART))

    # The digest of every beginning, from 0 characters on
    codes = _mixed(characters.view(np.uint32)[kept].astype(np.uint64))
    digests = np.zeros(len(kept) + 1, np.uint64)
    np.cumsum(codes * powers()[: len(kept)], out=digests[1:])

    # The beginnings that count, without the whole text
    ends, sentences, has_all_ends = _ends(characters, kept)
    ends = ends[ends >= SHORTEST]
    has_all_ends &= len(ends) < _MOST
    ends = ends[:_MOST]
    compared = len(kept) if has_all_ends else int(ends[-1])
    ends = ends[ends < compared]

    # The digest of the prompt, which may end anywhere
    length = _count_kept(characters[: len(head + turns)])
    is_compared = bool(completion) and SHORTEST <= length < compared

    # The part with which the turns of a rendered chat begin
    parts = _parts(digests, sentences)
    start = _count_kept(characters[: len(head)])
    first_turn = int(np.searchsorted(parts["start"], start))
    is_part = first_turn < len(parts) and parts["start"][first_turn] == start
    return TextDigests(
        text=int(digests[compared]),
        is_whole=is_short and has_all_ends,
        prompt=int(digests[length]) if is_compared else 0,
        beginnings=digests[ends],
        parts=parts,
        first_turn=first_turn if is_part else 0,
    )


def _count_kept(characters: np.ndarray) -> int:
    """Return the number of characters that are not white space."""
    return int(np.count_nonzero(~np.strings.isspace(characters)))


def _parts(digests: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    """Return the places where a line or sentence begins, and the end of the text, (parts,) PART.

    Args:
        digests: The digest of every beginning, from 0 characters on.
        sentences: The numbers of characters after which a line or sentence ends, in order.
    """
    starts = np.concatenate([[0], sentences[: _MOST_PARTS - 2], [len(digests) - 1]])
    stops = np.searchsorted(starts, starts + _SHORTEST_PART)
    has_key = stops < len(starts)
    stops = starts[np.minimum(stops, len(starts) - 1)]

    parts = np.zeros(len(starts), PART)
    parts["start"] = starts
    parts["digest"] = digests[starts]
    parts["key"] = np.where(has_key, (digests[stops] - digests[starts]) * inverses()[starts], 0)
    return parts


def _texts_of(row: Row) -> tuple[str, str]:
    """Return the text of a row's prompt, without the system message, and that of its answer."""
    fields = row.fields
    if "text" in fields:
        return "", "\n" + _read_json_chat(fields["text"])
    if "messages" not in fields:
        return fields["prompt"], f"\n{fields['completion']}"

    messages = [message for message in fields["messages"] if message["role"] != "system"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    contents = [answer_of(message) for message in messages]
    return "\n".join(contents[:last]), "\n" + "\n".join(contents[last:])


def _read_json_chat(text: str) -> str:
    """Return the contents of a chat that a text holds as JSON; any other text as it is."""
    value: Any = parse_json(text)
    chat: Any = value.get("messages") if isinstance(value, dict) else value
    if not is_chat(chat):
        return text
    messages = [each for each in chat if each.get("role", each.get("from")) != "system"]
    return "\n".join(str(each.get("content", each.get("value"))) for each in messages)


def _plain_parts(prompt: str, answer: str) -> tuple[str, str, str]:
    """Return three parts of a row's text, in lower case and without markup.

    Of a longer text, only the first 2 * ``LONGEST`` characters are used.

    Returns:
        What comes before the first turn of a rendered chat, the rest of the prompt, and the answer.
        In a row without a prompt, the last is empty.
    """
    if not prompt:
        prompt, answer = answer, ""

    # LONGEST does not count white space, so that limit alone would not bound the work. A » between
    # turns must not become a quotation mark
    answer = answer[: max(0, 2 * LONGEST - len(prompt))]
    prompt, answer = (
        fold_text(each[: 2 * LONGEST].replace(" » ", " → ")) for each in (prompt, answer)
    )
    start = start_of_turns(prompt)
    head = f"{plain_turns(prompt[:start])}\n" if start else ""
    return head, plain_turns(prompt[start:]), plain_turns(answer)


def _characters(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<U1")


def _ends(characters: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the lengths of the beginnings that end at a word, sentence, line or tag, in order.

    Args:
        characters: All characters.
        kept: The indices of those that are not white space.

    Returns:
        All these lengths, those that end at a sentence, line or tag, and whether the first contain
        the ends of all words.
    """
    lines = np.cumsum((characters == "\n") | (characters == "\r"))[kept]
    letters = np.strings.isalnum(characters[kept])
    starts_tag = np.isin(characters[kept[1:]], list(_TAGS))

    # A full stop of Chinese or Japanese needs no white space after it
    before = characters[kept[:-1]]
    is_before_space = np.diff(kept) > 1
    ends_sentence = np.isin(before, list(_SENTENCE_ENDS)) & is_before_space
    ends_sentence |= np.isin(before, ["。", *_TAG_ENDS])

    # A word that ends with a colon counts as a role
    words = np.cumsum(np.diff(kept, prepend=-1) > 1)
    last_of_word = np.searchsorted(words, words, side="right") - 1
    is_role = characters[kept][last_of_word] == ":"

    # Compare each character with the next one
    ends_line = (lines[1:] != lines[:-1]) | starts_tag | (is_role[1:] & is_before_space)
    ends_word = ends_line | is_before_space | ~letters[1:] | ~letters[:-1]
    ends_word |= _is_unspaced(characters[kept[1:]].view(np.uint32))
    word_ends = np.flatnonzero(ends_word) + 1
    sentences = np.flatnonzero(ends_line | ends_sentence) + 1

    # After the first words, only a few ends of words count
    has_all_words = len(word_ends) <= _WORD_ENDS
    if not has_all_words:
        marks = _marks()[: int(np.searchsorted(_marks(), len(word_ends)))]
        word_ends = np.concatenate([word_ends[:_WORD_ENDS], word_ends[marks]])
    return np.union1d(word_ends, sentences), sentences, has_all_words


def _is_unspaced(codes: np.ndarray) -> np.ndarray:
    """Return whether each character is of a writing system without spaces, (characters,) bool."""
    is_unspaced = np.zeros(len(codes), bool)
    if codes.max(initial=0) >= _UNSPACED[0][0]:
        for first, stop in _UNSPACED:
            is_unspaced |= (codes >= first) & (codes < stop)
    return is_unspaced


@cache
def _marks() -> np.ndarray:
    """Return the numbers of the words after ``_WORD_ENDS`` whose ends count, in order."""
    count = int(np.log(LONGEST / _WORD_ENDS) / np.log(17 / 16)) + 1
    return (_WORD_ENDS * (17 / 16) ** np.arange(count)).astype(np.int64)


def _mixed(codes: np.ndarray) -> np.ndarray:
    """Return a number for each character code that looks random, (characters,) uint64."""
    mixed = (codes + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    return mixed * np.uint64(0x94D049BB133111EB)


@cache
def powers() -> np.ndarray:
    """Return the powers of b from 0 to ``LONGEST``, mod 2^64."""
    return _powers_of(_BASE)


@cache
def inverses() -> np.ndarray:
    """Return the inverse of each of the ``powers``."""
    return _powers_of(pow(_BASE, -1, 2**64))


def _powers_of(base: int) -> np.ndarray:
    factors = np.full(LONGEST + 1, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
