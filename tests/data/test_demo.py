import hashlib
import json

from mlx_loraplus.data.demo import demo_rows, read_intents

INTENTS = read_intents()
ROWS = demo_rows()


def commands(split: str) -> list[dict[str, str | int]]:
    return [json.loads(row["completion"]) for row in ROWS[split]]


def test_the_same_rows_everywhere():
    text = json.dumps(list(ROWS.values()))
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "44592176dc6cb7e3e56a130b0616c9d6ecf64721984a49894472e23f985911eb"
    )


def test_sizes_and_balance():
    assert {split: len(rows) for split, rows in ROWS.items()} == {
        "train": 1200,
        "valid": 150,
        "test": 150,
    }
    for split in ROWS:
        actions = [command["action"] for command in commands(split)]
        assert {actions.count(intent.action) for intent in INTENTS} == {len(actions) / len(INTENTS)}


def test_no_prompt_and_no_command_twice():
    every = [row for rows in ROWS.values() for row in rows]
    assert len({row["prompt"] for row in every}) == 1500
    assert len({row["completion"] for row in every}) == 1500


def test_held_out_values_and_wordings_were_seen_in_training():
    def values(split: str) -> set[tuple[object, ...]]:
        return {
            (command["action"], *slot) for command in commands(split) for slot in command.items()
        }

    assert values("valid") | values("test") <= values("train")
    for intent in INTENTS:
        train = " ".join(row["prompt"] for row in ROWS["train"])
        for wording in intent.wordings:
            assert max(wording.replace("}", "{").split("{")[::2], key=len) in train


def test_commands_are_canonical_and_say_what_was_asked():
    spoken = {
        "two": 2,
        "three": 3,
        "four": 4,
        "five": 5,
        "six": 6,
        "seven": 7,
        "eight": 8,
        "nine": 9,
        "ten": 10,
    }
    for row in ROWS["train"] + ROWS["test"]:
        request = row["prompt"].removeprefix("Request: ").removesuffix("\nCommand:")
        command = json.loads(row["completion"])
        assert row["completion"] == f" {json.dumps(command)}"
        for name, value in list(command.items())[1:]:
            if name == "count":
                assert [
                    number for word, number in spoken.items() if f" {word} " in f" {request} "
                ] == [value]
            else:
                assert str(value).removesuffix(":00") in request


def test_rows_are_short_for_gemma(gemma):
    for row in ROWS["train"] + ROWS["valid"] + ROWS["test"]:
        assert len(gemma.encode(row["prompt"] + row["completion"])) + 1 <= 50
