"""Find the kind of a row from the names of its columns.

A row's *columns* are the names in the file; its *fields* are the names used here, such as
``prompt`` and ``completion``. ``--fields`` maps fields to columns. If a row is of no known kind,
the column names of public data sets in ``OTHER_NAMES`` are tried, such as those of Dolly and FLAN.
Other column names need ``--fields``; the error message suggests a value for it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from ..errors import nearest
from .field_templates import is_template, template_columns
from .fields_advice import advise
from .messages import BadRowError, MissingFieldsError, is_chat

Kind = Literal[
    "chat",
    "sharegpt",
    "completion",
    "alpaca",
    "question",
    "text",
    "preference",
    "desirable",
    "undesirable",
]

REQUIRED: Mapping[Kind, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question": ("question", "answer"),
    "text": ("text",),
}
"""The fields that a row of each kind must have.

Rows of kind preference hold two answers; see ``preference_rows``. Rows of kind desirable and
undesirable hold an answer and its label; see ``labeled_rows``.
"""

OPTIONAL: Mapping[Kind, tuple[str, ...]] = {
    "chat": ("tools", "system"),
    "sharegpt": ("tools", "system"),
    "completion": ("system",),
    "alpaca": ("input", "system"),
    "question": ("system",),
    "text": (),
}
"""The fields that a row of each kind may have."""

FORMATS = ", ".join(" + ".join(needed) for needed in REQUIRED.values()).replace(
    ", text", ", or text"
)
"""The fields of all kinds, for error messages."""

PAIR_FORMAT = "prompt + chosen + rejected, or chosen + rejected as chats"
"""The fields of rows with two answers, for error messages."""

LABELED_FORMAT = "prompt + completion + label"
"""The fields of rows with an answer and its label, for error messages."""

_ALL_REQUIRED = frozenset(chain.from_iterable(REQUIRED.values()))
_SHOWN_COLUMNS = 6  # maximum number of column names in an error message


@dataclass(frozen=True)
class FieldColumns:
    """The kind of a row, and the column that holds each field."""

    kind: Kind
    columns: Mapping[str, str]  # field → column, for all fields that the row has
    named: bool  # whether the row has a column that --fields names


def find_kind(
    row: Mapping[str, Any], names: Mapping[str, str], nulls: Collection[str] = ()
) -> FieldColumns:
    """Find a row's kind and the column of each of its fields.

    Args:
        row: The row's columns, without missing values.
        names: The column of each field that ``--fields`` names. If a row has none of these columns,
            ``--fields`` is ignored for this row.
        nulls: The row's columns without a value, for the message.

    Raises:
        BadRowError: The row is of no known kind, or of several kinds.
    """
    # Find all kinds whose fields the row has.
    chosen = _present(names, row)
    named = bool(chosen)
    columns = _present(_map_columns(row, names if named else {}), row)
    kinds: list[Kind] = [kind for kind, needed in REQUIRED.items() if columns.keys() >= set(needed)]

    # If several kinds match, the fields that the user names decide.
    matches = {kind: len(chosen.keys() & set(needed)) for kind, needed in REQUIRED.items()}
    most = max(matches.values())
    if most:
        kinds = [kind for kind in kinds if matches[kind] == most]

    if len(kinds) > 1:
        choice = " ".join(f"{field}={columns[field]}" for field in REQUIRED[kinds[0]])
        raise BadRowError(
            f"fields of several row formats ({' and '.join(kinds)}): choose the columns, such as"
            f" --fields {choice}"
        )
    if kinds:
        return FieldColumns(kinds[0], columns, named)

    # Try the column names of public data sets last.
    other = None if most else _find_other_names(row)
    if other is not None:
        return FieldColumns(other.kind, columns | _present(other.columns, row), named)
    raise MissingFieldsError(_explain(row, columns, names, nulls))


def _present(names: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    """Return the part of ``names`` whose columns the row has."""
    return {field: column for field, column in names.items() if column in row}


def _map_columns(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return the column of each field: the one in ``names``, or the column of the same name."""
    taken = {*names, *names.values()}
    columns = {column: column for column in row if column not in taken}
    if "system" not in columns and isinstance(row.get("system_prompt"), str):
        columns["system"] = "system_prompt"
    return columns | dict(names)


# --- column names of public data sets -----------------------------------------------------------


@dataclass(frozen=True)
class KnownColumns:
    """The column names that some public data sets use for a kind of row."""

    kind: Kind
    columns: Mapping[str, str]  # field → column; a row may lack those of optional fields

    @property
    def needed(self) -> list[str]:
        """The columns that a row must have."""
        return [self.columns[field] for field in REQUIRED[self.kind]]

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row has the required columns with suitable content."""
        # A row is ambiguous if it has a column that is a field of another kind.
        if not row.keys().isdisjoint(_ALL_REQUIRED.difference(self.needed)):
            return False
        is_right = is_chat if self.kind == "chat" else _is_string
        return all(is_right(row.get(column)) for column in self.needed)


OTHER_NAMES = (
    KnownColumns(
        "alpaca", {"instruction": "instruction", "output": "response", "input": "context"}
    ),
    KnownColumns("alpaca", {"instruction": "instruction", "output": "response", "input": "input"}),
    KnownColumns("completion", {"prompt": "input", "completion": "output"}),
    KnownColumns("completion", {"prompt": "prompt", "completion": "response"}),
    KnownColumns("question", {"question": "question", "answer": "response"}),
    KnownColumns("question", {"question": "query", "answer": "answer"}),
    KnownColumns("question", {"question": "query", "answer": "response"}),
    KnownColumns("chat", {"messages": "conversation"}),
    KnownColumns("chat", {"messages": "dialog"}),
    KnownColumns("chat", {"messages": "dialogue"}),
)


def _find_other_names(row: Mapping[str, Any]) -> KnownColumns | None:
    """Return the known column names that fit a row, or None if none fit or several do."""
    fitting = [known for known in OTHER_NAMES if known.fits(row)]
    if len({frozenset(known.needed) for known in fitting}) != 1:
        return None
    return max(fitting, key=lambda known: len(_present(known.columns, row)))


def _is_string(value: object) -> bool:
    return isinstance(value, str)


# --- rows of no kind ----------------------------------------------------------------------------


def describe_columns(columns: Iterable[str], nulls: Collection[str]) -> str:
    """Return the names of a row's columns in parentheses, with those that are null apart."""
    own = [column for column in columns if not is_template(column)]
    found = ", ".join(f"{column!r:.40}" for column in own[:_SHOWN_COLUMNS])
    if not nulls:
        return f"(it has {found or 'none'})"
    empty = ", ".join(f"{column!r:.40}" for column in list(nulls)[:_SHOWN_COLUMNS])
    verb = "is" if len(nulls) == 1 else "are"
    return f"(it has {found or 'no other column'}; {empty} {verb} null)"


def describe_nulls(fields: Sequence[str], columns: Iterable[str], nulls: Collection[str]) -> str:
    """Return the problem of a row whose columns of missing fields are null.

    Args:
        fields: The columns of the missing fields.
        columns: The row's other columns.
        nulls: The row's columns without a value.

    Returns:
        The problem; "" if one of the fields has no column at all.
    """
    if not set(fields) <= set(nulls):
        return ""
    names = " and ".join(f"{name!r:.40}" for name in fields)
    verb = "is" if len(fields) == 1 else "are"
    others = [column for column in columns if not is_template(column)]
    found = describe_columns(others, ()) if others else "(it has no other column)"
    return f"{names} {verb} null {found}"


def _explain(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    names: Mapping[str, str],
    nulls: Collection[str],
) -> str:
    """Return why a row is of no known kind, and what to do about it."""
    chosen = _present(names, row)
    found = describe_columns(row, nulls)
    misspelled = "" if chosen else _suggest_misspelled(row, names)

    # Assume that the first kind with a field in the row is the intended one. Kinds with fields that
    # the user names come first.
    by_chosen = sorted(REQUIRED.values(), key=lambda needed: -len(chosen.keys() & set(needed)))
    for needed in by_chosen:
        missing = [field for field in needed if field not in columns]
        if len(missing) == len(needed):
            continue

        # The column may be there, but hold no value.
        if problem := describe_nulls([names.get(each, each) for each in missing], row, nulls):
            return problem

        # The user may have misspelled one of several columns.
        field = missing[0]
        if chosen and field in names:
            similar = nearest(names[field], set(row) - set(names.values()))
            return f"no {names[field]!r:.40} {found}{similar}"

        partial = {name: columns.get(name, "") for name in needed}
        return f"no {field!r:.40} {found}{misspelled or advise(row, partial)}"

    for needed in REQUIRED.values():
        if problem := describe_nulls([names.get(each, each) for each in needed], row, nulls):
            return problem
    return f"no known field {found}{misspelled or advise(row)}"


def _suggest_misspelled(row: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Suggest a correction for a misspelled column name in ``--fields``, or return nothing."""
    plain = [column for column in names.values() if not is_template(column)]
    for column in (*plain, *sorted(template_columns(names))):
        similar = nearest(column, row)
        if similar:
            return f"; --fields names {column!r:.40}, which the row does not have{similar}"
    return ""
