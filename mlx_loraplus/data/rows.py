"""One row of a data set becomes a record, or what is wrong with it is said.

A row's kind is found from its fields. They are those of OpenAI's fine-tuning guide, ShareGPT,
Alpaca and mlx-lm::

    chat        {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
    sharegpt    {"conversations": [{"from": "human", "value": "..."}, ...], "tools": [...]}
    completion  {"prompt": "...", "completion": "..."}
    alpaca      {"instruction": "...", "input": "...", "output": "..."}
    question    {"question": "...", "answer": "..."}
    text        {"text": "..."}

All but text may have a "system" message. Other fields are not used, and preview names them.

``prompt`` and ``completion`` may be lists of messages, as in TRL: such a row is a chat of which
only the completion is learned. A row of none of these kinds is taken by the names in
``OTHER_NAMES``, which are Dolly's, FLAN's and the like; other names need ``--fields``, and the
message says which. "system_prompt" is another name of "system".
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from ..errors import ConfigError, join_problems, nearest
from .advice import advise
from .messages import BadRowError, check_message, is_chat, is_missing, parsed, read_chat, type_name

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
OTHER_NAMES: Sequence[
    Mapping[str, str]
] = (  # fields by other columns, where a row has all that the kind needs
    {"instruction": "instruction", "output": "response", "input": "context"},
    {"instruction": "instruction", "output": "response", "input": "input"},
    {"prompt": "input", "completion": "output"},
    {"prompt": "prompt", "completion": "response"},
    {"question": "question", "answer": "response"},
    {"question": "query", "answer": "answer"},
    {"question": "query", "answer": "response"},
    {"messages": "conversation"},
    {"messages": "dialog"},
    {"messages": "dialogue"},
)
FORMATS = ", ".join(" + ".join(needed) for needed in KINDS.values()).replace(", text", ", or text")
MOST_KEPT = 100  # problems of a table, and notes


@dataclass(frozen=True)
class Row:
    """A row: ``messages`` and perhaps ``tools``; or ``prompt``, ``completion`` and perhaps ``system``; or ``text``."""

    kind: Kind
    fields: Mapping[str, Any]
    line: int  # of its file, where it came from
    unused: tuple[str, ...] = ()  # names of the row's other fields
    named: bool = False  # whether it has columns that ``fields`` names
    untrained: tuple[
        int, ...
    ] = ()  # assistant messages that must not be learned, indices into ``messages``
    notes: tuple[str, ...] = ()  # what else is to be told


@dataclass
class RowProblems:
    """What is to be said about a table's rows; lines are those of its file."""

    bad: int = 0  # rows that could not be used
    problems: list[tuple[int, str]] = field(
        default_factory=list
    )  # (line, why) of the first of them
    notes: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # what, and (in how many rows, the first line)

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
        f"fields: {name}={column} is no name=column, with a name of"
        f" {', '.join(known)}{nearest(name, known)}"
        for name, column in names.items()
        if name not in known or not column
    ]
    if problems:
        raise ConfigError(join_problems(problems))
    return names


def read_records(
    rows: Iterable[tuple[int, Any]], names: Mapping[str, str], findings: RowProblems
) -> Iterator[Row]:
    """Yield a table's good rows, and put the others into ``findings``."""
    for line, row in rows:
        try:
            if isinstance(row, BadRowError):
                raise row
            yield make_record(row, line, names)
        except BadRowError as problem:
            findings.add_problem(line, str(problem))


def make_record(row: object, line: int, names: Mapping[str, str] | None = None) -> Row:
    """Find the kind of a row and check its fields.

    ``names`` maps fields to the row's own names for them; a row that has none of these names is
    taken as it is.

    Raises: BadRowError where it is of no kind, of several, or a field is missing, empty or of the
    wrong type.
    """
    row = {"messages": row} if is_chat(row) else row
    if not isinstance(row, dict):
        raise BadRowError(f"{type_name(row)}, not an object")
    given = {name: value for name, value in row.items() if not is_missing(value)}
    names = names or {}
    named = not given.keys().isdisjoint(names.values())

    # Which kind it is, and which column is which field
    columns = _columns(given, names if named else {})
    found, columns = _find_kind(given, columns, names, named=named)
    held = {name: given[column] for name, column in columns.items() if column in given}
    if not named and found == "completion" and str(given.get("label")).lower() == "false":
        raise BadRowError(
            "its label is false: an answer that is not wanted, which can't be trained on; --on-bad"
            " drop leaves such rows out, --fields prompt=prompt completion=completion learns"
            " them too"
        )

    # What the fields hold
    kind: Kind = found
    untrained: tuple[int, ...] = ()
    notes: list[str] = []
    if found == "completion" and (_holds_chat(held["prompt"]) or _holds_chat(held["completion"])):
        kind = "chat"
        fields, untrained = _chat_of_completion(held, notes)
    elif found in ("chat", "sharegpt"):
        fields, untrained = _chat_fields(held, found, notes)
    else:
        fields = _text_fields(held, found)
    _check_characters(fields)
    used = {columns.get(name) for name in (*KINDS[found], *EXTRAS[kind])}
    unused = tuple(name for name in given if name not in used)
    return Row(kind, fields, line, unused, named, untrained, tuple(notes))


def _columns(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return each field's column: the one that ``names`` gives it, or that of its own name."""
    own = {
        column: column for column in given if column not in names and column not in names.values()
    }
    if "system" not in own and isinstance(given.get("system_prompt"), str):
        own["system"] = "system_prompt"
    return own | dict(names)


def _find_kind(
    given: Mapping[str, Any], columns: dict[str, str], names: Mapping[str, str], *, named: bool
) -> tuple[Kind, dict[str, str]]:
    """Return a row's kind and its fields' columns, or raise BadRowError."""
    held = {name for name, column in columns.items() if column in given}
    kinds: list[Kind] = [kind for kind, needed in KINDS.items() if held.issuperset(needed)]

    # Fields that are named decide
    chosen = {name for name, column in names.items() if column in given} if named else set()
    touched = {kind: len(chosen.intersection(needed)) for kind, needed in KINDS.items()}
    if any(touched.values()):
        kinds = [kind for kind in kinds if touched[kind] == max(touched.values())]
    if len(kinds) > 1:
        choice = " ".join(f"{name}={columns[name]}" for name in KINDS[kinds[0]])
        raise BadRowError(
            f"fields of several kinds ({' and '.join(kinds)}): choose, such as --fields {choice}"
        )
    if kinds:
        return kinds[0], columns

    # Else other names that leave no doubt
    others = (
        [] if any(touched.values()) else [other for other in OTHER_NAMES if _fits(other, given)]
    )
    if others and len({frozenset(_needed(other)) for other in others}) == 1:
        best = max(others, key=lambda other: len(given.keys() & set(other.values())))
        columns = columns | {name: column for name, column in best.items() if column in given}
        return _kind_of(best), columns
    raise BadRowError(_no_kind(given, columns, names, named=named))


def _kind_of(other: Mapping[str, str]) -> Kind:
    return next(kind for kind, needed in KINDS.items() if all(name in other for name in needed))


def _needed(other: Mapping[str, str]) -> list[str]:
    """Return the columns that a row must have to be taken by other names."""
    return [other[name] for name in KINDS[_kind_of(other)]]


def _fits(other: Mapping[str, str], given: Mapping[str, Any]) -> bool:
    """Tell whether a row has the columns of ``other``, with what they should hold, and half of no other kind."""
    needed = _needed(other)
    half = {name for fields in KINDS.values() for name in fields} - set(needed)
    if not given.keys().isdisjoint(half):
        return False
    wanted = is_chat if "messages" in other else _is_string
    return all(wanted(given.get(column)) for column in needed)


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _no_kind(
    given: Mapping[str, Any], columns: Mapping[str, str], names: Mapping[str, str], *, named: bool
) -> str:
    """Return why a row is of no kind, and what to do."""
    shown = [f"{name!r:.40}" for name in list(given)[:6]]
    has = f"(it has {', '.join(shown) or 'none'})"
    elsewhere = "" if named else _misspelt(given, names)
    held = {name for name, column in columns.items() if column in given}
    chosen = {name for name, column in names.items() if column in given}
    for needed in sorted(KINDS.values(), key=lambda needed: -len(chosen.intersection(needed))):
        missing = [name for name in needed if name not in held]
        if len(missing) < len(needed):
            half = {name: "" if name in missing else columns[name] for name in needed}
            what = columns.get(missing[0], missing[0])
            if missing[0] in names and named:
                return f"no {what!r:.40} {has}{nearest(what, set(given) - set(names.values()))}"
            return f"no {what!r:.40} {has}{elsewhere or advise(given, half)}"
    return f"no known field {has}{elsewhere or advise(given)}"


def _misspelt(given: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return which column that ``fields`` names is nearly one of the row's."""
    for column in names.values():
        near = nearest(column, given)
        if near:
            return f"; fields names {column!r:.40}, which it has not{near}"
    return ""


def _check_characters(fields: Mapping[str, Any]) -> None:
    """Raise BadRowError where fields hold what is no character or no JSON."""
    try:
        (
            json.dumps(fields, ensure_ascii=False)
            if "messages" in fields
            else "".join(fields.values())
        ).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError("an escape of half a surrogate pair, which is no character") from None
    except (TypeError, ValueError, RecursionError) as error:  # such as a date
        raise BadRowError(f"a value that is no JSON ({error})") from None


def _text_fields(held: Mapping[str, Any], kind: Kind) -> dict[str, str]:
    """Return the fields of a row that holds plain strings."""
    given = {
        name: check_message(held.get(name, ""), str, repr(name))
        for name in (*KINDS[kind], *EXTRAS[kind])
    }
    asked, answer = KINDS[kind][0], KINDS[kind][-1]
    if not given[answer].strip():
        raise BadRowError(f"{answer!r} is empty")
    if kind == "text":
        return given
    prompt = given[asked]
    if given.get("input", "").strip():
        prompt = f"{prompt}\n\n{given['input']}" if prompt.strip() else given["input"]
    system = {"system": given["system"]} if given["system"].strip() else {}
    return {"prompt": prompt, "completion": given[answer]} | system


def _chat_fields(
    held: Mapping[str, Any], kind: Kind, notes: list[str]
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return the messages and tools of a chat and which are not to be learned, or say what is wrong with them."""
    chat = read_chat(held[KINDS[kind][0]], KINDS[kind][0])
    notes += chat.notes
    return _with_extras(chat.messages, chat.untrained, held, notes)


def _chat_of_completion(
    held: Mapping[str, Any], notes: list[str]
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return a prompt and a completion, of which at least one is a list of messages, as one chat."""
    # Each as messages
    parts: list[list[dict[str, Any]]] = []
    untrained: tuple[int, ...] = ()
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = [held[name]] if isinstance(held[name], dict) else held[name]
        if _holds_chat(value):
            chat = read_chat(value, name)
            notes += chat.notes
            parts.append(chat.messages)
            untrained = chat.untrained
        else:
            text = check_message(value, str, repr(name))
            parts.append([{"role": role, "content": text}] if text.strip() else [])
            untrained = ()
    prompt, completion = parts
    if not any(message["role"] == "assistant" for message in completion):
        raise BadRowError("no assistant turn in 'completion', so nothing to learn")

    # A completion that repeats the prompt is the whole chat
    offset = len(prompt)
    if completion[:offset] == prompt:
        completion = completion[offset:]
        untrained = tuple(number - offset for number in untrained if number >= offset)
    answered = [number for number, message in enumerate(prompt) if message["role"] == "assistant"]
    untrained = (*answered, *(offset + number for number in untrained))
    return _with_extras([*prompt, *completion], untrained, held, notes)


def _holds_chat(value: object) -> bool:
    return is_chat([value] if isinstance(value, dict) else value)


def _with_extras(
    messages: list[dict[str, Any]],
    untrained: tuple[int, ...],
    held: Mapping[str, Any],
    notes: list[str],
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return a chat's fields with the row's system message and tools, and which messages are not to be learned."""
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadRowError("no assistant turn, so nothing to learn")
    if set(turns) <= set(untrained):
        raise BadRowError("no assistant turn that may be learned: all say that they are not to be")
    system = check_message(held.get("system", ""), str, "'system'")
    if system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
        untrained = tuple(number + 1 for number in untrained)
    elif system.strip() and system.strip() != messages[0]["content"].strip():
        notes.append("the row's system message is not used, since its messages begin with another")
    tools = check_message(parsed(held.get("tools") or []), list, "'tools'")
    return {"messages": messages} | ({"tools": tools} if tools else {}), untrained
