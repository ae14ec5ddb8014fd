"""Bring a chat into each of the forms that chat templates expect.

Templates expect different forms of four things: the arguments of a tool call (an object or a JSON
string), its id, the content of a message that has only tool calls (empty or null), and thoughts
(under a key or inside the content). Some templates have no place for thoughts: the messages then
have none, and the thoughts are put before the rendered answer. Others have a place for the thoughts
of some messages only, such as those with tool calls.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from .thoughts import THOUGHT_KEYS, Message, ThoughtBlock, answer_of, thoughts_of

ThoughtForm = Literal["given", "key", "inline", "key or before", "before"]

CALL_ID = "functions.{name}:{number}"
"""The id of a tool call in Kimi K2's templates, which render no other name of the function."""


@dataclass(frozen=True)
class ChatForm:
    """A chat in one form that a chat template may expect."""

    messages: Sequence[Message]
    # by message index, the thoughts to put before the rendered answer if they are not in it
    thoughts: Mapping[int, str]


@dataclass(frozen=True)
class MessageForm:
    """One combination of the forms that templates expect."""

    json_arguments: bool  # whether a call's arguments are a JSON string
    empty_content: str | None  # the content of a message that has only tool calls
    thoughts: ThoughtForm  # unchanged, under a key, inside the content, or removed ("before")
    thought_key: str
    thought_block: ThoughtBlock  # how thoughts are rendered inside the content

    def apply(self, message: Message) -> dict[str, Any]:
        """Return a message in this form."""
        # Set the content and the arguments of tool calls.
        formed = dict(message)
        calls = message.get("tool_calls")
        if calls:
            formed["content"] = message.get("content") or self.empty_content
        if calls and self.json_arguments:
            formed["tool_calls"] = [_with_json_arguments(call) for call in calls]

        thoughts = thoughts_of(message)
        if self.thoughts == "given" or not thoughts:
            return formed

        # Move the thoughts to where this form has them.
        is_inline = bool(thoughts_of({"content": message.get("content")}))
        content: str | None = answer_of(message)
        if is_inline:
            thoughts, content = thoughts.strip("\n"), content.lstrip("\n")
        for key in THOUGHT_KEYS:
            formed.pop(key, None)
        if self.thoughts == "inline":
            formed["content"] = self.thought_block.render(thoughts) + content
            return formed

        if calls and not content:
            content = self.empty_content
        formed["content"] = content
        if self.thoughts != "before":
            formed[self.thought_key] = thoughts
        return formed


def chat_forms(
    messages: Sequence[Message], thought_key: str | None, thought_block: ThoughtBlock
) -> Iterator[ChatForm]:
    """Yield a chat in each form that templates expect, beginning with the most common form.

    Args:
        messages: The messages in OpenAI's form.
        thought_key: The message key that the template reads thoughts from, if it is known.
        thought_block: How thoughts are rendered inside the content.
    """
    # Vary only the parts that this chat contains.
    json_arguments: Sequence[bool] = [False]
    empty_contents: Sequence[str | None] = [""]
    chats = [messages]
    if any(message.get("tool_calls") for message in messages):
        json_arguments = [False, True]
        empty_contents = ["", None]
        chats.append(_with_names_as_ids(messages))
    thought_forms: Sequence[ThoughtForm] = ["given"]
    if any(thoughts_of(message) for message in messages):
        thought_forms = _thought_forms(messages, thought_key, thought_block)

    # Skip forms that are equal for this chat.
    seen: list[ChatForm] = []
    key = thought_key or THOUGHT_KEYS[0]
    for chat, as_json, empty, thoughts_form in product(
        chats, json_arguments, empty_contents, thought_forms
    ):
        form = MessageForm(as_json, empty, thoughts_form, key, thought_block)
        is_added = form.thoughts in ("key or before", "before")
        thoughts = _thoughts_by_turn(chat) if is_added else {}
        formed = ChatForm([form.apply(message) for message in chat], thoughts)
        if formed not in seen:
            seen.append(formed)
            yield formed


def _thought_forms(
    messages: Sequence[Message], thought_key: str | None, block: ThoughtBlock
) -> list[ThoughtForm]:
    """Return the forms of thoughts to try.

    A template's own key and tags come first, so that they replace other tags in the content. A
    template that reads a key and has no tags, as that of gpt-oss, renders thoughts in another way.
    """
    if thought_key is not None and not block.is_own:
        return ["key"]
    forms: list[ThoughtForm] = []
    if thought_key is not None:
        forms.append("key")
    has_other_tags = any(_has_other_tags(message, block) for message in messages)
    if block.is_own and (not block.is_usual or has_other_tags):
        forms.append("inline")
    forms.extend(("given", "key", "inline"))
    if thought_key is not None:
        forms.append("key or before")
    return [*forms, "before"]


def _thoughts_by_turn(messages: Sequence[Message]) -> dict[int, str]:
    """Return the thoughts of the messages that have any, with the messages' indices."""
    all_thoughts = {number: thoughts_of(message) for number, message in enumerate(messages)}
    return {number: thoughts for number, thoughts in all_thoughts.items() if thoughts}


def _has_other_tags(message: Message, block: ThoughtBlock) -> bool:
    """Return whether a message has thoughts in its content between other tags than these."""
    content = str(message.get("content") or "")
    return block.closing not in content and bool(thoughts_of({"content": content}))


def _with_names_as_ids(messages: Sequence[Message]) -> list[Message]:
    """Return a chat whose tool calls have the functions' names and a number as ids."""
    renamed: list[Message] = []
    waiting: list[tuple[Any, str]] = []  # old and new ids of the calls that have no result yet
    number = 0

    for message in messages:
        new_fields: dict[str, Any] = {}
        calls = message.get("tool_calls")
        if calls:
            waiting = []
            for call in calls:
                name = call.get("function", call).get("name")
                waiting.append((call.get("id"), CALL_ID.format(name=name, number=number)))
                number += 1
            named = [call | {"id": new} for call, (_, new) in zip(calls, waiting, strict=True)]
            new_fields["tool_calls"] = named

        # Without an id, results are in the order of their calls.
        elif message["role"] == "tool" and waiting:
            old_ids = [old for old, _ in waiting]
            old_id = message.get("tool_call_id")
            place = old_ids.index(old_id) if old_id in old_ids else 0
            new_fields["tool_call_id"] = waiting.pop(place)[1]
        renamed.append({**message, **new_fields})

    return renamed


def _with_json_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as a JSON string."""
    function = dict(call.get("function", call))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": function} if "function" in call else function
