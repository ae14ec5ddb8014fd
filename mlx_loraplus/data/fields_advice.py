"""Suggest ``--fields`` for a row of unknown format, based on the content of its columns."""

import re
import shlex
from collections.abc import Mapping
from typing import Any, cast

from ..errors import nearest
from .field_templates import is_template
from .messages import is_chat

PAIRS = (
    ("instruction", "response"),
    ("instruction", "answer"),
    ("instruction", "completion"),
    ("input", "output"),
    ("input", "target"),
    ("input", "response"),
    ("input", "answer"),
    ("inputs", "targets"),
    ("source", "target"),
    ("src", "tgt"),
    ("question", "response"),
    ("question", "output"),
    ("query", "answer"),
    ("query", "response"),
    ("query", "output"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("article", "summary"),
    ("article", "highlights"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("title", "abstract"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("text_input", "output"),
    ("question", "solution"),
)
"""Columns that hold the prompt and the answer in public data sets, the most reliable pair first."""

_GIVEN = ("context", "passage", "input", "system", "system_prompt", "document", "title", "history")
"""Columns that usually belong to the prompt, and not to the answer."""

_ONE_MESSAGE = (
    "; it is one message: put all messages of a conversation into one row, as in"
    ' {"messages": [{"role": "user", "content": "..."}, ...]}'
)

ADVICE = "; choose the columns, such as"
"""The beginning of advice that depends on the values of a row."""

_NAMES_OF_LISTS = ("data", "rows", "examples", "items", "records", "samples", "train", "dataset")
"""Columns whose list holds the rows of a file, rather than the parts of one row."""

_LONGEST_NAME = 40  # maximum number of characters in a suggested column name
_SURELY_TEXT = 64  # a string with more characters than this is always taken as text

_NOT_TEXT = re.compile(
    r"""
    \s*
    (
        [-+]?[\d.,%€$\ ]+(e[-+]?\d+)?                              # a number
      | \d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T\ ][\d:.,+Z-]*)?         # a date, with a time or without
      | [0-9a-f-]{8,}                                              # a hash or a UUID
      | [\w-]*\d[\w-]*                                             # an id
      | true | false | nan | none | null
      | https?://\S*
      | \S+@\S+                                                    # an e-mail address
    )?
    \s*
    """,
    re.IGNORECASE | re.VERBOSE,
)

_LABEL = re.compile(r"\s*([-+]?\d{1,4}([.,]\d{1,4})?|true|false)\s*", re.IGNORECASE)

# A name of a column that is rather a value: a sentence, or four words and more.
_SENTENCE = re.compile(r"\s*(\S.*[.?!]|(\S+\s+){3,}\S+)\s*", re.DOTALL)
_NO_NAMES = (
    "the values of a row seem to stand where its columns should be named, such as prompt and"
    " completion: name them; in a csv file, write the line prompt,completion above the first row"
)

# Names of columns that do not hold labels, or answers; both patterns match an empty name too.
_NOT_LABEL = re.compile(
    r".*(^|_|\b)(id|idx|index|no|nr|number|line|row|year|date|time|timestamp|length|tokens)"
    r"|unnamed.*|",
    re.IGNORECASE,
)
_NOT_ANSWER = re.compile(
    r".*(^|_|\b)(id|uuid|idx|index|line|row|hash|url|timestamp)|unnamed.*|", re.IGNORECASE
)


def advise(row: Mapping[str, Any], needed: Mapping[str, str] | None = None) -> str:
    """Return the end of an error message, which explains how to train on a row's columns.

    The result is "; choose the columns, such as --fields ...", a reason why no column can be used,
    or an empty string.

    Args:
        row: The row's columns.
        needed: The fields of a kind and the column of each, for a row that has only some of these
            fields. The column is "" for a field that the row lacks.
    """
    if {"chosen", "rejected"} <= row.keys():
        return _advise_preferences(row)
    if _is_message(row):
        return _ONE_MESSAGE

    columns = {name: value for name, value in row.items() if _is_usable_name(name)}
    texts = [name for name, value in columns.items() if _is_text(value)]
    chats = [name for name, value in columns.items() if is_chat(value)]

    # Try well-known column names first, because they are the most reliable hint.
    for prompt, answer in PAIRS:
        if _can_train(columns.get(prompt)) and _can_train(columns.get(answer)):
            return _advise_pair(prompt, answer, columns)
    if needed:
        return _advise_missing_field(needed, texts)
    if chats:
        return _suggest_fields({"messages": chats[0]})
    has_names = not any(map(_SENTENCE.fullmatch, row))
    return _advise_texts(columns, texts) if texts and has_names else _explain_no_text(row)


def _is_message(row: Mapping[str, Any]) -> bool:
    """Return whether a row is a message of a chat, rather than a chat."""
    return is_chat([row]) and any(isinstance(row.get(name), str) for name in ("content", "value"))


def _advise_preferences(row: Mapping[str, Any]) -> str:
    """Return the advice for training on the chosen answers of preference data."""
    if "prompt" in row:
        choice = {"prompt": "prompt", "completion": "chosen"}
    elif is_chat(row["chosen"]):
        choice = {"messages": "chosen"}
    else:
        choice = {"text": "chosen"}

    return (
        "; a row with chosen and rejected suits --objective dpo, ipo, orpo or simpo; to train on"
        f" the chosen answers alone, use --fields {_show_fields(choice)}"
    )


def _advise_pair(prompt: str, answer: str, columns: Mapping[str, Any]) -> str:
    """Return the advice for a well-known pair of columns."""
    if prompt == "instruction" and isinstance(columns.get("context"), str):
        return _suggest_fields({"instruction": prompt, "input": "context", "output": answer})
    return _suggest_fields({"prompt": prompt, "completion": answer})


def _advise_missing_field(needed: Mapping[str, str], texts: list[str]) -> str:
    """Return the advice for the one missing field, or "" if several fields are missing."""
    lacking = [field for field, column in needed.items() if not column]
    if len(lacking) != 1:
        return ""

    # Do not suggest a column that already holds another field. The last field is the answer, so do
    # not suggest a part of the prompt for it.
    missing = lacking[0]
    is_answer = missing == list(needed)[-1]
    free = [column for column in texts if column not in needed.values()]
    if is_answer:
        free = [column for column in free if column.lower() not in _GIVEN]
    if not free:
        return ""

    # Prefer a column with a similar name; otherwise suggest the first free column.
    similar = [column for column in free if nearest(missing, [column])]
    guess = similar[0] if similar else free[0]
    return _suggest_fields({field: column or guess for field, column in needed.items()})


def _advise_texts(columns: Mapping[str, Any], texts: list[str]) -> str:
    """Suggest the two longest texts as prompt and completion, or a single one and its label.

    A single text without a clear label is suggested as text, and also as the prompt if another
    column may be its answer.
    """
    if len(texts) == 1:
        labels = [name for name, value in columns.items() if _is_label(name, value)]
        others = labels or [name for name, value in columns.items() if _may_answer(name, value)]
        answers = [name for name in others if name != texts[0]]
        if not answers:
            return _suggest_fields({"text": texts[0]})

        answer = answers[0] if isinstance(columns[answers[0]], str) else f"{{{answers[0]}}}"
        pair = {"prompt": texts[0], "completion": answer}
        if len(labels) == 1:
            return _suggest_fields(pair)
        return f"{_suggest_fields({'text': texts[0]})} or --fields {_show_fields(pair)}"

    # The two longest texts, in the order of the row.
    by_length = sorted(texts, key=lambda column: -len(columns[column]))
    prompt, answer = [column for column in texts if column in by_length[:2]]
    return _suggest_fields({"prompt": prompt, "completion": answer})


def _holds_rows(value: object) -> bool:
    """Return whether a value is a list of objects."""
    if not isinstance(value, list):
        return False
    return bool(value) and all(isinstance(row, dict) for row in cast("list[object]", value))


def _explain_no_text(row: Mapping[str, Any]) -> str:
    """Return why no column can be suggested; nothing for a row without columns."""
    if not row:
        return ""

    # The first line of a csv file may be a row.
    if any(map(_SENTENCE.fullmatch, row)):
        return f"; {_NO_NAMES}"

    # The rows may be inside an object, as in {"data": [{…}, …]}.
    inner = [name for name, value in row.items() if _holds_rows(value)]
    if inner and inner[0].lower() not in _NAMES_OF_LISTS:
        return (
            f"; {inner[0]!r:.40} is a list of objects that are no messages: write them as messages"
            " with a role and a content each"
        )
    if inner:
        return f"; the rows are in {inner[0]!r:.40}: write that list alone into the file"
    return "; none of them looks like text to learn"


def _is_usable_name(name: str) -> bool:
    """Return whether a column name can be suggested for a command line."""
    return name.isprintable() and 0 < len(name) <= _LONGEST_NAME


def _is_text(value: object) -> bool:
    """Return whether a value is text rather than a number, a date, an id or an address."""
    if not isinstance(value, str) or not value.strip():
        return False
    return len(value) > _SURELY_TEXT or not _NOT_TEXT.fullmatch(value)


def _is_label(name: str, value: object) -> bool:
    """Return whether a column seems to hold labels, such as 1, 4.5 or true, rather than an id."""
    if _NOT_LABEL.fullmatch(name) or is_template(name) or isinstance(value, bool):
        return False
    if isinstance(value, str):
        return _LABEL.fullmatch(value) is not None
    return isinstance(value, int | float)


def _may_answer(name: str, value: object) -> bool:
    """Return whether a column that is not text, such as a year or a price, may be an answer."""
    if _NOT_ANSWER.fullmatch(name) or is_template(name) or isinstance(value, bool):
        return False
    return isinstance(value, int | float) or (isinstance(value, str) and bool(value.strip()))


def _can_train(value: object) -> bool:
    """Return whether a value can be trained on: a chat, or a string that is not blank."""
    if isinstance(value, str) and value.strip():
        return True
    return is_chat(value)


def _suggest_fields(choice: Mapping[str, str]) -> str:
    return f"{ADVICE} --fields {_show_fields(choice)}"


def _show_fields(choice: Mapping[str, str]) -> str:
    """Return the arguments of ``--fields`` for a shell."""
    return " ".join(shlex.quote(f"{field}={column}") for field, column in choice.items())
