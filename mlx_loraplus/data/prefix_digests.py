"""Compute digests of the beginnings of a row's text, which show whether a row continues another.

Conversations are often given as growing prefixes: one row's prompt and answer are the beginning of
the next row's prompt. Plain text has no messages to compare. The text of all messages is therefore
compared, ignoring white space, case and what ``fold_text`` ignores. A beginning counts if it

- has at least ``SHORTEST`` characters, and
- ends where one of the first ``_WORD_ENDS`` words ends, or a sentence or a line ends, or at either
  end of a tag, a symbol or a role such as ``User:``.

Of a text with more than ``_MOST`` beginnings, only the part up to the last of these is compared.
Markup and code have an end at every tag, so that this part is shorter than of prose. Texts that are
equal up to there may differ afterwards, which is why ``TextDigests.is_whole`` is stored.

The digest of a text's first n characters is Σ (c_i + 1) r_i mod 2^64, with the character codes c_i
and fixed random numbers r_i. All beginnings of a text therefore cost one cumulative sum. The system
message is not a part of the text.
"""

import hashlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .row_digests import fold_text
from .rows import Row

SHORTEST = 16  # characters of a beginning, without white space
LONGEST = 2**16  # characters of a text that are compared
_WORD_ENDS = 64  # beginnings of a text that may end at any word
_MOST = 1024  # beginnings of a text
_TAGS = "<[{#|→⇒•◆■▶§"  # characters that often begin a turn
_TAG_ENDS = ">]"
_SENTENCE_ENDS = ".!?:|}→⇒"  # followed by white space


class TextDigests(NamedTuple):
    """Digests of a row's text.

    Attributes:
        text: Digest of the text, or of the part of a long text that is compared; 0 if it is too
            short.
        is_whole: Whether all of the text is compared.
        prompt: Digest of the prompt, or 0 if it is too short or too long.
        beginnings: Digests of the beginnings that count, shortest first, (beginnings,) uint64.
    """

    text: int
    is_whole: bool
    prompt: int
    beginnings: np.ndarray


def text_digests(row: Row) -> TextDigests:
    """Return the digests of a row's text; of two answers, the chosen one counts."""
    prompt, answer = _texts_of(row)
    characters = _characters(prompt + answer)
    kept = np.flatnonzero(~np.strings.isspace(characters))
    is_short = len(prompt + answer) <= 2 * LONGEST and len(kept) <= LONGEST
    kept = kept[:LONGEST]
    if len(kept) < SHORTEST:
        return TextDigests(0, is_short, 0, np.zeros(0, np.uint64))

    # The digest of every beginning
    codes = characters.view(np.uint32)[kept].astype(np.uint64) + np.uint64(1)
    digests = np.cumsum(codes * _multipliers()[: len(kept)])

    # The beginnings that count, without the whole text
    ends = _ends(characters, kept)
    ends = ends[ends >= SHORTEST]
    has_all_ends = len(ends) < _MOST
    compared = len(kept) if has_all_ends else int(ends[_MOST - 1])
    ends = ends[ends < compared]

    # The digest of the prompt, which may end anywhere
    length = int(np.count_nonzero(~np.strings.isspace(_characters(prompt))))
    is_compared = SHORTEST <= length < compared
    prompt_digest = int(digests[length - 1]) if is_compared else 0
    is_whole = is_short and has_all_ends
    return TextDigests(int(digests[compared - 1]), is_whole, prompt_digest, digests[ends - 1])


def _texts_of(row: Row) -> tuple[str, str]:
    """Return the text of a row's prompt, without the system message, and that of its answer."""
    fields = row.fields
    if "messages" not in fields:
        answer = fields["text"] if "text" in fields else fields["completion"]
        return fields.get("prompt", ""), f"\n{answer}"

    messages = [message for message in fields["messages"] if message["role"] != "system"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    contents = [_content(message) for message in messages]
    return "\n".join(contents[:last]), "\n" + "\n".join(contents[last:])


def _content(message: dict[str, Any]) -> str:
    return str(message.get("content") or "")


def _characters(text: str) -> np.ndarray:
    """Return the characters of a text in lower case, (characters,) <U1.

    Of a longer text, only the first 2 * ``LONGEST`` characters are used.
    """
    # LONGEST does not count white space, so that limit alone would not bound the work. A » between
    # turns must not become a quotation mark
    folded = fold_text(text[: 2 * LONGEST].replace(" » ", " → "))
    return np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), "<U1")


def _ends(characters: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the lengths of the beginnings that end at a word, sentence, line or tag, in order.

    Args:
        characters: All characters.
        kept: The indices of those that are not white space.
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
    ends_word &= np.cumsum(ends_word) <= _WORD_ENDS
    return np.flatnonzero(ends_line | ends_sentence | ends_word) + 1


@cache
def _multipliers() -> np.ndarray:
    """Return the random numbers of the digests, which are the same on every machine."""
    random = hashlib.shake_256(b"mlx_loraplus beginnings").digest(8 * LONGEST)
    return np.frombuffer(random, "<u8")
