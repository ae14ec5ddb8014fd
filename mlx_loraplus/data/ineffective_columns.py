"""Find columns that seem to change how a row is trained on, but have no effect.

A message may have a weight, and so may a whole data set (``data_weights``), but a row may not. A
row with a weight of 0 is refused, because it would otherwise be trained on. Other such columns, and
those with token ids or the name of a split, are reported.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .messages import SWITCHES, BadRowError, parse_json

_WEIGHTS = (
    *SWITCHES,
    "weights",
    "loss_weight",
    "sample_weight",
    "example_weight",
    "row_weight",
    "trainable",
)
_TOKENS = (
    "input_ids",
    "labels",
    "attention_mask",
    "loss_mask",
    "mask",
    "completion_mask",
    "assistant_masks",
)
_NUMBERS = {"true": 1.0, "false": 0.0}


def check_switches(
    row: Mapping[str, Any], unused: Sequence[str], *, named: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return notes on the unused columns that look like switches or tokens, and the other columns.

    A switch with the value 1 is neither noted nor returned: the row is trained on, as it asks.

    Args:
        row: The row's columns.
        unused: The names of the columns that are not used.
        named: Whether the row has a column that ``--fields`` names. Its other columns are then
            taken as ordinary data.

    Raises:
        BadRowError: A column excludes the row from training.
    """
    columns = {name.lower(): name for name in unused}
    explained: set[str] = set()

    # A weight of 0 excludes the row, other weights have no effect.
    weighted: list[str] = []
    for name in [columns[weight] for weight in _WEIGHTS if weight in columns]:
        value = _number(row[name])
        if value == 0 and not named:
            raise BadRowError(
                f"its {name} is {row[name]!r:.40}, which excludes it from training; use --on-bad"
                " drop to skip such rows, or name the columns to train on with --fields if"
                f" {name!r} is not a weight"
            )
        if value not in (None, 0, 1):
            weighted.append(name)
        if value is not None and not named:
            explained.add(name)

    notes: list[str] = []
    if weighted and not named:
        notes.append(
            f"a row's {', '.join(map(repr, weighted))} has no effect: give its assistant messages a"
            " weight of 0 or 1, or whole data sets a weight with --data-weights"
        )

    # 0 may mark an unwanted answer, as in KTO data, or be one of several classes
    label = columns.get("label")
    if label is not None and not named and _number(row[label]) == 0:
        explained.add(label)
        notes.append(
            f"rows with {label} 0 are trained on like the others; if it marks unwanted answers,"
            " leave these rows out, or use --objective kto"
        )

    # Lists of tokens, and of the ones to learn
    tokens = [columns[name] for name in _TOKENS if name in columns]
    tokens = [name for name in tokens if isinstance(parse_json(row[name]), list)]
    explained.update(tokens)
    if tokens:
        notes.append(
            f"{', '.join(map(repr, tokens))} of rows have no effect: the text is encoded with the"
            " model's tokenizer, and --train-on chooses what is learned"
        )
    if isinstance(row.get("split"), str) and "split" in unused:
        explained.add("split")
        notes.append(
            "'split' of rows has no effect: write the rows of each split to a file of its own, such"
            " as train.jsonl and valid.jsonl"
        )
    return tuple(notes), tuple(name for name in unused if name not in explained)


def _number(value: object) -> float | None:
    """Return the number that a value stands for, or None.

    The value may be a number, a boolean, or text that holds one of these.
    """
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, str):
        return None
    text = value.strip().lower()
    try:
        return _NUMBERS[text] if text in _NUMBERS else float(text)
    except ValueError:
        return None
