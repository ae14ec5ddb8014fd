"""The built-in demo set: English requests to a home assistant, and the JSON command for each.

::

    Request: dim the kitchen lights to 40%
    Command: {"action": "light", "room": "kitchen", "level": 40}

The rows are generated in memory from the wordings and arguments in demo.toml and a fixed seed, so
they are the same on every machine. No two rows of an action have the same arguments. Validation and
test rows therefore use combinations of arguments that are not in train. The single values and
wordings all occur in train.
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
    """One action and the ways to ask for it.

    Attributes:
        action: Name of the action in the command.
        wordings: Requests with a placeholder for each argument.
        arguments: For each argument, pairs of the words in the request and the value in the
            command.
    """

    action: str
    wordings: Sequence[str]
    arguments: Mapping[str, Mapping[str, str | int]]

    def make_row(self, wording: str, words: Sequence[str]) -> dict[str, str]:
        """Return a row that asks for the action with these words for its arguments."""
        spoken = dict(zip(self.arguments, words, strict=True))
        command: dict[str, str | int] = {"action": self.action}
        for name, word in spoken.items():
            command[name] = self.arguments[name][word]
        return {
            "prompt": f"Request: {wording.format(**spoken)}\nCommand:",
            "completion": f" {json.dumps(command)}",
        }


def read_intents() -> list[Intent]:
    """Read demo.toml.

    An argument is a table that maps words to values, or a list if words and values are the same.
    """
    path = Path(__file__).with_name("demo.toml")
    intents = tomllib.loads(path.read_text(encoding="utf-8"))["intent"]
    for intent in intents:
        for name, values in intent["arguments"].items():
            if isinstance(values, list):
                intent["arguments"][name] = {str(value): value for value in values}
    return [Intent(**intent) for intent in intents]


def demo_rows() -> dict[str, list[dict[str, str]]]:
    """Return the demo set by split: 1,200 train, 150 valid and 150 test rows."""
    # Only random() is used, because its sequence is the same in every Python version
    random = Random(SEED)  # noqa: S311

    def shuffled(items: Sequence[Any]) -> list[Any]:
        return sorted(items, key=lambda _: random.random())

    # Each combination of arguments is used in one split only
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in ROWS_PER_INTENT}
    for intent in read_intents():
        combinations = iter(shuffled(list(product(*intent.arguments.values()))))
        for split, count in ROWS_PER_INTENT.items():
            for words in islice(combinations, count):
                wording = intent.wordings[int(random.random() * len(intent.wordings))]
                rows[split].append(intent.make_row(wording, words))

    return {split: shuffled(rows[split]) for split in rows}
