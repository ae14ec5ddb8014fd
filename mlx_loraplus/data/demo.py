"""The built-in demo set: requests to a home assistant in plain English, and the command each one means, in JSON.

::

    Request: dim the kitchen lights to 40%
    Command: {"action": "light", "room": "kitchen", "level": 40}

Made in memory of the wordings and arguments in demo.toml from a fixed seed, the same rows on every
machine. No two rows of an action share all their arguments, so a validation or test row asks for a
combination that training never showed, in values and wordings that it did show.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from random import Random
from typing import Any

SEED = 1
ROWS_PER_INTENT = {"train": 200, "valid": 25, "test": 25}


@dataclass(frozen=True)
class Intent:
    """One action: how people ask for it, and for every argument what they say and what the command then holds."""

    action: str
    wordings: Sequence[str]
    arguments: Mapping[str, Mapping[str, str | int]]


def read_intents() -> list[Intent]:
    """Read demo.toml: an argument is a table of what is said and what is meant, or a list where both are the same."""
    intents = tomllib.loads(Path(__file__).with_name("demo.toml").read_text(encoding="utf-8"))[
        "intent"
    ]
    for intent in intents:
        for name, values in intent["arguments"].items():
            if isinstance(values, list):
                intent["arguments"][name] = {str(value): value for value in values}
    return [Intent(**intent) for intent in intents]


def demo_rows() -> dict[str, list[dict[str, str]]]:
    """Return the demo set: 1,200 train, 150 valid and 150 test completion rows."""
    random = Random(SEED)  # noqa: S311 (only random() is used: its sequence is the same in every Python)

    def shuffled(items: Sequence[Any]) -> list[Any]:
        return sorted(items, key=lambda _: random.random())

    rows: dict[str, list[dict[str, str]]] = {split: [] for split in ROWS_PER_INTENT}
    for intent in read_intents():
        combinations = iter(
            shuffled(list(product(*(values.items() for values in intent.arguments.values()))))
        )
        for split, count in ROWS_PER_INTENT.items():
            for combination in islice(combinations, count):
                wording = intent.wordings[int(random.random() * len(intent.wordings))]
                said = {
                    name: words
                    for name, (words, _) in zip(intent.arguments, combination, strict=True)
                }
                meant = {
                    name: value
                    for name, (_, value) in zip(intent.arguments, combination, strict=True)
                }
                command = json.dumps({"action": intent.action, **meant})
                prompt = f"Request: {wording.format(**said)}\nCommand:"
                rows[split].append({"prompt": prompt, "completion": f" {command}"})
    return {split: shuffled(rows[split]) for split in rows}
