"""One row of a data set becomes a record, or what is wrong with it is said.

A row's kind is found from its fields. They are those of OpenAI's fine-tuning guide, ShareGPT, Alpaca and mlx-lm::

    chat        {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
    sharegpt    {"conversations": [{"from": "human", "value": "..."}, ...], "tools": [...]}
    completion  {"prompt": "...", "completion": "..."}
    alpaca      {"instruction": "...", "input": "...", "output": "..."}
    question    {"question": "...", "answer": "..."}
    text        {"text": "..."}

All but text may have a "system" message. Other fields are not used, and preview names them.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypeVar

from ..errors import ConfigError, DataError, join_problems, nearest

Kind = Literal["chat", "sharegpt", "completion", "alpaca", "question", "text"]
KINDS: Mapping[Kind, tuple[str, ...]] = {  # the fields that each needs
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question": ("question", "answer"),
    "text": ("text",),
}
EXTRAS: Mapping[Kind, tuple[str, ...]] = {  # the fields that each may have
    "chat": ("tools", "system"), "sharegpt": ("tools", "system"), "completion": ("system",),
    "alpaca": ("input", "system"), "question": ("system",), "text": (),
}  # fmt: skip
FORMATS = ", ".join(" + ".join(needed) for needed in KINDS.values()).replace(", text", ", or text")
MOST_KEPT = 100  # problems of a table, and notes
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "observation": "tool", "function_response": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "function_call"), "assistant"),
}  # fmt: skip
_TYPES: dict[type[Any], str] = {
    dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number",
    type(None): "null",
}  # fmt: skip
Of = TypeVar("Of")


@dataclass(frozen=True)
class Record:
    """A row: ``messages`` and perhaps ``tools``; or ``prompt``, ``completion`` and perhaps ``system``; or ``text``."""

    kind: Kind
    fields: Mapping[str, Any]
    line: int  # of its file, where it came from
    unused: tuple[str, ...] = ()  # names of the row's other fields
    named: bool = False  # whether it has columns that ``fields`` names


class BadRowError(DataError):
    """What is wrong with one row, without its place."""


@dataclass
class Findings:
    """What is to be said about a table's rows; lines are those of its file."""

    bad: int = 0  # rows that could not be used
    problems: list[tuple[int, str]] = field(default_factory=list)  # (line, why) of the first of them
    notes: dict[str, tuple[int, int]] = field(default_factory=dict)  # what, and (in how many rows, the first line)

    def add_problem(self, line: int, problem: str) -> None:
        """Count a bad row, and keep why if it is among the first."""
        self.bad += 1
        if len(self.problems) < MOST_KEPT:
            self.problems.append((line, problem))

    def places(self, name: str) -> list[str]:
        """Return where the first problems are in the file ``name``, and what they are."""
        return [f"{name}:{line}: {problem}" for line, problem in self.problems]

    def add_note(self, line: int, note: str) -> None:
        """Count a note that is known, or among the first."""
        if note in self.notes or len(self.notes) < MOST_KEPT:
            count, first = self.notes.get(note, (0, line))
            self.notes[note] = (count + 1, first)


def parse_names(pairs: Sequence[str]) -> dict[str, str]:
    """Turn ``("prompt=q", "completion=a")`` into {"prompt": "q", "completion": "a"}, or raise ConfigError."""
    known = [*dict.fromkeys(chain(*KINDS.values(), *EXTRAS.values()))]
    names = {name: column for name, _, column in (pair.partition("=") for pair in pairs)}
    problems = [
        f"fields: {name}={column} is no name=column, with a name of {', '.join(known)}{nearest(name, known)}"
        for name, column in names.items()
        if name not in known or not column
    ]
    if problems:
        raise ConfigError(join_problems(problems))
    return names


def read_records(rows: Iterable[tuple[int, Any]], names: Mapping[str, str], findings: Findings) -> Iterator[Record]:
    """Yield a table's good rows, and put the others into ``findings``."""
    for line, row in rows:
        try:
            if isinstance(row, BadRowError):
                raise row
            yield make_record(row, line, names)
        except BadRowError as problem:
            findings.add_problem(line, str(problem))


def make_record(row: object, line: int, names: Mapping[str, str] | None = None) -> Record:
    """Find the kind of a row and check its fields.

    ``names`` maps fields to the row's own names for them; a row that has none of these names is taken as it is.

    Raises: BadRowError where it is of no kind, of several, or a field is missing, empty or of the wrong type.
    """
    if not isinstance(row, dict):
        raise BadRowError(f"{_type_name(row)}, not an object")
    given = {name: value for name, value in row.items() if value is not None}
    names = names or {}
    named = not given.keys().isdisjoint(names.values())
    columns = names if named else {name: name for name in given}
    held = {name: given[column] for name, column in columns.items() if column in given}
    kinds: list[Kind] = [kind for kind, needed in KINDS.items() if all(name in held for name in needed)]
    if len(kinds) > 1:
        choice = " ".join(f"{name}={name}" for name in KINDS[kinds[0]])
        raise BadRowError(f"fields of several kinds ({' and '.join(kinds)}): choose, such as --fields {choice}")
    if not kinds:
        raise BadRowError(_no_kind(held, given, columns))
    kind = kinds[0]
    fields = _chat_fields(held, kind) if kind in ("chat", "sharegpt") else _text_fields(held, kind)
    try:
        (json.dumps(fields, ensure_ascii=False) if "messages" in fields else "".join(fields.values())).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError("an escape of half a surrogate pair, which is no character") from None
    except (TypeError, ValueError, RecursionError) as error:  # such as a date
        raise BadRowError(f"a value that is no JSON ({error})") from None
    used = {columns.get(name) for name in (*KINDS[kind], *EXTRAS[kind])}
    return Record(kind, fields, line, tuple(name for name in given if name not in used), named)


def _no_kind(held: Mapping[str, Any], given: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    names = [f"{name!r:.40}" for name in list(given)[:6]]
    has = f"(it has {', '.join(names) or 'none'})"
    for needed in KINDS.values():
        missing = [name for name in needed if name not in held]
        if len(missing) < len(needed):
            return f"no {columns.get(missing[0], missing[0])!r:.40} {has}"
    plain = [column for column in given if re.fullmatch(r"[\w.-]{1,40}", column)]
    choice = zip(KINDS["completion"] if plain[1:] else KINDS["text"], plain, strict=False)
    hint = f"; choose, such as --fields {' '.join(map('='.join, choice))}" if plain else ""
    return f"no known field {has}{hint}"


def _text_fields(held: Mapping[str, Any], kind: Kind) -> dict[str, str]:
    """Return the fields of a row that holds plain strings."""
    given = {name: _checked(held.get(name, ""), str, repr(name)) for name in (*KINDS[kind], *EXTRAS[kind])}
    asked, answer = KINDS[kind][0], KINDS[kind][-1]
    if not given[answer].strip():
        raise BadRowError(f"{answer!r} is empty")
    if kind == "text":
        return given
    prompt = given[asked]
    if given.get("input", "").strip():
        prompt = f"{prompt}\n\n{given['input']}"
    system = {"system": given["system"]} if given["system"].strip() else {}
    return {"prompt": prompt, "completion": given[answer]} | system


def _chat_fields(held: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Return the messages and tools of a chat, or say what is wrong with them."""
    name = KINDS[kind][0]
    messages = _checked(_parsed(held[name]), list, repr(name))
    if not messages:
        raise BadRowError(f"{name!r} is empty")
    messages = [_message(message, f"{name}[{place}]") for place, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRowError("no assistant turn, so nothing to learn")
    system = _checked(held.get("system", ""), str, "'system'")
    if system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    tools = _checked(_parsed(held.get("tools") or []), list, "'tools'")
    return {"messages": messages} | ({"tools": tools} if tools else {})


def _message(message: Any, place: str) -> dict[str, Any]:
    """Return one message in OpenAI's form; a column that a table adds to every message as null is left out."""
    given = _checked(message, dict, place)
    message = {name: value for name, value in given.items() if value is not None or name == "content"}
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message = {"role": SHAREGPT_ROLES.get(str(role), role), "content": message.pop("value", None), **message}
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise BadRowError(f"{place} has the role {role!r:.40}; roles are {', '.join(ROLES)}")
    if calls:
        if not isinstance(calls, list):
            raise BadRowError(f"{place} has tool_calls that are no list")
        message["tool_calls"] = [_call(call, place) for call in calls]
    if role == "assistant" and content is None and calls:
        return message
    if not isinstance(content, str):
        raise BadRowError(f"{place} ({role}) has {_type_name(content)} as content, not a string")
    if role == "assistant" and not content.strip() and not calls:
        raise BadRowError(f"{place} (assistant) has empty content")
    return message


def _call(call: object, place: str) -> dict[str, Any]:
    """Return a tool call with its arguments as the object that chat templates expect; OpenAI writes it as a string."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError(f"{place} has a tool call without a function's name")
    called = function | {"arguments": _parsed(function.get("arguments", {}))}
    return call | {"function": called} if "function" in call else called


def _parsed(value: object) -> object:
    """Return the JSON in a string, since tables hold lists and objects so; anything else, and other strings, as is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _checked(value: Any, kind: type[Of], what: str) -> Of:
    if not isinstance(value, kind):
        raise BadRowError(f"{what} is {_type_name(value)}, not {_TYPES[kind]}")
    return value


def _type_name(value: object) -> str:
    return _TYPES.get(type(value), f"a {type(value).__name__}")
