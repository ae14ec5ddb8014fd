"""Leaks between splits, unused files, exact epochs and repeated keys."""

import json
from pathlib import Path

import pytest

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.overlaps import find_overlaps
from mlx_loraplus.data.sources import find_sources
from mlx_loraplus.settings import configure
from mlx_loraplus.training.schedule import schedule_of
from tests.data.reading import GOOD, load, write

SYSTEM = {"role": "system", "content": "Be kind"}


def conversation(number: int, turns: int) -> list[dict[str, str]]:
    parts = [SYSTEM]
    for turn in range(turns):
        parts += [
            {"role": "user", "content": f"q{number}.{turn}"},
            {"role": "assistant", "content": f"a{turn}"},
        ]
    return parts


def test_growing_prefixes_of_a_conversation_stay_on_one_side(tmp_path: Path, letters):
    rows = [
        json.dumps({"messages": conversation(n, turns)}) for n in range(10) for turns in (1, 2, 3)
    ]
    file = write(tmp_path / "data", rows="\n".join(rows)) / "rows.jsonl"
    tokenizer = letters("chatml", special="<|im_start|>", ends="<|im_end|>")
    split = load(tokenizer, file, valid_split=0.3).examples
    sides = [{(int(split[name].place(i).split(":")[1]) - 1) // 3 for i in range(len(split[name]))}
             for name in ("train", "valid")]  # fmt: skip
    assert (len(sides[0]), len(sides[1])) == (7, 3)
    assert not sides[0] & sides[1]


def test_a_conversation_that_begins_in_train_is_reported(tmp_path: Path, letters):
    train, valid = ([json.dumps({"messages": conversation(n, turns)}) for n in numbers]
                    for numbers, turns in ((range(3), 1), (range(2, 5), 2)))  # fmt: skip
    folder = write(tmp_path / "data", train="\n".join(train), valid="\n".join(valid))
    tokenizer = letters("chatml", special="<|im_start|>", ends="<|im_end|>")
    told = [overlap for overlap in find_overlaps(load(tokenizer, folder).examples) if overlap.count]
    assert [str(overlap) for overlap in told] == [
        "1 valid row whose conversation or text is partly in train (valid.jsonl:1 = train.jsonl:3)"
    ]


def test_a_test_row_that_chose_the_best_adapter_is_reported(tmp_path: Path, letters):
    train, other = (
        '{"prompt": "first", "completion": "b"}',
        '{"prompt": "next", "completion": "b"}',
    )
    folder = write(tmp_path / "data", train=train, valid=other, test=other)
    told = [str(each) for each in find_overlaps(load(letters(), folder).examples) if each.count]
    assert told == ["1 test row that is in valid (test.jsonl:1 = valid.jsonl:1)"]


def test_a_message_of_weight_0_is_not_learned(tmp_path: Path, letters):
    messages = conversation(0, 2)
    messages[2]["weight"] = 0  # type: ignore[assignment]
    file = write(tmp_path / "data", rows=json.dumps({"messages": messages})) / "rows.jsonl"
    tokenizer = letters("chatml", special="<|im_start|>", ends="<|im_end|>")
    (example,) = load(tokenizer, file).examples["train"]
    assert tokenizer.decode(example.tokens[example.supervised]) == "a1<|im_end|>"
    report = load(tokenizer, file, train_on="everything").reports["train"]
    assert any(
        note.startswith("messages that are excluded from training are trained on anyway")
        for note in report.notes
    )


@pytest.mark.parametrize(
    "name", ["eval", "validation", "dev", "val", "Valid", "EVAL-00000-of-00001"]
)
def test_names_of_validation_files(tmp_path: Path, name: str):
    folder = write(tmp_path / "data", train=GOOD, **{name: GOOD})
    assert find_sources([str(folder)])[0]["valid"]
    (table,) = find_sources([str(folder / "train.jsonl")])[0]["train"]
    assert table.notes == [
        f"files next to train.jsonl are not used: {name}.jsonl; to use them, give the folder instead:"
        f" --data {folder}"
    ]


def test_a_validation_file_that_is_given_as_a_second_data_set(tmp_path: Path):
    folder = write(tmp_path / "data", train=GOOD, valid=GOOD)
    train, valid = find_sources([str(folder / "train.jsonl"), str(folder / "valid.jsonl")])
    assert train["train"][0].notes == []
    assert valid["train"][0].notes == [
        "valid.jsonl is trained on, like every file of --data; to validate, give the folder instead:"
        f" --data {folder}"
    ]


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "batches"), [(0.07, 100, 7), (0.1 * 3, 100, 30), (1 / 3, 300, 100), (0.29, 100, 29),
                                         (1.1, 10, 11), (0.001, 10, 1), (0.011, 100, 2)],
)  # fmt: skip
def test_epochs_are_counted_exactly(epochs: float, per_epoch: int, batches: int):
    assert schedule_of(configure(TrainConfig, {"epochs": epochs}), per_epoch).batches == batches


def test_keys_that_are_twice_nan_and_arrays_among_lines(tmp_path: Path, letters):
    twice = '{"prompt": "a", "completion": "b", "completion": "c"}'
    nan = '{"prompt": "a", "completion": "b", "score": NaN}'
    data = load(letters(), write(tmp_path / "a", train=f"{twice}\n{nan}\n"), on_bad="drop")
    assert (len(data.examples["train"]), data.reports["train"].bad_rows) == (
        1, ["train.jsonl:1: the key 'completion' appears twice: keep one of them"],
    )  # fmt: skip
    for name, text in (("b", f"[{GOOD}, {GOOD}]"), ("c", f"[\n{GOOD},\n{GOOD}\n]\n")):
        assert len(load(letters(), write(tmp_path / name, train=text)).examples["train"]) == 2


def test_the_form_of_a_row_hides_no_leak(tmp_path: Path, letters):
    """A prompt with its answer is the same row as a chat, as a question, and in another case."""
    chat = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "this"}]
    train = json.dumps({"messages": chat})
    forms = [{"prompt": "what is it", "completion": "this"}, {"question": "What is  it", "answer": "THIS"},
             {"instruction": "what", "input": "is it", "output": "this"},
             {"conversations": [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": "this"}]}]  # fmt: skip
    valid = "\n".join(map(json.dumps, forms))
    folder = write(tmp_path / "data", train=train, valid=valid)
    tokenizer = letters("chatml", special="<|im_start|>", ends="<|im_end|>")
    (found,) = [each for each in find_overlaps(load(tokenizer, folder).examples) if each.count]
    assert str(found).startswith("4 valid rows that are in train (")


def test_rows_that_share_only_a_system_message_are_apart(tmp_path: Path, letters):
    system = {"role": "system", "content": "A long message of the system"}
    chats = [{"messages": [system, {"role": "assistant", "content": f"a{n}"}]} for n in range(5)]
    prompts = [{"system": system["content"], "prompt": f"Article {n}", "completion": "a"} for n in range(5)]  # fmt: skip
    tokenizer = letters("chatml", special="<|im_start|>", ends="<|im_end|>")
    for name, rows in (("chats", chats), ("prompts", prompts)):
        folder = write(tmp_path / name, train="\n".join(map(json.dumps, rows)))
        split = load(tokenizer, folder, valid_split=0.4).examples
        assert (len(split["train"]), len(split["valid"])) == (3, 2)


def test_tools_make_another_row(tmp_path: Path, letters):
    turns = [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "yes"}]
    rows = [json.dumps({"messages": turns, "tools": [{"name": name}]}) for name in ("a", "b")]
    tokenizer = letters("chatml", special="<|im_start|>", ends="<|im_end|>")
    (duplicates,) = find_overlaps(load(tokenizer, write(tmp_path / "data", train="\n".join(rows))).examples)  # fmt: skip
    assert duplicates.count == 0


def test_a_conversation_longer_than_the_validation_set_is_for_training(tmp_path: Path, letters):
    rows = [{"prompt": "same", "completion": f"c{n}"} for n in range(80)]
    rows += [{"prompt": f"other {n}", "completion": "c"} for n in range(20)]
    file = write(tmp_path / "data", train="\n".join(map(json.dumps, rows)))
    for seed in range(5):
        split = load(letters(), file, valid_split=0.1, seed=seed).examples
        assert (len(split["train"]), len(split["valid"])) == (90, 10)
