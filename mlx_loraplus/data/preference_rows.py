"""Validate rows with two answers to one prompt: a chosen one and a rejected one.

The rows are those of TRL::

    {"prompt": "...", "chosen": "...", "rejected": "..."}
    {"prompt": [messages], "chosen": [messages], "rejected": [messages], "tools": [...]}
    {"chosen": [messages], "rejected": [messages]}

Without a prompt, the prompt is the beginning that the two conversations share. Each answer becomes
a ``Row`` of its own, which is made like the row of a prompt and its completion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .field_templates import read_columns
from .messages import BadRowError, is_chat, read_chat, type_name
from .row_kinds import find_kind
from .rows import Row, make_record

PAIR_FIELDS = ("prompt", "chosen", "rejected", "system", "system_prompt", "tools")

_SHARED = "the prompt is the beginning that chosen and rejected share, because the row has none"


def make_pair(row: object, line: int, names: Mapping[str, str] | None = None) -> Row:
    """Validate a row with two answers, and return that of the chosen one, which holds the other.

    Args:
        row: An object.
        line: The row's line in its file.
        names: The column or template of each field, from ``parse_names``. If a row has none of
            these columns, ``names`` is ignored for this row.

    Raises:
        BadRowError: An answer is missing or empty, both are equal, or their prompts differ.
    """
    if not isinstance(row, dict):
        raise BadRowError(f"{type_name(row)}, not an object with chosen and rejected")
    names = names or {}
    values, in_templates = read_columns(row, names)

    # Find the column of each field.
    named = {field: column for field, column in names.items() if column in values}
    columns = {field: field for field in PAIR_FIELDS if field in values} | named
    if not {"chosen", "rejected"} <= columns.keys():
        raise BadRowError(_explain(values, columns, names))
    fields = {field: values[column] for field, column in columns.items() if field in PAIR_FIELDS}

    # Make a row for each answer.
    notes: tuple[str, ...] = ()
    if "prompt" not in fields:
        fields |= _split_conversations(fields["chosen"], fields["rejected"])
        notes = (_SHARED,)
    chosen = _make_answer(fields, "chosen", line)
    rejected = _make_answer(fields, "rejected", line)
    _compare(chosen, rejected)

    used = {*columns.values(), *in_templates}
    return replace(
        chosen,
        kind="preference",
        unused=tuple(column for column in values if column not in used),
        named=bool(named),
        notes=(*notes, *dict.fromkeys((*chosen.notes, *rejected.notes))),
        rejected=rejected,
    )


def _explain(
    values: Mapping[str, Any], columns: Mapping[str, str], names: Mapping[str, str]
) -> str:
    """Return why a row is no pair, and which objective it suits."""
    missing = [field for field in ("chosen", "rejected") if field not in columns]
    found = ", ".join(f"{column!r:.40}" for column in list(values)[:6]) or "none"
    problem = f"no {' and no '.join(map(repr, missing))} (it has {found})"
    try:
        kind = find_kind(values, names).kind
    except BadRowError:
        return f"{problem}; name the columns, such as --fields chosen=COLUMN rejected=COLUMN"
    return f"{problem}; a row of kind {kind} suits --objective sft"


def _split_conversations(chosen: object, rejected: object) -> dict[str, Any]:
    """Return the prompt and the two answers of two conversations that begin with the same messages.

    Raises:
        BadRowError: They are not conversations, or don't begin with the same messages.
    """
    if not is_chat(chosen) or not is_chat(rejected):
        raise BadRowError(
            "chosen and rejected have no prompt: give it, such as --fields prompt=COLUMN, or write"
            " both as lists of messages that begin with it"
        )

    ones, others = read_chat(chosen, "chosen").messages, read_chat(rejected, "rejected").messages
    shared = 0
    while shared < min(len(ones), len(others)) and ones[shared] == others[shared]:
        shared += 1
    if ones == others:
        raise BadRowError("chosen and rejected are equal, so there is nothing to prefer")
    if not shared:
        raise BadRowError("chosen and rejected do not begin with the same prompt")
    if shared in (len(ones), len(others)):
        raise BadRowError("one of chosen and rejected is the beginning of the other")
    return {"prompt": ones[:shared], "chosen": ones[shared:], "rejected": others[shared:]}


def _make_answer(fields: Mapping[str, Any], name: str, line: int) -> Row:
    """Return the row of the prompt and one of the answers, ``name``."""
    row = {key: value for key, value in fields.items() if key not in ("chosen", "rejected")}
    row["completion"] = fields[name]

    # Only chats have tools.
    if "tools" in row and isinstance(row["prompt"], str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    try:
        return make_record(row, line)
    except BadRowError as problem:
        raise BadRowError(str(problem).replace("'completion'", repr(name))) from None


def _compare(chosen: Row, rejected: Row) -> None:
    """Raise BadRowError if two answers are equal or have different prompts."""
    if chosen.fields == rejected.fields:
        raise BadRowError("chosen and rejected are equal, so there is nothing to prefer")
    if ("messages" in chosen.fields) != ("messages" in rejected.fields):
        raise BadRowError("one of chosen and rejected is text, the other a list of messages")
    if _prompt_of(chosen) != _prompt_of(rejected):
        raise BadRowError("chosen and rejected do not begin with the same prompt")


def _prompt_of(row: Row) -> Sequence[Any]:
    """Return what comes before the first message to train on."""
    messages = row.fields.get("messages")
    if messages is None:
        return [row.fields["prompt"]]
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number not in row.untrained:
            return messages[:number]
    return messages
