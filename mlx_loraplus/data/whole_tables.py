"""Recognize an object that is a whole table, and not one of its rows."""

from collections.abc import Mapping
from typing import Any, cast

from ..errors import counted
from .messages import BadRowError, is_chat

_PANDAS = (
    "pandas.read_json(FILE{}).to_json('rows.jsonl', orient='records', lines=True) writes them so"
)


def check_is_row(row: object) -> None:
    """Check that a row is not a table that is written as one object.

    Rows of every kind have a string, or a list of messages, which the columns of a table are not.

    Raises:
        BadRowError: It is; the message says how to convert it.
    """
    if not isinstance(row, dict) or not row:
        return
    table = cast("dict[str, Any]", row)
    if count := _length_of_columns(table):
        raise BadRowError(
            f"it is a table of columns with {counted(count, 'value')} each, not a row: write each"
            f" row as an object of its own; {_PANDAS.format('')}"
        )
    if _holds_named_rows(table):
        raise BadRowError(
            f"it is an object of {counted(len(table), 'row')}, not a row: write them as a list,"
            f" without their names; {_PANDAS.format(', orient=' + repr('index'))}"
        )


def _length_of_columns(table: Mapping[str, Any]) -> int:
    """Return the number of values in each column; 0 if an object is not a table of columns."""
    values = list(table.values())

    # Columns as lists, such as two of strings or one of chats. Other lists may be tokens.
    if all(isinstance(value, list) for value in values):
        lists = cast("list[list[Any]]", values)
        texts = [column for column in lists if column and all(map(_is_string, column))]
        chats = [column for column in lists if column and all(map(is_chat, column))]
        is_table = len({len(column) for column in lists}) == 1 and (len(texts) > 1 or chats)
        return len(lists[0]) if is_table else 0

    # Columns as objects, from the numbers of the rows to the values.
    if all(isinstance(value, dict) for value in values):
        numbered = cast("list[dict[str, Any]]", values)
        numbers = {tuple(column) for column in numbered}
        if len(numbers) == 1 and all(name.isdecimal() for name in next(iter(numbers))):
            return len(numbered[0])
    return 0


def _holds_named_rows(table: Mapping[str, Any]) -> bool:
    """Return whether an object holds several objects with the same fields."""
    fields = [frozenset(value) for value in table.values() if isinstance(value, dict)]
    return len(fields) == len(table) > 1 and len(set(fields)) == 1 and bool(fields[0])


def _is_string(value: object) -> bool:
    return isinstance(value, str)
