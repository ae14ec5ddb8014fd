"""The built-in demo set: requests to a home assistant in plain English, and the command each one means, in JSON.

::

    Request: dim the kitchen lights to 40%
    Command: {"action": "light", "room": "kitchen", "level": 40}

Made in memory from a fixed seed, the same rows on every machine. No two rows of an action share all their arguments, so
a validation or test row asks for a combination that training never showed, in values and wordings that it did show.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
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


def _as_said(*values: Value) -> dict[str, Value]:
    """Return an argument's values that stand in the command just as they are said."""
    return {str(value): value for value in values}


ROOMS = _as_said(
    *("kitchen", "bedroom", "bathroom", "hall", "garage", "office", "attic"),
    *("cellar", "nursery", "study", "garden", "lounge", "pantry"),
)
COUNTS: dict[str, Value] = {
    word: number
    for number, word in enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), start=2)
}
TIMES: dict[str, Value] = {
    f"{hour}:{minute:02}" if minute else f"{hour}": f"{hour}:{minute:02}"
    for hour, minute in product(range(1, 13), (0, 30))
}

INTENTS = (
    Intent(
        "light",
        (
            "dim the {room} lights to {level}%",
            "set the {room} light to {level} percent",
            "I'd like the {room} lights at {level}%",
            "make it brighter in the {room}, {level} percent please",
            "can you put the {room} lamp on {level}%",
            "lights in the {room} to {level}",
        ),
        {"room": ROOMS, "level": _as_said(*range(5, 105, 5))},
    ),
    Intent(
        "timer",
        (
            "set a timer for {minutes} minutes for the {label}",
            "remind me about the {label} in {minutes} minutes",
            "{minutes} minute timer for the {label}",
            "start a {label} timer, {minutes} minutes",
            "the {label} needs {minutes} minutes, time it please",
            "let me know in {minutes} minutes to check the {label}",
        ),
        {
            "minutes": _as_said(*range(2, 21), *range(25, 60, 5)),
            "label": _as_said("pasta", "tea", "rice", "laundry", "bread", "pizza", "cake", "soup", "roast", "workout"),
        },
    ),
    Intent(
        "play",
        (
            "play some {music} in the {room}",
            "put {music} on in the {room}",
            "I want to hear {music} in the {room}",
            "how about a bit of {music} for the {room}",
            "start {music} on the {room} speaker",
            "{room} speaker: {music} please",
        ),
        {
            "music": _as_said(
                *("jazz", "rock", "techno", "opera", "blues", "folk", "soul", "reggae", "disco", "punk"),
                *("salsa", "metal", "gospel", "ambient", "funk", "tango", "country", "swing", "harp", "piano"),
            ),
            "room": ROOMS,
        },
    ),
    Intent(
        "message",
        (
            "tell {to} that {text}",
            "text {to}: {text}",
            "send {to} a message saying {text}",
            "let {to} know {text}",
            "write to {to} that {text}",
            "message for {to}, {text}",
        ),
        {
            "to": _as_said(
                *("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Kevin"),
                *("Laura", "Maria", "Nina", "Oscar", "Paul", "Rosa"),
            ),
            "text": _as_said(
                *("I am running late", "dinner is ready", "the train is delayed", "I will call tonight"),
                *("the meeting moved", "we need more milk", "the keys are inside", "I am at home"),
                *("the car is fixed", "see you on Sunday", "the parcel arrived", "thanks for the help"),
                *("I missed the bus", "the door is open", "lunch is at noon", "good luck today"),
            ),
        },
    ),
    Intent(
        "event",
        (
            "add {title} on {day} at {time}",
            "put {title} in my calendar for {day} at {time}",
            "I have {title} at {time} on {day}",
            "schedule {title} for {day}, {time}",
            "book {title} at {time} this {day}",
            "{day} at {time}: {title}",
        ),
        {
            "title": _as_said(
                *("dentist", "yoga", "lunch", "haircut", "football"),
                *("choir", "interview", "therapy", "dinner", "chess"),
            ),
            "day": _as_said("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
            "time": TIMES,
        },
    ),
    Intent(
        "buy",
        (
            "add {count} {item} to the shopping list",
            "we need {count} {item}",
            "put {count} {item} on the list",
            "buy {count} {item} please",
            "don't forget to get {count} {item}",
            "we're out of {item}, get {count}",
        ),
        {
            "item": _as_said(
                *("lemons", "eggs", "apples", "onions", "candles", "bananas", "carrots", "bagels", "peppers", "pears"),
                *("tomatoes", "batteries", "limes", "mangoes", "cookies", "muffins", "potatoes", "oranges", "plums"),
                *(
                    "sponges",
                    "light bulbs",
                    "avocados",
                    "cucumbers",
                    "yoghurts",
                    "radishes",
                    "pizzas",
                    "melons",
                    "figs",
                ),
            ),
            "count": COUNTS,
        },
    ),
)


def demo_splits() -> Splits:
    """Return the demo set: 1,200 train, 150 valid and 150 test completion rows."""
    random = Random(SEED)  # noqa: S311 (only random() is used: its sequence is the same in every Python)
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in ROWS_PER_INTENT}
    for intent in INTENTS:
        combinations = iter(_shuffled(list(product(*(values.items() for values in intent.arguments.values()))), random))
        for split, count in ROWS_PER_INTENT.items():
            for combination in islice(combinations, count):
                wording = intent.wordings[int(random.random() * len(intent.wordings))]
                rows[split].append(_row(intent, wording, combination))
    return Splits(
        **{
            split: [
                Record("completion", row, f"demo {split} row {number}")
                for number, row in enumerate(_shuffled(rows[split], random), start=1)
            ]
            for split in rows
        }
    )


def _row(intent: Intent, wording: str, combination: Sequence[tuple[str, Value]]) -> dict[str, str]:
    """Write one request and its command; ``combination`` holds (as said, as commanded) of every argument, in order."""
    said = dict(zip(intent.arguments, (words for words, _ in combination), strict=True))
    meant = dict(zip(intent.arguments, (value for _, value in combination), strict=True))
    command = json.dumps({"action": intent.action, **meant})
    return {"prompt": f"Request: {wording.format(**said)}\nCommand:", "completion": f" {command}"}


def _shuffled(items: Sequence[Item], random: Random) -> list[Item]:
    return sorted(items, key=lambda _: random.random())
