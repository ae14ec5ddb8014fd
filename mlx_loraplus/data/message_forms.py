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
        calls = written.get("tool_calls")
        if calls:
            written["content"] = written.get("content") or self.empty_content
        if calls and self.json_arguments:
            written["tool_calls"] = [_with_json_arguments(call) for call in calls]

        thoughts = thoughts_of(message)
        if self.thoughts == "given" or not thoughts:
            return written

        # Thoughts move from wherever the row has them.
        content = answer_of(message)
        written = {key: value for key, value in written.items() if key not in THOUGHT_KEYS}
        if self.thoughts == "inline":
            written["content"] = f"<think>\n{thoughts}\n</think>\n\n{content}"
            return written
        written["content"] = self.empty_content if calls and not content else content
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
    has_calls = any(message.get("tool_calls") for message in messages)
    has_thoughts = any(thoughts_of(message) for message in messages)

    # Only what the chat has is varied.
    thought_forms: Sequence[ThoughtForm] = (
        ("given", "key", "inline") if has_thoughts else ("given",)
    )
    choices = product(
        (False, True) if has_calls else (False,),
        ("", None) if has_calls else ("",),
        thought_forms,
    )

    seen: list[list[dict[str, Any]]] = []
    for json_arguments, empty_content, thoughts in choices:
        form = MessageForm(json_arguments, empty_content, thoughts, thought_key or THOUGHT_KEYS[0])
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
