"""Write a chat in each of the forms that chat templates expect.

Templates expect different forms of three things: the arguments of a tool call (an object or a JSON
string), the content of a message that has only tool calls (empty or null), and thoughts (under a
key or inside the content).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from .thoughts import THOUGHT_KEYS, THOUGHT_TAGS, Message, answer_of, thoughts_of

ThoughtForm = Literal["given", "key", "inline"]


@dataclass(frozen=True)
class MessageForm:
    """One combination of the forms that templates expect."""

    json_arguments: bool  # whether a call's arguments are a JSON string
    empty_content: str | None  # the content of a message that has only tool calls
    thoughts: ThoughtForm  # unchanged, under a key, or inside the content
    thought_key: str
    thought_tags: tuple[str, str]  # around thoughts inside the content

    def write(self, message: Message) -> dict[str, Any]:
        """Return a message in this form."""
        # Write the content and the arguments of tool calls.
        written = dict(message)
        calls = message.get("tool_calls")
        if calls:
            written["content"] = message.get("content") or self.empty_content
        if calls and self.json_arguments:
            written["tool_calls"] = [_with_json_arguments(call) for call in calls]

        thoughts = thoughts_of(message)
        if self.thoughts == "given" or not thoughts:
            return written

        # Move the thoughts to where this form has them.
        is_inline = bool(thoughts_of({"content": message.get("content")}))
        content: str | None = answer_of(message)
        if is_inline:
            thoughts, content = thoughts.strip("\n"), content.lstrip("\n")
        for key in THOUGHT_KEYS:
            written.pop(key, None)
        if self.thoughts == "inline":
            opening, closing = self.thought_tags
            written["content"] = f"{opening}\n{thoughts}\n{closing}\n\n{content}"
            return written

        if calls and not content:
            content = self.empty_content
        written["content"] = content
        written[self.thought_key] = thoughts
        return written


def chat_forms(
    messages: Sequence[Message],
    thought_key: str | None,
    thought_tags: tuple[str, str] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield a chat in each form that templates expect, beginning with the most common form.

    Args:
        messages: The messages in OpenAI's form.
        thought_key: The message key that the template reads thoughts from, if it is known.
        thought_tags: The tags that the template writes around thoughts, if it has any.
    """
    tags = thought_tags or THOUGHT_TAGS[0]

    # Vary only the parts that this chat contains.
    json_arguments: Sequence[bool] = [False]
    empty_contents: Sequence[str | None] = [""]
    thought_forms: Sequence[ThoughtForm] = ["given"]
    if any(message.get("tool_calls") for message in messages):
        json_arguments = [False, True]
        empty_contents = ["", None]
    if any(thoughts_of(message) for message in messages):
        # A template's own key and tags come first, so that they replace other tags in the content.
        own_key: Sequence[ThoughtForm] = ["key"] if thought_key is not None else []
        has_other_tags = any(_has_other_tags(message, thought_tags) for message in messages)
        is_inline = tags != THOUGHT_TAGS[0] or has_other_tags
        own_tags: Sequence[ThoughtForm] = ["inline"] if is_inline else []
        thought_forms = [*own_key, *own_tags, "given", "key", "inline"]

    # Skip forms that are equal for this chat.
    seen: list[list[dict[str, Any]]] = []
    for choice in product(json_arguments, empty_contents, thought_forms):
        form = MessageForm(*choice, thought_key=thought_key or THOUGHT_KEYS[0], thought_tags=tags)
        chat = [form.write(message) for message in messages]
        if chat not in seen:
            seen.append(chat)
            yield chat


def _has_other_tags(message: Message, tags: tuple[str, str] | None) -> bool:
    """Return whether a message has thoughts in its content between other tags than these."""
    content = str(message.get("content") or "")
    return tags is not None and tags[1] not in content and bool(thoughts_of({"content": content}))


def _with_json_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as a JSON string."""
    function = dict(call.get("function", call))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": function} if "function" in call else function
