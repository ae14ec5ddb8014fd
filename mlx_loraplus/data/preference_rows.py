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

from .messages import BadRowError, is_chat, read_chat
from .preference_fields import make_answer, read_fields
from .rows import Row

_SHARED = "the prompt is the beginning that chosen and rejected share, because the row has none"


def make_pair(row: object, line: int, names: Mapping[str, str] | None = None) -> Row:
    """Validate a row with two answers, and return the chosen one, which holds the rejected one.

    Args:
        row: An object.
        line: The row's line in its file.
        names: The column or template of each field, from ``parse_names``. If a row has none of
            these columns, ``names`` is ignored for this row.

    Raises:
        BadRowError: An answer is missing or empty, both are equal, or their prompts differ.
    """
    found = read_fields(row, names or {}, ("chosen", "rejected"))
    fields = found.fields

    # Make a row for each answer.
    notes = found.notes
    if "prompt" not in fields:
        fields |= _divide_conversations(fields["chosen"], fields["rejected"])
        notes = (*notes, _SHARED)
    chosen = make_answer(fields, "chosen", line)
    rejected = make_answer(fields, "rejected", line)
    _compare(chosen, rejected)

    return replace(
        chosen,
        kind="preference",
        unused=found.unused,
        named=found.named,
        notes=(*notes, *dict.fromkeys((*chosen.notes, *rejected.notes))),
        rejected=rejected,
    )


def _divide_conversations(chosen: object, rejected: object) -> dict[str, Any]:
    """Return the prompt and the two answers of two conversations that begin with the same messages.

    Raises:
        BadRowError: They are not conversations, or don't begin with the same messages.
    """
    if not is_chat(chosen) or not is_chat(rejected):
        raise BadRowError(
            "chosen and rejected have no prompt: give it, such as --fields prompt=COLUMN, or write"
            " both as lists of messages that begin with it"
        )

    # Count the messages that both begin with.
    ones = read_chat(chosen, "chosen").messages
    others = read_chat(rejected, "rejected").messages
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
