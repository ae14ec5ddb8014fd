"""Find the parts of a message that a chat template leaves out."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .thoughts import Message, answer_of, thoughts_of

PARTS = ("content", "tool calls", "thoughts")
"""The parts of a message that a template may leave out."""

_ESCAPES = (
    ("<", "\\u003c", "&lt;"),
    (">", "\\u003e", "&gt;"),
    ("'", "\\u0027", "&#39;"),
)
"""Characters, and how templates escape them for JSON and for HTML."""


def find_lost(message: Message, text: str) -> list[str]:
    """Return the ``PARTS`` of a message that a rendered text does not contain completely.

    Every value must occur separately in the text. A name in the content does not count as a tool
    call, and a single occurrence does not count for two equal calls. White space is ignored.
    """
    values: list[tuple[str, Any]] = [("content", answer_of(message))]
    values += [("thoughts", line) for line in thoughts_of(message).splitlines()]
    values += [("tool calls", value) for value in call_values(message.get("tool_calls") or ())]

    # Search for long values first, so that a short value does not match inside a longer one.
    values.sort(key=lambda value: -len(_squeeze(str(value[1]))))
    left = _squeeze(text)
    lost: set[str] = set()

    for part, value in values:
        spelling = _find_spelling(value, left)
        if spelling is None:
            lost.add(part)
        elif spelling:
            left = left.replace(spelling, "\0", 1)

    return [part for part in PARTS if part in lost]


def has_python_arguments(message: Message, text: str) -> bool:
    """Return whether a text has the arguments of a message's tool call as Python, not as JSON."""
    for call in message.get("tool_calls") or ():
        arguments = call.get("function", call).get("arguments")
        if not isinstance(arguments, Mapping) or not arguments:
            continue
        as_json = (json.dumps(arguments), json.dumps(arguments, ensure_ascii=False))
        if str(arguments) in text and not any(spelling in text for spelling in as_json):
            return True
    return False


def call_values(calls: Sequence[Any]) -> list[Any]:
    """Return all values that the rendered text must contain for tool calls.

    The names of the functions come first. The names and single values of the arguments follow.
    """
    values: list[Any] = _function_names(calls)
    for call in calls:
        arguments = call.get("function", call).get("arguments")
        if isinstance(arguments, Mapping):
            values += list(arguments)
        values += _flatten(arguments)
    return values


def _function_names(calls: Sequence[Any]) -> list[str]:
    """Return the names of the called functions; a call may be a function without a wrapper."""
    names: list[str] = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict):
            names.append(str(function.get("name", "")))
    return names


def _flatten(value: Any) -> list[Any]:
    """Return the single values in nested objects and lists."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list):
        return [value]

    flat: list[Any] = []
    for item in value:
        flat += _flatten(item)
    return flat


def _find_spelling(value: Any, text: str) -> str | None:
    """Return the longest spelling of a value in a text without white space, or None."""
    spellings = sorted(map(_squeeze, _spellings(value)), key=len, reverse=True)
    for spelling in spellings:
        if spelling in text:
            return spelling
    return None


def _spellings(value: Any) -> set[str]:
    """Return the ways to render a value: plain, as JSON, as Python, and escaped for HTML."""
    if not isinstance(value, str):
        return {str(value), json.dumps(value)}

    quoted = (
        value,
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
    )
    spellings = set(quoted)

    # Jinja's tojson escapes HTML characters as JSON, and its escape filter as entities.
    for text in quoted:
        as_json = text
        as_html = text.replace("&", "&amp;")
        for character, json_escape, html_escape in _ESCAPES:
            as_json = as_json.replace(character, json_escape)
            as_html = as_html.replace(character, html_escape)
        spellings |= {as_json.replace("&", "\\u0026"), as_html, as_html.replace('"', "&#34;")}

    return spellings


def _squeeze(text: str) -> str:
    """Return a text without its white space."""
    return "".join(text.split())
