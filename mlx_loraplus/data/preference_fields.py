"""Read the fields of rows that say which answers are preferred."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .field_templates import read_columns
from .ineffective_columns import check_switches
from .messages import BadRowError, MissingFieldsError, type_name
from .row_kinds import describe_columns, describe_nulls, find_kind
from .rows import Row, make_row

_PROMPT_FIELDS = ("prompt", "system", "system_prompt", "tools")


@dataclass(frozen=True)
class AnswerFields:
    """The fields of a row.

    Attributes:
        fields: The value of each field.
        unused: The names of the columns that are not used.
        named: Whether the row has a column that ``--fields`` names.
        notes: Remarks for the report.
    """

    fields: dict[str, Any]
    unused: tuple[str, ...]
    named: bool
    notes: tuple[str, ...]


def read_fields(row: object, names: Mapping[str, str], needed: Sequence[str]) -> AnswerFields:
    """Return the fields of a row: the needed ones, and those of its prompt.

    Args:
        row: An object.
        names: The column or template of each field, from ``parse_names``. If a row has none of
            these columns, ``names`` is ignored for this row.
        needed: The fields that the row must have.

    Raises:
        BadRowError: A needed field is missing, or a column excludes the row from training.
    """
    if not isinstance(row, dict):
        raise MissingFieldsError(f"{type_name(row)}, not an object with {' and '.join(needed)}")
    values, in_templates = read_columns(row, names)

    # Find the column of each field.
    known = (*needed, *_PROMPT_FIELDS)
    named = {field: column for field, column in names.items() if column in values}
    columns = {field: field for field in known if field in values} | named
    missing = [field for field in needed if field not in columns]
    if missing:
        nulls = [column for column in row if column not in values]
        raise MissingFieldsError(_explain(values, missing, names, nulls))

    fields = {field: values[column] for field, column in columns.items() if field in known}
    used = {*columns.values(), *in_templates}
    unused = tuple(column for column in values if column not in used)
    notes, unused = check_switches(values, unused, named=bool(named))
    return AnswerFields(fields, unused, bool(named), notes)


def make_answer(fields: Mapping[str, Any], name: str, line: int) -> Row:
    """Return the row of the prompt and the answer in the field ``name``.

    Raises:
        BadRowError: As for ``make_row``.
    """
    row = {key: fields[key] for key in _PROMPT_FIELDS if key in fields}
    row["completion"] = fields[name]

    # Only chats have tools.
    if "tools" in row and isinstance(row["prompt"], str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    try:
        return make_row(row, line)
    except BadRowError as problem:
        raise BadRowError(str(problem).replace("'completion'", repr(name))) from None


def _explain(
    values: Mapping[str, Any],
    missing: Sequence[str],
    names: Mapping[str, str],
    nulls: Sequence[str],
) -> str:
    """Return which fields a row lacks, and which objective it suits.

    Args:
        values: The row's columns, without missing values.
        missing: The fields that it lacks.
        names: The column or template of each field that ``--fields`` names.
        nulls: The row's columns without a value.
    """
    columns = [names.get(field, field) for field in missing]
    absent = f"no {' and no '.join(map(repr, missing))} {describe_columns(values, nulls)}"
    problem = describe_nulls(columns, values, nulls) or absent

    # Rows of another objective.
    if {"chosen", "rejected"} <= values.keys():
        return (
            f"{problem}; a row with chosen and rejected suits --objective dpo, ipo, orpo or simpo"
        )
    try:
        kind = find_kind(values, names).kind
    except BadRowError:
        columns = " ".join(f"{field}=COLUMN" for field in missing)
        return f"{problem}; name the columns, such as --fields {columns}"
    if kind == "completion" and "label" in values:
        return f"{problem}; a row with prompt, completion and label suits --objective kto"
    return f"{problem}; a {kind} row suits --objective sft"
