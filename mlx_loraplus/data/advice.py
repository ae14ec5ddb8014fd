"""What to do about a row of no known kind: which of its columns hold what, told as the --fields that train on them."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from ..errors import nearest
from .messages import is_chat

PAIRS = (  # columns that public data sets ask and answer in
    ("instruction", "response"), ("instruction", "answer"), ("instruction", "completion"), ("input", "output"),
    ("input", "target"), ("input", "response"), ("input", "answer"), ("inputs", "targets"), ("source", "target"),
    ("src", "tgt"), ("question", "response"), ("question", "output"), ("query", "answer"), ("query", "response"),
    ("query", "output"), ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"),
    ("problem", "solution"), ("problem", "answer"), ("article", "summary"), ("article", "highlights"),
    ("document", "summary"), ("dialogue", "summary"), ("title", "abstract"), ("user", "assistant"),
    ("human", "assistant"), ("text_input", "output"), ("question", "solution"),
)  # fmt: skip
_NO_TEXT = re.compile(  # numbers, dates and times, and ids
    r"\s*([-+]?[\d.,%€$ ]+(e[-+]?\d+)?|\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T"
    r" ][\d:.,+Z-]*)?|[0-9a-f-]{8,}|"
    r"[\w-]*\d[\w-]*|true|false|nan|none|null|https?://\S*|\S+@\S+)?\s*",
    re.IGNORECASE,
)


def advise(given: Mapping[str, Any], needed: Mapping[str, str] | None = None) -> str:
    """Return the --fields for a row's columns, as "; choose, such as --fields ...", or why there are none.

    ``needed`` maps fields that the row has to their columns, where it has half of a kind.
    """
    if {"chosen", "rejected"} <= given.keys():
        return _of_preferences(given)
    names = {
        column: value
        for column, value in given.items()
        if column.isprintable() and 0 < len(column) <= 40
    }
    texts = [column for column, value in names.items() if _is_text(value)]
    chats = [column for column, value in names.items() if is_chat(value)]
    pair = next((pair for pair in PAIRS if all(_pairs(names.get(column)) for column in pair)), None)
    if pair:
        return _of_pair(*pair, names)
    if needed:
        return _of_half(needed, texts)
    if chats:
        return _choose(messages=chats[0])
    return _of_texts(names, texts) if texts else "; none of them holds text to learn" * bool(given)


def _of_pair(asked: str, answer: str, names: Mapping[str, Any]) -> str:
    if asked == "instruction" and isinstance(names.get("context"), str):
        return _choose(instruction=asked, input="context", output=answer)
    return _choose(prompt=asked, completion=answer)


def _of_texts(names: Mapping[str, Any], texts: list[str]) -> str:
    """Return the two columns of the longest texts as prompt and completion, or the one as text."""
    if len(texts) == 1:
        return _choose(text=texts[0])
    longest = sorted(texts, key=lambda column: -len(names[column]))[:2]
    asked, answer = [column for column in texts if column in longest]
    return _choose(prompt=asked, completion=answer)


def _is_text(value: object) -> bool:
    return (
        isinstance(value, str)
        and bool(value.strip())
        and (len(value) > 64 or not _NO_TEXT.fullmatch(value))
    )


def _pairs(value: object) -> bool:
    return (isinstance(value, str) and bool(value.strip())) or is_chat(value)


def _of_preferences(given: Mapping[str, Any]) -> str:
    """Return how to learn the chosen answers."""
    if "prompt" in given:
        choice = {"prompt": "prompt", "completion": "chosen"}
    else:
        choice = {"messages": "chosen"} if is_chat(given["chosen"]) else {"text": "chosen"}
    fields = " ".join(f"{name}={column}" for name, column in choice.items())
    return (
        "; preference data (chosen and rejected) can't be trained on as such: to learn the chosen"
        f" answers, give --fields {fields}"
    )


def _of_half(needed: Mapping[str, str], texts: list[str]) -> str:
    """Return the column for the one field that a row of half a kind lacks."""
    held = {column for field, column in needed.items() if field != column or column in texts}
    lacking = [field for field, column in needed.items() if not column]
    left = [column for column in texts if column not in held]
    if len(lacking) != 1 or not left:
        return ""
    near = [column for column in left if nearest(lacking[0], [column])]
    choice = {field: column or (near or left)[0] for field, column in needed.items()}
    return _choose(**choice)


def _choose(**choice: str) -> str:
    fields = " ".join(shlex.quote(f"{name}={column}") for name, column in choice.items())
    return f"; choose, such as --fields {fields}"
