"""Find the thoughts of an assistant message, and the tags around them in a prompt.

A message stores its thoughts under a separate key, such as ``reasoning_content``, or at the start
of its content, between tags such as ``<think>`` and ``</think>``.
"""

from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]

THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)
"""The tags that open and close a block of thoughts, in the templates of public models."""

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thoughts")
"""The keys of a message that may hold its thoughts."""


def thoughts_of(message: Message) -> str:
    """Return an assistant message's thoughts, from a separate key or from the content."""
    for key in THOUGHT_KEYS:
        thoughts = message.get(key)
        if isinstance(thoughts, str) and thoughts.strip():
            return thoughts
    return _split_content(message)[0]


def thought_places(message: Message) -> list[str]:
    """Return the places of a message that hold thoughts, without those that repeat others."""
    held = {key: message.get(key) for key in THOUGHT_KEYS}
    held["content"] = _split_content(message)[0]

    places: list[str] = []
    seen: set[str] = set()
    for place, thoughts in held.items():
        text = thoughts.strip() if isinstance(thoughts, str) else ""
        if text and text not in seen:
            places.append(place)
            seen.add(text)
    return places


def answer_of(message: Message) -> str:
    """Return a message's content without its thoughts."""
    return _split_content(message)[1]


def _split_content(message: Message) -> tuple[str, str]:
    """Return the thoughts at the start of a message's content, and the rest of the content.

    Later tags are ordinary text.
    """
    content = str(message.get("content") or "")

    for opening, closing in THOUGHT_TAGS:
        before, found, after = content.partition(closing)
        if not found:
            continue
        if before.lstrip().startswith(opening):
            return before.lstrip().removeprefix(opening), after

        # The opening tag may be part of the prompt. The closing tag is then on a separate line.
        ends_line = before.endswith("\n") or after.startswith("\n")
        if ends_line and opening not in content:
            return before, after

    return "", content


def find_open_tags(prompt: str) -> tuple[str, str] | None:
    """Return the tags of a block of thoughts that is opened at the end of a prompt, or None."""
    for opening, closing in THOUGHT_TAGS:
        if prompt.rstrip().endswith(opening):
            return opening, closing
    return None


def remove_thought_tags(text: str) -> str:
    """Return a text without the tags around thoughts."""
    for opening, closing in THOUGHT_TAGS:
        text = text.replace(opening, "").replace(closing, "")
    return text


def is_empty_block(text: str) -> bool:
    """Return whether a text contains only white space and the tags around thoughts."""
    return not remove_thought_tags(text).strip()
