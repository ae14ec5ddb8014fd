"""A chat's messages, in whatever public form, become OpenAI's, or what is wrong with them is said.

A message has a role and a content: {"role": "user", "content": "..."}, ShareGPT's {"from": "human",
"value": "..."}, or Gemini's {"role": "user", "parts": [{"text": "..."}]}. A content may be a list
of text parts, which are joined.

A message may say whether it is learned: "weight" 0 or 1 (OpenAI, Mistral), or "train", "training"
(axolotl) or "loss" (ms-swift) as a boolean, 0 or 1.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import DataError

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES: Mapping[str, str] = {
    "developer": "system",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(
        ("gpt", "chatgpt", "bing", "bard", "function_call", "model", "bot", "ai"), "assistant"
    ),
    **dict.fromkeys(("function", "observation", "function_response", "ipython"), "tool"),
}
SWITCHES = ("weight", "train", "training", "train_on", "loss")  # whether a message is learned
TEXT_PARTS = ("text", "input_text", "output_text")
_KNOWN = (
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking",
)  # fmt: skip
_TYPES: dict[type[Any], str] = {
    dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number",
    type(None): "null",
}  # fmt: skip
Of = TypeVar("Of")


class BadRowError(DataError):
    """What is wrong with one row, without its place."""


@dataclass(frozen=True)
class Chat:
    """Messages in OpenAI's form."""

    messages: list[dict[str, Any]]
    untrained: tuple[int, ...]  # assistant messages that must not be learned
    notes: tuple[str, ...]


def read_chat(chat: object, name: str) -> Chat:
    """Check the messages in a row's field ``name``, a list or JSON of one.

    Raises: BadRowError where a message can't be used, or there is none.
    """
    given = check_message(parsed(chat), list, repr(name))
    if not given:
        raise BadRowError(f"{name!r} is empty")
    messages, untrained, notes = [], [], {}

    for number, value in enumerate(given):
        place = f"{name}[{number}]"
        named = _without_nulls(check_message(value, dict, place))
        learned = _is_learned(named, place)
        message = _message(named, place)
        if learned is False and message["role"] == "assistant":
            untrained.append(number)
        if learned and message["role"] != "assistant":
            note = (
                f"{message['role']} messages that ask to be learned are not: only assistant"
                " turns are"
            )
            notes.setdefault(note)
        unknown = ", ".join(repr(key) for key in message if key not in _KNOWN)
        if unknown:
            notes.setdefault(f"message fields that only the chat template may use: {unknown:.300}")
        messages.append(message)
    return Chat(messages, tuple(untrained), tuple(notes))


def is_chat(value: object) -> bool:
    """Tell whether a row's field holds messages, as a list or as JSON of one."""
    value = parsed(value)
    return isinstance(value, list) and bool(value) and all(
        isinstance(message, dict) and not {"role", "from"}.isdisjoint(message) for message in value
    )  # fmt: skip


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without what a table adds to every message as null, and NaN where a number is missing."""
    return {
        name: value for name, value in message.items() if name == "content" or not is_missing(value)
    }


def is_missing(value: object) -> bool:
    """Tell whether a value stands for none: null, or the NaN that tables write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_learned(message: dict[str, Any], place: str) -> bool | None:
    """Take from a message what says whether it is learned; None where nothing does."""
    wishes: dict[str, bool] = {}
    for name in SWITCHES:
        if name not in message:
            continue
        value = message.pop(name)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRowError(
                f"{place} has {name} {value!r:.40}: give 0 or false (not learned), 1 or true"
                " (learned)"
            )
        wishes[name] = bool(value)
    if len(set(wishes.values())) > 1:
        said = " and ".join(f"{name} {str(wish).lower()}" for name, wish in wishes.items())
        raise BadRowError(f"{place} has {said}, which contradict each other: keep one of them")
    return next(iter(wishes.values()), None)


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
    """Return one message in OpenAI's form."""
    # The role and the content, by whatever name they have
    given = message.pop("from", None)
    role = message.pop("role", given)
    others = [message.pop(name) for name in ("value", "parts") if name in message]
    content = message.pop("content", None)
    if content is None and others:
        content = others[0]
    if isinstance(role, str) and role not in ROLES:
        role = OTHER_ROLES.get(
            role.strip().lower(), role.strip().lower() if role.strip().lower() in ROLES else role
        )
    if role not in ROLES:
        raise BadRowError(f"{place} has the role {role!r:.40}; roles are {', '.join(ROLES)}")
    if isinstance(content, list):
        content = _joined(content, place)
    message = {"role": role, "content": content, **message}

    # What it calls
    if role == "assistant" and "function_call" in message and "tool_calls" not in message:
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise BadRowError(f"{place} has tool_calls that are no list")
        message["tool_calls"] = [_call(call, place) for call in calls]
    if role == "assistant" and content is None and calls:
        return message

    # What it says
    if not isinstance(content, str):
        raise BadRowError(f"{place} ({role}) has {type_name(content)} as content, not a string")
    if role == "assistant" and not content.strip() and not calls:
        raise BadRowError(f"{place} (assistant) has empty content")
    return message


def _joined(parts: Sequence[Any], place: str) -> str:
    """Return the text of a content that is a list of parts: {"type": "text", "text": "..."}, or strings."""
    texts = []
    for number, part in enumerate(parts):
        kind = (
            part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
        )
        if isinstance(part, str):
            texts.append(part)
        elif kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            what = repr(kind) if isinstance(kind, str) else type_name(part)
            raise BadRowError(
                f"{place} has a content part of the kind {what:.60} (its part {number}); only text"
                " can be trained on: leave it out"
            )
    return "".join(texts)


def _call(call: object, place: str) -> dict[str, Any]:
    """Return a tool call with its arguments as the object that chat templates expect; OpenAI writes it as a string."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if (
        not isinstance(call, dict)
        or not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
    ):
        raise BadRowError(f"{place} has a tool call without a function's name")
    called = function | {"arguments": parsed(function.get("arguments", {}))}
    return call | {"function": called} if "function" in call else called


def parsed(value: object) -> object:
    """Return the JSON in a string, since tables hold lists and objects so; anything else, and other strings, as is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def check_message(value: Any, kind: type[Of], what: str) -> Of:
    """Return a value of the type ``kind``, or raise BadRowError."""
    if not isinstance(value, kind):
        raise BadRowError(f"{what} is {type_name(value)}, not {_TYPES[kind]}")
    return value


def type_name(value: object) -> str:
    """Return what a value is, as in "a list"."""
    return _TYPES.get(type(value), f"a {type(value).__name__}")
