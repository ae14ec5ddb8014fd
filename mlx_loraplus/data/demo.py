"""The built-in demo set: requests to a home assistant in plain English, and the command each one means, in JSON.

::

    Request: dim the kitchen lights to 40%
    Command: {"action": "light", "room": "kitchen", "level": 40}

Made in memory of the wordings and arguments in demo.toml from a fixed seed, the same rows on every machine. No two rows
of an action share all their arguments, so a validation or test row asks for a combination that training never showed,
in values and wordings that it did show.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from random import Random
from typing import TypeVar

from .records import Record

Value = str | int
Item = TypeVar("Item")

SEED = 1
ROWS_PER_INTENT = {"train": 200, "valid": 25, "test": 25}


@dataclass(frozen=True)
class Splits:
    """The demo set's rows."""

    train: list[Record]
    valid: list[Record]
    test: list[Record]


@dataclass(frozen=True)
class Intent:
    """One action: how people ask for it, and for every argument what they say and what the command then holds."""

    action: str
    wordings: Sequence[str]
    arguments: Mapping[str, Mapping[str, Value]]


def read_intents() -> list[Intent]:
    """Read demo.toml: an argument is a table of what is said and what is meant, or a list where both are the same."""
    intents = tomllib.loads(Path(__file__).with_name("demo.toml").read_text(encoding="utf-8"))["intent"]
    for intent in intents:
        for name, values in intent["arguments"].items():
            if isinstance(values, list):
                intent["arguments"][name] = {str(value): value for value in values}
    return [Intent(**intent) for intent in intents]


def demo_splits() -> Splits:
    """Return the demo set: 1,200 train, 150 valid and 150 test completion rows."""
    random = Random(SEED)  # noqa: S311 (only random() is used: its sequence is the same in every Python)
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in ROWS_PER_INTENT}
    for intent in read_intents():
        combinations = iter(_shuffled(list(product(*(values.items() for values in intent.arguments.values()))), random))
        for split, count in ROWS_PER_INTENT.items():
            for combination in islice(combinations, count):
                wording = intent.wordings[int(random.random() * len(intent.wordings))]
                rows[split].append(_row(intent, wording, combination))
    records: dict[str, list[Record]] = {}
    for split in rows:
        shuffled = enumerate(_shuffled(rows[split], random), start=1)
        records[split] = [Record("completion", row, f"demo {split} row {number}") for number, row in shuffled]
    return Splits(**records)


def _row(intent: Intent, wording: str, combination: Sequence[tuple[str, Value]]) -> dict[str, str]:
    """Write one request and its command; ``combination`` holds (as said, as commanded) of every argument, in order."""
    said = dict(zip(intent.arguments, (words for words, _ in combination), strict=True))
    meant = dict(zip(intent.arguments, (value for _, value in combination), strict=True))
    command = json.dumps({"action": intent.action, **meant})
    return {"prompt": f"Request: {wording.format(**said)}\nCommand:", "completion": f" {command}"}


def _shuffled(items: Sequence[Item], random: Random) -> list[Item]:
    return sorted(items, key=lambda _: random.random())
