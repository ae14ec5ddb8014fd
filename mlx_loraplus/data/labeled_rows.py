"""Validate rows with one answer that is labeled desirable or undesirable.

The rows are those of TRL::

    {"prompt": "...", "completion": "...", "label": true}
    {"prompt": [messages], "completion": [messages], "label": false, "tools": [...]}

The label is true or false, 1 or 0, or one of these as text. The row of the answer is made like the
row of a prompt and its completion. Its kind is its label.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from .messages import BadRowError
from .preference_fields import make_answer, read_fields
from .rows import Row

_DESIRABLE = ("true", "1", "1.0")
_UNDESIRABLE = ("false", "0", "0.0")


def make_labeled(row: object, line: int, names: Mapping[str, str] | None = None) -> Row:
    """Validate a row with an answer and its label, and return it with its label as its kind.

    Args:
        row: An object.
        line: The row's line in its file.
        names: The column or template of each field, from ``parse_names``. If a row has none of
            these columns, ``names`` is ignored for this row.

    Raises:
        BadRowError: A field is missing or empty, or the label is not one of those allowed.
    """
    found = read_fields(row, names or {}, ("prompt", "completion", "label"))
    kind = _read_label(found.fields["label"])
    answer = make_answer(found.fields, "completion", line)
    return replace(
        answer,
        kind=kind,
        unused=found.unused,
        named=found.named,
        notes=(*found.notes, *answer.notes),
    )


def _read_label(value: object) -> Literal["desirable", "undesirable"]:
    """Return the kind of a label.

    Raises:
        BadRowError: It is none of the labels allowed.
    """
    text = str(value).strip().lower()
    if text in _DESIRABLE:
        return "desirable"
    if text in _UNDESIRABLE:
        return "undesirable"
    raise BadRowError(
        f"its label is {value!r:.40}; allowed are true or 1 for a desirable answer, and false or 0"
        " for an undesirable one"
    )
