"""Change a chat that a chat template can't render into chats that more templates can render.

Each change comes with its advice. The advice is given only if the template can render the changed
chat, so it is right when it is followed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from .messages import NEEDED_FIELDS, ROLES
from .thoughts import Message, answer_of


def simpler_chats(messages: Sequence[Message]) -> Iterator[tuple[list[Message], str]]:
    """Yield changed chats, each with advice that describes the change.

    Args:
        messages: The messages in OpenAI's form.
    """
    # Remove a field that is not needed.
    fields = {field for message in messages for field in message}
    for field in sorted(fields - NEEDED_FIELDS):
        yield (
            without_field(field, messages, ("assistant",)),
            f"remove the field {field!r:.40} from assistant messages",
        )
        yield (
            without_field(field, messages, ROLES),
            f"remove the field {field!r:.40} from all messages",
        )

    # Remove the content of messages that have tool calls.
    bare_calls = [_without_content(message) for message in messages]
    if bare_calls != list(messages):
        yield bare_calls, "remove the content beside tool calls"

    # Join the system message with the first message of the user.
    if [message["role"] for message in messages[:2]] == ["system", "user"]:
        content = "\n\n".join(str(message["content"]) for message in messages[:2])
        first = {**messages[1], "content": content}
        yield (
            [first, *messages[2:]],
            "put the system message at the start of the first user message",
        )

    # Join consecutive messages of one role.
    for role in ("assistant", "user"):
        joined = _join_neighbours(messages, role)
        if len(joined) < len(messages):
            yield joined, f"join {role} messages that follow each other into one"

    yield from _begin_usually(messages)


def _begin_usually(messages: Sequence[Message]) -> Iterator[tuple[list[Message], str]]:
    """Yield chats that begin with one system message and a user message."""
    roles = [message["role"] for message in messages]
    systems = [message for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    if "user" not in roles:
        question = {"role": "user", "content": "…"}
        yield [*systems, question, *others], "add a user message before the first answer"
        return

    # Remove the answers before the first question, move the system messages, or do both.
    start = roles.index("user")
    first_systems = [message for message in messages[:start] if message["role"] == "system"]
    later = [*first_systems, *messages[start:]]
    remove = "remove the assistant messages before the first user message"
    gather = "join the system messages into one, and put it at the start of the chat"
    gathered = _join_neighbours([*systems, *others], "system")
    if len(later) < len(messages):
        yield later, remove
    if gathered != list(messages):
        yield gathered, gather
        rest = [message for message in messages[start:] if message["role"] != "system"]
        yield _join_neighbours([*systems, *rest], "system"), f"{remove} and {gather}"

    # A template may allow no system messages at all.
    move = "put each system message at the start of the user message after it"
    for changed, advice in ((list(messages), move), (later, f"{remove} and {move}")):
        asked = _put_systems_in_questions(changed)
        if asked != changed:
            yield asked, advice


def _put_systems_in_questions(messages: Sequence[Message]) -> list[Message]:
    """Return the messages, with system messages at the start of the user message after them."""
    moved: list[Message] = []
    for message in messages:
        if message["role"] != "user":
            moved.append(message)
            continue

        contents = [str(message["content"])]
        while moved and moved[-1]["role"] == "system":
            contents.insert(0, str(moved.pop()["content"]))
        moved.append({**message, "content": "\n\n".join(contents)})
    return moved


def without_field(field: str, messages: Sequence[Message], roles: Sequence[str]) -> list[Message]:
    """Return the messages, without a field in those of some roles."""
    return [
        {name: value for name, value in message.items() if name != field}
        if message["role"] in roles
        else message
        for message in messages
    ]


def _without_content(message: Message) -> Message:
    """Return a message with tool calls without its content; any other message unchanged."""
    if message.get("tool_calls") and answer_of(message).strip():
        return {**message, "content": ""}
    return message


def _join_neighbours(messages: Sequence[Message], role: str) -> list[Message]:
    """Return the messages, with consecutive messages of a role joined into one."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last is None or not last["role"] == message["role"] == role:
            joined.append(message)
            continue

        # A message with tool calls may have no content.
        contents = [str(each.get("content") or "") for each in (last, message)]
        both: dict[str, Any] = {**last, **message}
        both["content"] = "\n\n".join(content for content in contents if content)
        calls = [*(last.get("tool_calls") or ()), *(message.get("tool_calls") or ())]
        if calls:
            both["tool_calls"] = calls
        joined[-1] = both
    return joined
