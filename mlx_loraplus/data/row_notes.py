"""Notes on encoded rows, which the report on a split counts."""

from collections.abc import Iterable, Sequence

import numpy as np

from .encoding_settings import EncodingSettings
from .rows import Row
from .tokenize import EncodedRow, Example


def notes_on(
    row: Row, encoded: EncodedRow, examples: Sequence[Example], encoding: EncodingSettings
) -> Iterable[str]:
    """Return the notes on a row, without duplicates.

    Args:
        row: The row.
        encoded: The result of ``encode`` for the row.
        examples: Its examples that have a supervised token.
        encoding: What the row was encoded with.
    """
    # Notes on the row's messages and columns
    notes = [*encoded.notes, *row.notes]
    if row.untrained and encoding.train_on == "everything":
        notes.append(
            "messages that are excluded from training are trained on anyway, because --train-on is"
            " everything"
        )
    if row.unused:
        notes.append(f"unused fields: {', '.join(map(repr, row.unused)):.300}")
    if encoding.names and not row.named:
        columns = ", ".join(map(repr, encoding.names.values()))
        notes.append(
            f"none of the columns named by --fields ({columns:.300}) was found, so the columns were"
            " auto-detected"
        )

    # Some templates put a line break after the end-of-turn token, so check the last two tokens
    ends = set(encoding.tokenizer.eos_token_ids)
    for example in examples:
        targets = np.flatnonzero(example.supervised)
        last_targets = example.tokens[targets[-2:]].tolist()
        if ends.isdisjoint(last_targets):
            notes.append(
                "the last supervised tokens do not end generation, so the model may not learn to"
                " stop"
            )
    return dict.fromkeys(notes)
