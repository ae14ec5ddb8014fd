"""Validate the rows of a data set and convert them to a common form.

The fields of a row determine its kind. They are those of OpenAI's fine-tuning guide, ShareGPT,
Alpaca and mlx-lm::

    chat        {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
    sharegpt    {"conversations": [{"from": "human", "value": "..."}, ...], "tools": [...]}
    completion  {"prompt": "...", "completion": "..."}
    alpaca      {"instruction": "...", "input": "...", "output": "..."}
    question    {"question": "...", "answer": "..."}
    text        {"text": "..."}

Every kind except text may have a "system" message, which may also be called "system_prompt". Other
fields are ignored, and the preview lists them.

``prompt`` and ``completion`` may be lists of messages, as in TRL. The row is then a chat in which
only the completion is trained on.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .field_templates import read_columns
from .find_chat import chat_fields, find_chat
from .ineffective_columns import check_switches
from .messages import BadRowError, MissingFieldsError, check_type, is_chat, type_name
from .row_kinds import OPTIONAL, REQUIRED, Kind, find_kind
from .row_problems import RowProblems
from .whole_tables import check_is_row


@dataclass(frozen=True)
class Row:
    """A valid row in its common form.

    Its fields are ``messages`` and optionally ``tools``; or ``prompt``, ``completion`` and
    optionally ``system``; or ``text``.
    """

    kind: Kind
    fields: Mapping[str, Any]
    line: int  # in the row's file
    unused: tuple[str, ...] = ()  # names of the columns that are not used
    named: bool = False  # whether the row has a column that --fields names
    untrained: tuple[int, ...] = ()  # indices of the assistant messages not to train on
    notes: tuple[str, ...] = ()  # other notes for the report
    rejected: "Row | None" = None  # the other answer of a row with two of them


MakeRow = Callable[[object, int, Mapping[str, str] | None], Row]


def make_rows(
    rows: Iterable[tuple[int, Any]],
    names: Mapping[str, str],
    row_problems: RowProblems,
    make: MakeRow | None = None,
) -> Iterator[Row]:
    """Yield a ``Row`` for each good row of a table, and add the bad ones to ``row_problems``.

    Args:
        rows: The line and the content of each row. The content is a BadRowError if the reader could
            not read the row.
        names: The column of each field, from ``parse_names``.
        row_problems: Receives the bad rows.
        make: Makes a row; by default ``make_row``.
    """
    make = make or make_row
    for line, row in rows:
        try:
            if isinstance(row, BadRowError):
                raise row
            check_is_row(row)
            yield make(row, line, names)
        except BadRowError as problem:
            row_problems.add_problem(line, problem)


def make_row(row: object, line: int, names: Mapping[str, str] | None = None) -> Row:
    """Validate a row and return it in its common form.

    Args:
        row: An object, or a list of messages.
        line: The row's line in its file.
        names: The column or template of each field, from ``parse_names``. If a row has none of
            these columns, ``names`` is ignored for this row.

    Raises:
        BadRowError: The row is of no known kind or of several kinds, or a field is missing, empty
            or of the wrong type.
    """
    # A bare list of messages is a chat.
    if is_chat(row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise MissingFieldsError(f"{type_name(row)}, not an object")

    # Find the row's kind and its fields, from the columns that are not null.
    names = names or {}
    values, in_templates = read_columns(row, names)
    found = find_kind(values, names, nulls=[column for column in row if column not in values])
    kind = found.kind
    fields = {name: values[column] for name, column in found.columns.items()}
    if kind == "completion" and not found.named:
        _check_label(values)

    # Convert the fields to the common form. A completion that holds messages is a chat.
    content: dict[str, Any]
    untrained: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    chat = find_chat(kind, fields)
    if chat is None:
        content = _text_fields(fields, kind)
        if not content.get("prompt", "-").strip():
            notes = ("the prompt is empty, so only the answer is trained on, after no question",)
    else:
        kind = "chat" if found.kind == "completion" else kind
        content = chat_fields(chat, fields)
        untrained, notes = chat.untrained, chat.notes
    _check_characters(content)

    # The row's other columns are reported as unused. The fields that a row needs are those of the
    # kind that was found. The optional ones are those of its final kind: a completion may have
    # become a chat.
    used = {found.columns.get(name) for name in (*REQUIRED[found.kind], *OPTIONAL[kind])}
    used |= in_templates
    unused = tuple(column for column in values if column not in used)
    # A row with the weight 0 is refused, and columns such as input_ids are noted.
    more_notes, unused = check_switches(values, unused, named=found.named)
    return Row(kind, content, line, unused, found.named, untrained, notes + more_notes)


def _check_label(values: Mapping[str, Any]) -> None:
    """Raise BadRowError if a row is labeled as an unwanted answer, as in KTO data."""
    if str(values.get("label")).lower() == "false":
        raise BadRowError(
            "its label is false, which marks an unwanted answer; a row with a label suits"
            " --objective kto; use --on-bad drop to skip such rows, or --fields prompt=prompt"
            " completion=completion to train on them too"
        )


def _check_characters(fields: Mapping[str, Any]) -> None:
    """Raise BadRowError if fields can't be encoded as UTF-8 or written as JSON."""
    try:
        if "messages" in fields:
            text = json.dumps(fields, ensure_ascii=False)
        else:
            text = "".join(fields.values())
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(
            "it holds half a surrogate pair, which is not a valid character"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:  # such as a date
        raise BadRowError(f"it holds a value that can't be written as JSON ({error})") from None


def _text_fields(fields: Mapping[str, Any], kind: Kind) -> dict[str, str]:
    """Return the common form of a row whose fields are plain strings."""
    texts: dict[str, str] = {}
    for name in (*REQUIRED[kind], *OPTIONAL[kind]):
        value = fields.get(name, "")
        if type(value) in (int, float):
            raise BadRowError(f"{name!r} is a number, not a string; write numbers as text")
        texts[name] = check_type(value, str, repr(name))

    answer_name = REQUIRED[kind][-1]
    if not texts[answer_name].strip():
        raise BadRowError(f"{answer_name!r} is empty")
    if kind == "text":
        return texts

    # Alpaca's input follows the instruction, as in Alpaca's original prompt.
    prompt = texts[REQUIRED[kind][0]]
    alpaca_input = texts.get("input", "")
    if alpaca_input.strip():
        prompt = f"{prompt}\n\n{alpaca_input}" if prompt.strip() else alpaca_input

    content = {"prompt": prompt, "completion": texts[answer_name]}
    if texts["system"].strip():
        content["system"] = texts["system"]
    return content
