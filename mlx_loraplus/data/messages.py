"""Convert a chat's messages from any public form to OpenAI's, and report invalid messages.

A message has a role and a content. Three forms are accepted::

    OpenAI    {"role": "user", "content": "..."}
    ShareGPT  {"from": "human", "value": "..."}
    Gemini    {"role": "user", "parts": [{"text": "..."}]}

The content may also be a list of text parts, which are joined.

A message may have a field that switches its training on or off: "weight" with 0 or 1 (OpenAI,
Mistral), or "train", "training" (axolotl), "train_on" or "loss" (ms-swift) with a boolean, 0 or 1.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import DataError
from .thoughts import THOUGHT_KEYS, thought_places

ROLES = ("system", "user", "assistant", "tool")

OTHER_ROLES: Mapping[str, str] = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
"""Names of roles in public data sets, and the corresponding role in ``ROLES``."""

_ROLE_NAMES = dict(zip(ROLES, ROLES, strict=True)) | dict(OTHER_ROLES)

SWITCHES = ("weight", "train", "training", "train_on", "loss")
"""Message fields that switch training on the message on or off."""

OTHER_SWITCHES = (
    "loss_weight",
    "loss_mask",
    "loss_scale",
    "mask",
    "masked",
    "trainable",
    "train_detail",
)
"""Message fields that look like switches, but have another meaning in each program."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that hold text."""

NEEDED_FIELDS = frozenset({"role", "content", "tool_calls", *THOUGHT_KEYS})
"""Message fields whose content is trained on, or that say whose it is."""

_KNOWN_FIELDS = (*NEEDED_FIELDS, "name", "tool_call_id")

_NAMED_FIELDS = (*_KNOWN_FIELDS, *OTHER_SWITCHES)

_TYPE_NAMES: dict[type[Any], str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}

T = TypeVar("T")


class BadRowError(DataError):
    """A row that can't be used. The message gives the reason; the caller adds the location."""


class MissingFieldsError(BadRowError):
    """A row that lacks fields, or that can't have any, because it is no JSON object."""


@dataclass(frozen=True)
class Chat:
    """Messages in OpenAI's form."""

    messages: list[dict[str, Any]]
    untrained: tuple[int, ...]  # indices of the assistant messages that must not be trained on
    notes: tuple[str, ...]


def read_chat(chat: object, name: str) -> Chat:
    """Convert the messages in a row's field to OpenAI's form.

    Args:
        chat: A list of messages, or a JSON string that contains one.
        name: The field's name, for error messages.

    Raises:
        BadRowError: The list is empty or a message can't be used.
    """
    chat = parse_json(chat)
    if isinstance(chat, str) and chat.lstrip().startswith(("[{'", '[{"')):
        raise BadRowError(
            f"{name!r} is text that is no JSON, perhaps a list as Python writes it; write it with"
            " json.dumps, or save the rows as JSON lines or Parquet"
        )
    values = check_type(chat, list, repr(name))
    if not values:
        raise BadRowError(f"{name!r} is empty")

    messages: list[dict[str, Any]] = []
    untrained: list[int] = []
    notes: list[str] = []

    for number, value in enumerate(values):
        # Remove the switch first, so that it is not passed to the chat template.
        place = f"{name}[{number}]"
        fields = _without_nulls(check_type(value, dict, place))
        switch = _pop_switch(fields, place)
        message = _to_openai(fields, place)
        role = message["role"]

        # A prompt in generation has no empty system message. Other fields, such as the tools of
        # Phi 4 mini, make it one that is not empty.
        is_plain = message.keys() <= {"role", "content"}
        if role == "system" and is_plain and not message["content"].strip():
            notes.append("empty system messages are left out")
            continue
        messages.append(message)

        # Only assistant messages can be trained on.
        if switch is False and role == "assistant":
            untrained.append(len(messages) - 1)
        if switch and role != "assistant":
            notes.append(
                f"{role} messages marked for training are not trained on; only assistant messages"
                " are"
            )

        # A chat template reads the thoughts in one place.
        places = thought_places(message)
        if role == "assistant" and len(places) > 1:
            notes.append(
                f"messages have different thoughts in {' and in '.join(places)}, and the chat"
                " template may leave out all but those of one place"
            )

        # The chat template may use other fields, but no template reads weights.
        weights = ", ".join(repr(key) for key in message if key in OTHER_SWITCHES)
        if weights:
            notes.append(
                f"message fields without effect: {weights}; to exclude a message from training,"
                " give it weight 0"
            )
        unknown = ", ".join(repr(key) for key in message if key not in _NAMED_FIELDS)
        if unknown:
            notes.append(f"message fields that only the chat template may use: {unknown:.300}")

    return Chat(messages, tuple(untrained), tuple(dict.fromkeys(notes)))


def is_chat(value: object) -> bool:
    """Return whether a row's field holds messages, either as a list or as a JSON string."""
    value = parse_json(value)
    if not isinstance(value, list) or not value:
        return False
    return all(_has_role(message) for message in value)


def assistant_turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the indices of the assistant messages."""
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _has_role(message: object) -> bool:
    return isinstance(message, dict) and ("role" in message or "from" in message)


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without its missing fields.

    In a table, every message has all columns, and missing fields are null or NaN. The content is
    kept, because it may be null in a message with tool calls.
    """
    present = {name: value for name, value in message.items() if not is_missing(value)}
    if "content" in message:
        present["content"] = message["content"]
    return present


def is_missing(value: object) -> bool:
    """Return whether a value is null or NaN, which tables store for null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _pop_switch(message: dict[str, Any], place: str) -> bool | None:
    """Remove a message's training switches and return their value, or None if it has none."""
    switches: dict[str, bool] = {}

    for name in SWITCHES:
        if name not in message:
            continue
        value = message.pop(name)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRowError(
                f"{place} has {name} {value!r:.40}; use 0 or false to exclude the message from"
                " training, 1 or true to include it"
            )
        switches[name] = bool(value)

    # A message may have several switches as long as they agree.
    if len(set(switches.values())) > 1:
        found = " and ".join(f"{name} {str(value).lower()}" for name, value in switches.items())
        raise BadRowError(f"{place} has {found}, which contradict each other; keep one of them")
    return next(iter(switches.values()), None)


def _to_openai(fields: dict[str, Any], place: str) -> dict[str, Any]:
    """Return one message in OpenAI's form, built from the fields of any form."""
    # Read the role and the content first; each has several possible names.
    role = _pop_role(fields, place)
    content = _pop_content(fields, place)
    message = {"role": role, "content": content, **fields}

    # OpenAI's older form has a single function_call.
    if role == "assistant" and "function_call" in message and "tool_calls" not in message:
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]

    calls = parse_json(message.get("tool_calls"))
    if calls:
        if not isinstance(calls, list):
            raise BadRowError(f"{place} has tool_calls that are {type_name(calls)}, not a list")
        message["tool_calls"] = [_read_tool_call(call, place) for call in calls]

    # Only an assistant message with tool calls may omit the content.
    if role == "assistant" and content is None and calls:
        return message
    if not isinstance(content, str):
        raise BadRowError(_describe_content(message, place))
    if role == "assistant" and not content.strip() and not calls:
        raise BadRowError(f"{place} (assistant) has empty content")
    return message


def _describe_content(message: Mapping[str, Any], place: str) -> str:
    """Return what is wrong with a content that is not a string, and where the text may be."""
    content = message["content"]
    problem = f"{place} ({message['role']}) has {type_name(content)} as content, not a string"
    others = [name for name, value in message.items() if name != "role" and _is_text(value)]
    if content is None and others:
        problem += f"; if {others[0]!r:.40} holds its text, move that to 'content'"
    return problem


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _pop_role(fields: dict[str, Any], place: str) -> str:
    """Remove the role from a message's fields and return its name in ``ROLES``."""
    sharegpt_role = fields.pop("from", None)
    role = fields.pop("role", sharegpt_role)

    name = _ROLE_NAMES.get(role.strip().lower()) if isinstance(role, str) else None
    if name is None:
        raise BadRowError(
            f"{place} has the role {role!r:.40}; allowed roles are {', '.join(ROLES)}"
        )
    return name


def _pop_content(fields: dict[str, Any], place: str) -> Any:
    """Remove the content from a message's fields and return it, with its parts joined."""
    sharegpt_value = fields.pop("value", None)
    gemini_parts = fields.pop("parts", None)
    content = fields.pop("content", None)

    if content is None:
        content = gemini_parts if sharegpt_value is None else sharegpt_value
    if isinstance(content, list):
        return _join_parts(content, place)
    return content


def _join_parts(parts: Sequence[Any], place: str) -> str:
    """Return the text of a content that is a list of parts.

    A part is {"type": "text", "text": "..."}, {"text": "..."} or a string.
    """
    texts: list[str] = []

    for number, part in enumerate(parts):
        if isinstance(part, str):
            texts.append(part)
            continue

        fields: dict[str, Any] = part if isinstance(part, dict) else {}
        if fields.get("type", "text") in TEXT_PARTS and isinstance(fields.get("text"), str):
            texts.append(fields["text"])
            continue

        # Images, audio and other media can't be trained on.
        kind = fields.get("type")
        found = f"of type {kind!r}" if isinstance(kind, str) else type_name(part)
        raise BadRowError(
            f"{place}: content part {number} is {found:.60}; only text can be trained on, so remove"
            " this part"
        )

    return "".join(texts)


def _read_tool_call(call: Any, place: str) -> dict[str, Any]:
    """Return a tool call whose arguments are an object, as chat templates expect.

    OpenAI gives the arguments as a JSON string. The function may have a wrapper, as in
    {"type": "function", "function": {...}}.
    """
    function: Any = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise BadRowError(f"{place} has a tool call without a function name")

    # A call without arguments has an empty object.
    arguments = parse_json(function.get("arguments") or {})
    if not isinstance(arguments, dict):
        raise BadRowError(
            f"{place} calls {name:.40} with arguments that are not a JSON object: {arguments!r:.80}"
        )
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def parse_json(value: object) -> object:
    """Parse a string that holds a JSON list or object; return any other value unchanged.

    Tables store lists and objects as JSON strings.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def check_type(value: Any, kind: type[T], what: str) -> T:
    """Return the value if it has the type ``kind``.

    Raises:
        BadRowError: The value has another type. The error message uses ``what`` as its name.
    """
    if not isinstance(value, kind):
        raise BadRowError(f"{what} is {type_name(value)}, not {_TYPE_NAMES[kind]}")
    return value


def type_name(value: object) -> str:
    """Return the JSON name of a value's type with its article, such as "a list"."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
