"""Rows that hold a chat: a list of messages, or a prompt and a completion that are messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from .messages import (
    BadRowError,
    Chat,
    assistant_turns,
    check_type,
    is_chat,
    parse_json,
    read_chat,
)
from .row_kinds import REQUIRED, Kind
from .thoughts import Message


def find_chat(kind: Kind, fields: Mapping[str, Any]) -> Chat | None:
    """Return a row's chat with its system message, or None if the row holds plain text.

    Raises:
        BadRowError: The messages are not valid, or none of them can be trained on.
    """
    if kind in ("chat", "sharegpt"):
        name = REQUIRED[kind][0]
        chat = read_chat(fields[name], name)
    elif kind == "completion" and any(_holds_messages(fields[name]) for name in REQUIRED[kind]):
        chat = _join_completion(fields)
    else:
        return None

    _check_turns(chat)
    return _add_system(chat, fields)


def chat_fields(chat: Chat, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the common form of a chat, with the row's tools if it has any."""
    content: dict[str, Any] = {"messages": chat.messages}
    tools = check_type(parse_json(fields.get("tools") or []), list, "'tools'")
    if tools:
        content["tools"] = tools
    return content


def _join_completion(fields: Mapping[str, Any]) -> Chat:
    """Return a prompt and a completion as one chat in which only the completion is trained on."""
    prompt = _read_messages(fields["prompt"], "prompt", "user")
    completion = _read_messages(fields["completion"], "completion", "assistant")
    answers, untrained = completion.messages, completion.untrained
    if not assistant_turns(answers):
        raise BadRowError("no assistant turn in 'completion', so there is nothing to train on")

    # If the completion begins with the prompt, perhaps without its system message, it is the whole
    # chat.
    question = [message for message in prompt.messages if message["role"] != "system"]
    repeated = 0
    for beginning in (prompt.messages, question):
        if _are_alike(answers[: len(beginning)], beginning):
            repeated = len(beginning)
            break
    answers = answers[repeated:]
    untrained = tuple(number - repeated for number in untrained if number >= repeated)

    role = answers[0]["role"] if answers else ""
    is_asked = bool(question) and question[-1]["role"] == "user"
    if role in ("system", "user") and is_asked:
        raise BadRowError(
            f"'completion' begins with a {role} message, although 'prompt' has the question; leave"
            " out the prompt, or begin 'completion' with the assistant's message"
        )
    offset = len(prompt.messages)

    # Assistant messages in the prompt are not trained on.
    in_prompt = assistant_turns(prompt.messages)
    in_completion = (offset + number for number in untrained)
    return Chat(
        [*prompt.messages, *answers],
        (*in_prompt, *in_completion),
        (*prompt.notes, *completion.notes),
    )


def _are_alike(messages: Sequence[Message], others: Sequence[Message]) -> bool:
    """Return whether messages are equal, except for white space around their contents."""

    def stripped(message: Message) -> dict[str, Any]:
        return {**message, "content": str(message["content"] or "").strip()}

    return list(map(stripped, messages)) == list(map(stripped, others))


def _read_messages(value: Any, name: str, role: str) -> Chat:
    """Return a prompt or a completion as messages; a string becomes one message of ``role``."""
    value = [value] if isinstance(value, dict) else value
    if is_chat(value):
        return read_chat(value, name)

    text = check_type(value, str, repr(name))
    messages = [{"role": role, "content": text}] if text.strip() else []
    return Chat(messages, untrained=(), notes=())


def _holds_messages(value: object) -> bool:
    """Return whether a value is a message or a list of messages."""
    return is_chat([value] if isinstance(value, dict) else value)


def _check_turns(chat: Chat) -> None:
    """Raise BadRowError if a chat has no assistant turn to train on."""
    turns = assistant_turns(chat.messages)
    if not turns:
        raise BadRowError("no assistant turn, so there is nothing to train on")
    if set(turns) <= set(chat.untrained):
        raise BadRowError(
            "every assistant turn is excluded from training (weight 0, or train false), so there is"
            " nothing to train on"
        )


def _add_system(chat: Chat, fields: Mapping[str, Any]) -> Chat:
    """Return the chat with the row's system message, if the chat has no system message itself."""
    system = check_type(fields.get("system", ""), str, "'system'")
    if not system.strip():
        return chat

    first = chat.messages[0]
    if first["role"] != "system":
        messages = [{"role": "system", "content": system}, *chat.messages]
        untrained = tuple(number + 1 for number in chat.untrained)
        return Chat(messages, untrained, chat.notes)

    if first["content"].strip() == system.strip():
        return chat
    note = "the row's system message is ignored, because its messages have another"
    return Chat(chat.messages, chat.untrained, (*chat.notes, note))
