"""Compute digests of a row's text, which are used to find duplicates and leaks."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .fold_text import fold_text
from .rows import Row

# A user's first message with at most this many characters, without white space, may be a greeting
_LONGEST_GREETING = 32


class RowDigests(NamedTuple):
    """Digests of a row's messages.

    Attributes:
        row: Digest of the whole row.
        prompt: Digest of everything before the last answer.
        opening: Digest of the messages up to and including the user's first one. Rows that are
            prefixes of the same conversation have the same opening.
        deeper: Digest of the messages up to and including the user's second one if the first one
            may be a greeting, or 0.
        is_single: Whether the prompt holds no earlier answer.
    """

    row: int
    prompt: int
    opening: int
    deeper: int = 0
    is_single: bool = True


def row_digests(row: Row) -> RowDigests:
    """Return the digests of a row.

    A prompt and its completion count as a chat of one turn. Conversations that only share a system
    message have different openings. For a row without a prompt, all digests are that of the row. A
    row with two answers differs if either answer does. White space, case and what ``fold_text``
    ignores do not count.
    """
    if row.rejected is not None:
        chosen = row_digests(replace(row, rejected=None))
        rejected = row_digests(row.rejected)
        return chosen._replace(row=_digest(f"{chosen.row} {rejected.row}"))

    if "text" in row.fields:
        whole = _digest(row.fields["text"])
        return RowDigests(whole, whole, whole)

    # The prompt is everything before the last answer.
    messages = _messages_of(row)
    tools = row.fields.get("tools")
    whole = _digest([messages, tools] if tools else messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompt = messages[: answers[-1]]
    if not any(message["role"] != "system" for message in prompt):
        return RowDigests(whole, whole, whole)

    opening = _beginning(prompt, 1)
    deeper = 0
    if len("".join(str(opening[-1][1]).split())) <= _LONGEST_GREETING:
        second = _beginning(prompt, 2)
        deeper = _digest(second) if len(second) > len(opening) else 0
    is_single = len(answers) == 1
    return RowDigests(whole, _digest(prompt), _digest(opening), deeper, is_single)


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


def _beginning(messages: Sequence[Mapping[str, Any]], count: int) -> list[list[Any]]:
    """Return the role and content of each message up to the user's first or second message.

    Without such a message, all messages are returned.
    """
    beginning: list[list[Any]] = []
    for message in messages:
        beginning.append([message["role"], message.get("content")])
        count -= message["role"] == "user"
        if not count:
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
