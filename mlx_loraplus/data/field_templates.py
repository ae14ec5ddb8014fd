r"""Build a field from several columns: ``--fields "prompt={subject}\n{body}"``.

Braces hold the name of a column, and {{ and }} stand for braces. In the text between them, ``\n``
is a line break, ``\t`` a tab and ``\\`` a backslash, because a shell has no simple way to type
them.
"""

import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from ..errors import nearest
from .messages import BadRowError, MissingFieldsError, is_missing, type_name

Part = tuple[str, str | None]
"""Text, and the column that follows it; None at the end of the template."""

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
_ESCAPE = re.compile(r"\\[nt\\]")


def is_template(column: str) -> bool:
    """Return whether the value of a field in ``--fields`` is a template, not a column's name."""
    return "{" in column or "}" in column


def parse_template(template: str) -> list[Part]:
    """Return the parts of a template.

    Raises:
        ValueError: It is not a template; the message says why.
    """
    parts: list[Part] = []
    for text, column, form, conversion in Formatter().parse(template):
        if column is not None and (not column or form or conversion):
            raise ValueError("braces hold the name of a column, and {{ and }} stand for braces")
        parts.append((_ESCAPE.sub(lambda found: _ESCAPES[found[0]], text), column))

    if not any(column for _, column in parts):
        raise ValueError("it names no column in braces")
    return parts


def template_columns(names: Mapping[str, str]) -> set[str]:
    """Return the columns that the templates in ``names`` use."""
    columns: set[str] = set()
    for value in names.values():
        if is_template(value):
            columns |= {column for _, column in parse_template(value) if column}
    return columns


def read_columns(
    row: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[dict[str, Any], set[str]]:
    """Return a row's columns that hold a value, and which of them the templates use.

    The text of each template is a column like the others; its name is the template.

    Args:
        row: The row as it was read.
        names: The column or template of each field.

    Raises:
        BadRowError: As for ``fill_templates``.
    """
    values = {column: value for column, value in row.items() if not is_missing(value)}
    in_templates = template_columns(names)
    if in_templates:
        values = fill_templates(row, values, names)
    return values, in_templates


def fill_templates(
    row: Mapping[str, Any], values: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    """Return a row's values with one more column for each template, named like the template.

    The values of a row that has none of the columns that ``names`` uses are returned unchanged.

    Args:
        row: The row as it was read.
        values: The row's columns, without missing values.
        names: The column or template of each field.

    Raises:
        BadRowError: The row lacks a column of a template, or the column holds no text or number.
    """
    filled = dict(values)
    if (template_columns(names) | set(names.values())).isdisjoint(values):
        return filled

    for field, template in names.items():
        if is_template(template):
            filled[template] = _fill(field, parse_template(template), row)
    return filled


def _fill(field: str, parts: Sequence[Part], row: Mapping[str, Any]) -> str:
    """Return the text of one template for a row."""
    pieces: list[str] = []
    for text, column in parts:
        pieces.append(text)
        if column is None:
            continue

        if column not in row:
            raise MissingFieldsError(
                f"no {column!r:.40}, which the template of {field} uses{nearest(column, row)}"
            )
        value = row[column]
        if is_missing(value):
            raise BadRowError(f"{column!r:.40} is null, and the template of {field} needs text")
        if not isinstance(value, str | int | float):
            raise BadRowError(
                f"{column!r:.40} holds {type_name(value)}, and the template of {field} needs text"
            )
        pieces.append(str(value))
    return "".join(pieces)
