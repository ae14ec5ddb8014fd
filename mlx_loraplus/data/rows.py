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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ..errors import ConfigError, join_problems, nearest
from .field_templates import fill_templates, is_template, parse_template, template_columns
from .messages import (
    BadRowError,
    Chat,
    assistant_turns,
    check_type,
    is_chat,
    is_missing,
    parse_json,
    read_chat,
    type_name,
)
from .row_kinds import EXTRAS, KINDS, Kind, find_kind

FORMATS = ", ".join(" + ".join(needed) for needed in KINDS.values()).replace(", text", ", or text")
"""The fields of all kinds, for error messages."""

PAIR_FORMAT = "prompt + chosen + rejected, or chosen + rejected as chats"
"""The fields of rows with two answers, for error messages."""

_NOT_TEXT = ("messages", "conversations", "tools")  # fields that no template can write

MOST_KEPT = 100
"""Maximum number of problems, and of different notes, that are kept for each table."""


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
    notes: tuple[str, ...] = ()  # other remarks for the report
    rejected: "Row | None" = None  # the other answer of a row with two of them


MakeRow = Callable[[object, int, Mapping[str, str] | None], Row]


@dataclass
class RowProblems:
    """The bad rows of a table and the notes on its good rows, with line numbers in its file."""

    bad: int = 0  # number of bad rows
    problems: list[tuple[int, str]] = field(default_factory=list)
    """Lines and problems of the first bad rows."""
    notes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each note, the number of rows that have it and the line of the first one."""

    def add_problem(self, line: int, problem: str) -> None:
        """Count a bad row, and keep its problem if it is one of the first ``MOST_KEPT``."""
        self.bad += 1
        if len(self.problems) < MOST_KEPT:
            self.problems.append((line, problem))

    def places(self, name: str) -> list[str]:
        """Return the first problems, each with its line in the file ``name``."""
        return [f"{name}:{line}: {problem}" for line, problem in self.problems]

    def add_note(self, line: int, note: str) -> None:
        """Count a row that has a note; a new note is ignored once ``MOST_KEPT`` notes are kept."""
        if note in self.notes or len(self.notes) < MOST_KEPT:
            count, first = self.notes.get(note, (0, line))
            self.notes[note] = (count + 1, first)


def parse_names(pairs: Sequence[str]) -> dict[str, str]:
    """Parse the setting ``fields``: return {"prompt": "q"} for ("prompt=q",).

    A value with braces is a template over several columns; see ``field_templates``.

    Raises:
        ConfigError: A pair has the wrong form, names an unknown field, or has a wrong template.
    """
    # List a field of several kinds only once.
    known = [*dict.fromkeys(chain(*KINDS.values(), *EXTRAS.values())), "chosen", "rejected"]

    names: dict[str, str] = {}
    for pair in pairs:
        name, _, column = pair.partition("=")
        names[name] = column

    problems: list[str] = []
    for name, column in names.items():
        if name not in known or not column:
            problems.append(
                f"fields: {name}={column} is not of the form field=column, where the field is one"
                f" of {', '.join(known)}{nearest(name, known)}{_unquoted(column)}"
            )
        elif is_template(column):
            problems += _template_problems(name, column)
    if problems:
        raise ConfigError(join_problems(problems))
    return names


def _template_problems(name: str, template: str) -> list[str]:
    """Return what is wrong with the template of a field."""
    if name in _NOT_TEXT:
        return [f"fields: {name} holds messages or tools, so it is one column, not a template"]
    try:
        parse_template(template)
    except ValueError as error:
        # A shell divides a template with spaces that has no quotes.
        hint = _unquoted("") if template.count("{") > template.count("}") else ""
        return [f"fields: {name}={template!r:.80} is not a template: {error}{hint}"]
    return []


def _unquoted(column: str) -> str:
    """Return advice about quotes if a pair of ``--fields`` has no column."""
    return "" if column else "; put quotes around a pair with spaces: 'prompt={first} {second}'"


def read_records(
    rows: Iterable[tuple[int, Any]],
    names: Mapping[str, str],
    row_problems: RowProblems,
    make: MakeRow | None = None,
) -> Iterator[Row]:
    """Yield the good rows of a table, and add the bad ones to ``row_problems``.

    Args:
        rows: The line and the content of each row. The content is a BadRowError if the reader could
            not read the row.
        names: The column of each field, from ``parse_names``.
        row_problems: Receives the bad rows.
        make: Makes a row; by default ``make_record``.
    """
    make = make or make_record
    for line, row in rows:
        try:
            if isinstance(row, BadRowError):
                raise row
            yield make(row, line, names)
        except BadRowError as problem:
            row_problems.add_problem(line, str(problem))


def make_record(row: object, line: int, names: Mapping[str, str] | None = None) -> Row:
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
        raise BadRowError(f"{type_name(row)}, not an object")
    values = {column: value for column, value in row.items() if not is_missing(value)}

    # Find the row's kind and its fields. A template's text is a column like the others.
    in_templates = template_columns(names) if names else set[str]()
    if names and in_templates:
        values = fill_templates(values, names)
    found = find_kind(values, names or {})
    kind = found.kind
    fields = {name: values[column] for name, column in found.columns.items()}
    if kind == "completion" and not found.named:
        _check_label(values)

    # A completion that holds messages is a chat.
    chat: Chat | None = None
    if kind in ("chat", "sharegpt"):
        name = KINDS[kind][0]
        chat = read_chat(fields[name], name)
    elif kind == "completion" and (
        _holds_messages(fields["prompt"]) or _holds_messages(fields["completion"])
    ):
        kind = "chat"
        chat = _join_completion(fields)

    # Convert the fields to the common form.
    content: dict[str, Any]
    if chat is None:
        content = _text_fields(fields, kind)
    else:
        _check_turns(chat)
        chat = _add_system(chat, fields)
        content = _chat_fields(chat, fields)
    _check_characters(content)

    # The row's other columns are reported as unused.
    used = {found.columns.get(name) for name in (*KINDS[found.kind], *EXTRAS[kind])}
    used |= in_templates
    unused = tuple(column for column in values if column not in used)
    untrained, notes = (chat.untrained, chat.notes) if chat else ((), ())
    return Row(kind, content, line, unused, found.named, untrained, notes)


def _check_label(values: Mapping[str, Any]) -> None:
    """Raise BadRowError if a row is labeled as an unwanted answer, as in KTO data."""
    if str(values.get("label")).lower() == "false":
        raise BadRowError(
            "its label is false, which marks an unwanted answer; use --on-bad drop to skip such"
            " rows, or --fields prompt=prompt completion=completion to train on them too"
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
    for name in (*KINDS[kind], *EXTRAS[kind]):
        texts[name] = check_type(fields.get(name, ""), str, repr(name))

    answer_name = KINDS[kind][-1]
    if not texts[answer_name].strip():
        raise BadRowError(f"{answer_name!r} is empty")
    if kind == "text":
        return texts

    # Alpaca's input follows the instruction, as in Alpaca's original prompt.
    prompt = texts[KINDS[kind][0]]
    alpaca_input = texts.get("input", "")
    if alpaca_input.strip():
        prompt = f"{prompt}\n\n{alpaca_input}" if prompt.strip() else alpaca_input

    content = {"prompt": prompt, "completion": texts[answer_name]}
    if texts["system"].strip():
        content["system"] = texts["system"]
    return content


# --- chats --------------------------------------------------------------------------------------


def _join_completion(fields: Mapping[str, Any]) -> Chat:
    """Return a prompt and a completion as one chat in which only the completion is trained on."""
    prompt = _read_messages(fields["prompt"], "prompt", "user")
    completion = _read_messages(fields["completion"], "completion", "assistant")
    answers, untrained = completion.messages, completion.untrained
    if not assistant_turns(answers):
        raise BadRowError("no assistant turn in 'completion', so there is nothing to train on")

    # If the completion begins with the prompt, it is the whole chat.
    offset = len(prompt.messages)
    if answers[:offset] == prompt.messages:
        answers = answers[offset:]
        untrained = tuple(number - offset for number in untrained if number >= offset)

    # Assistant messages in the prompt are not trained on.
    in_prompt = assistant_turns(prompt.messages)
    in_completion = (offset + number for number in untrained)
    return Chat(
        [*prompt.messages, *answers],
        (*in_prompt, *in_completion),
        (*prompt.notes, *completion.notes),
    )


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


def _chat_fields(chat: Chat, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the common form of a chat, with the row's tools if it has any."""
    content: dict[str, Any] = {"messages": chat.messages}
    tools = check_type(parse_json(fields.get("tools") or []), list, "'tools'")
    if tools:
        content["tools"] = tools
    return content
