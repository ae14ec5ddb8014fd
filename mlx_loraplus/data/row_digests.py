"""Compute digests of a row's text, which are used to find duplicates and leaks."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .rows import Row

# Invisible characters, which do not count, and the plain forms of quotation marks and dashes
_INVISIBLE = (
    "\u00ad\u034f\u061c\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2061"
    "\u2062\u2063\u2064\u2066\u2067\u2068\u2069\ufe0e\ufe0f\ufeff"
)
_SINGLE_QUOTES = "\u2018\u2019\u201a\u201b\u2039\u203a\u00b4`"
_DOUBLE_QUOTES = "\u201c\u201d\u201e\u201f\u00ab\u00bb"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_PLAIN = str.maketrans(
    _SINGLE_QUOTES + _DOUBLE_QUOTES + _DASHES,
    "'" * len(_SINGLE_QUOTES) + '"' * len(_DOUBLE_QUOTES) + "-" * len(_DASHES),
    _INVISIBLE,
)


def row_digests(row: Row) -> tuple[int, int, int]:
    """Return digests of a row, of its prompt, and of the beginning of its conversation.

    A prompt and its completion count as a chat of one turn. The beginning of a conversation is its
    messages up to and including the user's first message. Rows that are prefixes of the same
    conversation therefore have the same beginning. Conversations that only share a system message
    have different beginnings. For a row without a prompt, all three digests are that of the row. A
    row with two answers differs if either answer does. White space, case and what ``fold_text``
    ignores do not count.
    """
    if row.rejected is not None:
        chosen, *prompt_digests = row_digests(replace(row, rejected=None))
        rejected, *_ = row_digests(row.rejected)
        return _digest(f"{chosen} {rejected}"), prompt_digests[0], prompt_digests[1]

    if "text" in row.fields:
        whole = _digest(row.fields["text"])
        return whole, whole, whole

    # The prompt is everything before the last answer.
    messages = _messages_of(row)
    tools = row.fields.get("tools")
    whole = _digest([messages, tools] if tools else messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompt = messages[: answers[-1]]
    if not any(message["role"] != "system" for message in prompt):
        return whole, whole, whole
    return whole, _digest(prompt), _digest(_beginning(prompt))


def _messages_of(row: Row) -> Sequence[Mapping[str, Any]]:
    """Return a row's messages; a prompt and its completion become a chat of one turn."""
    if "messages" in row.fields:
        return row.fields["messages"]

    messages: list[dict[str, str]] = []
    for role, name in (("system", "system"), ("user", "prompt"), ("assistant", "completion")):
        text = row.fields.get(name, "")
        if text.strip():
            messages.append({"role": role, "content": text})
    return messages


def system_of(row: Row) -> str:
    """Return a row's system message, or an empty text."""
    messages = row.fields.get("messages")
    if not messages:
        return row.fields.get("system", "")
    is_system = messages[0]["role"] == "system"
    return str(messages[0].get("content") or "") if is_system else ""


def exact_digest(text: str) -> int:
    """Return a 64-bit digest of a text; 0 for an empty one."""
    if not text:
        return 0
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _beginning(messages: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return the role and content of each message up to and including the user's first one."""
    beginning: list[list[Any]] = []
    for message in messages:
        beginning.append([message["role"], message.get("content")])
        if message["role"] == "user":
            break
    return beginning


def _digest(value: Any) -> int:
    """Return a 64-bit digest of a JSON value, ignoring white space, case and form in its texts."""
    text = json.dumps(_normalized(value), ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _normalized(value: Any) -> Any:
    """Return a JSON value whose texts have single spaces, lower case and one Unicode form."""
    if isinstance(value, str):
        return " ".join(fold_text(value).split())
    if isinstance(value, Mapping):
        return {key: _normalized(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_normalized(item) for item in value]
    return value


def fold_text(text: str) -> str:
    """Return a text in lower case and one Unicode form.

    It does not matter whether a character is composed, of full or half width, or a quotation mark
    or dash of another shape. Invisible characters are left out.
    """
    # NFKC turns an acute accent into a space and a mark, but a small dash into one of _PLAIN
    plain = unicodedata.normalize("NFKC", text.translate(_PLAIN)).translate(_PLAIN)
    return unicodedata.normalize("NFKC", plain).casefold()
