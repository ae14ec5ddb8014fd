"""Find the kind of a row from the names of its columns.

A row's *columns* are the names in the file; its *fields* are the names used here, such as
``prompt`` and ``completion``. ``--fields`` maps fields to columns. A row of no known kind is tried
with the column names of public data sets in ``OTHER_NAMES``, such as those of Dolly and FLAN; any
other names need ``--fields``, and the error message suggests them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import nearest
from .advice import advise
from .messages import BadRowError, is_chat

Kind = Literal["chat", "sharegpt", "completion", "alpaca", "question", "text"]

KINDS: Mapping[Kind, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question": ("question", "answer"),
    "text": ("text",),
}
"""The fields that a row of each kind must have."""

EXTRAS: Mapping[Kind, tuple[str, ...]] = {
    "chat": ("tools", "system"),
    "sharegpt": ("tools", "system"),
    "completion": ("system",),
    "alpaca": ("input", "system"),
    "question": ("system",),
    "text": (),
}
"""The fields that a row of each kind may have."""

OTHER_NAMES: Sequence[Mapping[str, str]] = (
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
"""Fields and their columns in public data sets; optional fields may be missing from a row."""

_SHOWN_COLUMNS = 6  # column names in an error message


@dataclass(frozen=True)
class FieldColumns:
    """The kind of a row, and which of its columns holds which field."""

    kind: Kind
    columns: Mapping[str, str]  # field → column; optional fields may be missing from the row
    named: bool  # whether the row has a column that --fields names


def find_kind(row: Mapping[str, Any], names: Mapping[str, str]) -> FieldColumns:
    """Find a row's kind and the column of each of its fields.

    Args:
        row: The row's columns, without missing values.
        names: The column of each field that ``--fields`` names; rows without any of these columns
            are read as if ``--fields`` were not given.

    Raises:
        BadRowError: The row is of no kind, or of several.
    """
    named = not row.keys().isdisjoint(names.values())
    columns = _map_columns(row, names if named else {})
    present = {field for field, column in columns.items() if column in row}
    kinds: list[Kind] = [kind for kind, needed in KINDS.items() if present.issuperset(needed)]

    # The fields that the user names decide between several kinds.
    chosen = {field for field, column in names.items() if column in row}
    matches = {kind: len(chosen.intersection(needed)) for kind, needed in KINDS.items()}
    most = max(matches.values())
    if most:
        kinds = [kind for kind in kinds if matches[kind] == most]

    if len(kinds) > 1:
        choice = " ".join(f"{field}={columns[field]}" for field in KINDS[kinds[0]])
        raise BadRowError(
            f"fields of several kinds ({' and '.join(kinds)}): choose, such as --fields {choice}"
        )
    if kinds:
        return FieldColumns(kinds[0], columns, named)

    # Column names of public data sets come last.
    others = {} if most else _find_other_names(row)
    if others:
        return FieldColumns(_kind_of(others), columns | others, named)
    raise BadRowError(_explain(row, columns, names, named=named))


def _map_columns(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return the column of each field: the one in ``names``, else the column of the same name."""
    taken = {*names, *names.values()}
    columns = {column: column for column in row if column not in taken}
    if "system" not in columns and isinstance(row.get("system_prompt"), str):
        columns["system"] = "system_prompt"
    return columns | dict(names)


# --- column names of public data sets -----------------------------------------------------------


def _find_other_names(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns of the fields by ``OTHER_NAMES``, or {} if none or several kinds fit."""
    matching = [others for others in OTHER_NAMES if _fits(others, row)]
    if len({frozenset(_needed_columns(others)) for others in matching}) != 1:
        return {}

    best = max(matching, key=lambda others: len(row.keys() & set(others.values())))
    return {field: column for field, column in best.items() if column in row}


def _fits(others: Mapping[str, str], row: Mapping[str, Any]) -> bool:
    """Return whether a row has the columns of ``others`` with the right content."""
    columns = _needed_columns(others)

    # A column that is a field of another kind makes the row ambiguous.
    fields_of_kinds = {field for needed in KINDS.values() for field in needed}
    if not row.keys().isdisjoint(fields_of_kinds - set(columns)):
        return False

    is_right = is_chat if "messages" in others else _is_string
    return all(is_right(row.get(column)) for column in columns)


def _kind_of(others: Mapping[str, str]) -> Kind:
    return next(kind for kind, needed in KINDS.items() if others.keys() >= set(needed))


def _needed_columns(others: Mapping[str, str]) -> list[str]:
    """Return the columns of the fields that a row must have."""
    return [others[field] for field in KINDS[_kind_of(others)]]


def _is_string(value: object) -> bool:
    return isinstance(value, str)


# --- rows of no kind ----------------------------------------------------------------------------


def _explain(
    row: Mapping[str, Any], columns: Mapping[str, str], names: Mapping[str, str], *, named: bool
) -> str:
    """Return why a row is of no kind, and what to do about it."""
    shown = [f"{column!r:.40}" for column in list(row)[:_SHOWN_COLUMNS]]
    found = f"(it has {', '.join(shown) or 'none'})"
    misspelt = "" if named else _suggest_misspelt(row, names)

    # The first kind of which the row has a field is taken to be the intended one, beginning with
    # the kinds of the fields that the user names.
    present = {field for field, column in columns.items() if column in row}
    chosen = {field for field, column in names.items() if column in row}
    by_chosen = sorted(KINDS.values(), key=lambda needed: -len(chosen.intersection(needed)))

    for needed in by_chosen:
        missing = [field for field in needed if field not in present]
        if len(missing) == len(needed):
            continue

        column = columns.get(missing[0], missing[0])
        if named and missing[0] in names:
            similar = nearest(column, set(row) - set(names.values()))
            return f"no {column!r:.40} {found}{similar}"

        partial = {field: "" if field in missing else columns[field] for field in needed}
        return f"no {column!r:.40} {found}{misspelt or advise(row, partial)}"

    return f"no known field {found}{misspelt or advise(row)}"


def _suggest_misspelt(row: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return a column name in ``--fields`` that is almost one of the row's, or nothing."""
    for column in names.values():
        similar = nearest(column, row)
        if similar:
            return f"; --fields names {column!r:.40}, which the row does not have{similar}"
    return ""
