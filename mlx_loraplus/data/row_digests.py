"""Compute digests of a row's text, which are used to find duplicates and leaks."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .rows import Row


def row_digests(row: Row) -> tuple[int, int, int]:
    """Return digests of a row, of its prompt, and of the beginning of its conversation.

    The beginning of a conversation is its messages up to and including the user's first message.
    Rows that are prefixes of the same conversation therefore have the same beginning. Conversations
    that only share a system message have different beginnings. For a row without a prompt, all
    three digests are that of the row. A row with two answers differs if either answer does.
    """
    if row.rejected is not None:
        chosen, *prompt_digests = row_digests(replace(row, rejected=None))
        rejected, *_ = row_digests(row.rejected)
        return _digest(f"{chosen} {rejected}"), prompt_digests[0], prompt_digests[1]

    prompt: Any
    beginning: list[list[Any]]
    if "messages" in row.fields:
        messages = row.fields["messages"]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        prompt = messages[: answers[-1]]
        beginning = _beginning(prompt)
        whole = _digest(messages)
    else:
        prompt = row.fields.get("prompt", "")
        if not prompt.strip():
            prompt = ""
        beginning = [["user", prompt]]
        whole = _digest("\0".join(row.fields.values()))

    if not prompt:
        return whole, whole, whole
    return whole, _digest(prompt), _digest(beginning)


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
    """Return a 64-bit digest of a text or a JSON value, ignoring white space and case."""
    text = value
    if not isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    words = text.replace("\\n", " ").split()
    normalized = " ".join(words).casefold()
    return int.from_bytes(hashlib.blake2b(normalized.encode(), digest_size=8).digest())
