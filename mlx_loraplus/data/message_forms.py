"""Write a chat in each of the forms that chat templates expect.

Templates differ in the arguments of a tool call (an object or JSON), in the content of a message
that has only tool calls (empty or null), and in thoughts (under a key or inside the content).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from .thoughts import THOUGHT_KEYS, Message, answer_of, thoughts_of

ThoughtForm = Literal["given", "key", "inline"]


@dataclass(frozen=True)
class MessageForm:
    """One way to write what templates expect differently."""

    json_arguments: bool  # whether a call's arguments are a JSON string
    empty_content: str | None  # the content of a message that has only tool calls
    thoughts: ThoughtForm  # as the row gives them, under a key, or inside the content
    thought_key: str

    def write(self, message: Message) -> dict[str, Any]:
        """Return a message in this form."""
        written = dict(message)
        calls = message.get("tool_calls")
        if calls:
            written["content"] = message.get("content") or self.empty_content
        if calls and self.json_arguments:
            written["tool_calls"] = [_with_json_arguments(call) for call in calls]

        thoughts = thoughts_of(message)
        if self.thoughts == "given" or not thoughts:
            return written

        # Move the thoughts from wherever the row has them.
        content: str | None = answer_of(message)
        for key in THOUGHT_KEYS:
            written.pop(key, None)
        if self.thoughts == "inline":
            written["content"] = f"<think>\n{thoughts}\n</think>\n\n{content}"
            return written

        if calls and not content:
            content = self.empty_content
        written["content"] = content
        written[self.thought_key] = thoughts
        return written


def chat_forms(
    messages: Sequence[Message], thought_key: str | None
) -> Iterator[list[dict[str, Any]]]:
    """Yield a chat in each form that templates expect, the most common form first.

    Args:
        messages: In OpenAI's form.
        thought_key: The key under which the template looks for thoughts, if it is known.
    """
    # Only what the chat has is varied.
    json_arguments: Sequence[bool] = [False]
    empty_contents: Sequence[str | None] = [""]
    thought_forms: Sequence[ThoughtForm] = ["given"]
    if any(message.get("tool_calls") for message in messages):
        json_arguments = [False, True]
        empty_contents = ["", None]
    if any(thoughts_of(message) for message in messages):
        thought_forms = ["given", "key", "inline"]

    # Two forms of the same chat may be equal.
    seen: list[list[dict[str, Any]]] = []
    for choice in product(json_arguments, empty_contents, thought_forms):
        form = MessageForm(*choice, thought_key=thought_key or THOUGHT_KEYS[0])
        chat = [form.write(message) for message in messages]
        if chat not in seen:
            seen.append(chat)
            yield chat


def _with_json_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as a JSON string."""
    function = dict(call.get("function", call))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": function} if "function" in call else function
