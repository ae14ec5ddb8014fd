"""Rows with an answer and its label, what is wrong with some, and their mismatched answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_loraplus as ml
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.dataset import SPAN, EncodedTable, Examples
from mlx_loraplus.data.fields_setting import parse_names
from mlx_loraplus.data.first_rows import check_rows
from mlx_loraplus.data.labeled import LabeledBatches, LabeledExamples
from mlx_loraplus.data.labeled_rows import make_labeled
from mlx_loraplus.data.load_data import load_data
from mlx_loraplus.data.messages import BadRowError
from mlx_loraplus.data.preference_rows import make_pair
from mlx_loraplus.data.row_problems import RowProblems
from mlx_loraplus.data.rows import make_row
from mlx_loraplus.data.stored_rows import ROW
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.errors import ConfigError, DataError
from mlx_loraplus.settings import configure
from mlx_loraplus.training.make_batches import plan_batches
from scripts.tiny_model import write_tiny_model

USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello"}
PLAIN = {"prompt": "2 + 2 =", "completion": " 4", "label": True}


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1", np.True_])
def test_desirable_labels(label: Any):
    made = make_labeled(PLAIN | {"label": label}, 7)
    assert (made.kind, made.line) == ("desirable", 7)
    assert made.fields == {"prompt": "2 + 2 =", "completion": " 4"}


@pytest.mark.parametrize("label", [False, 0, 0.0, "false", " FALSE ", "0", np.False_])
def test_undesirable_labels(label: Any):
    assert make_labeled(PLAIN | {"label": label}, 7).kind == "undesirable"


def test_messages_system_and_tools():
    row = {"prompt": [USER], "completion": [GOOD], "label": False, "score": 3}
    made = make_labeled(row, 1)
    assert made.fields == {"messages": [USER, GOOD]}
    assert made.unused == ("score",)

    tools = [{"type": "function", "function": {"name": "f"}}]
    made = make_labeled(PLAIN | {"tools": tools, "system": "Be brief."}, 1)
    assert made.fields["tools"] == tools
    assert [message["role"] for message in made.fields["messages"]] == [
        "system", "user", "assistant",
    ]  # fmt: skip


def test_fields_name_the_columns():
    row = {"q": "a", "reply": "b", "thumbs_up": False}
    names = parse_names(["prompt=<{q}>", "completion=reply", "label=thumbs_up"])
    made = make_labeled(row, 1, names)
    assert made.fields == {"prompt": "<a>", "completion": "b"}
    assert (made.kind, made.named, made.unused) == ("undesirable", True, ())
    with pytest.raises(ConfigError, match="one column, not a template"):
        parse_names(["label={q}"])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (PLAIN | {"label": "good"}, "its label is 'good'; allowed are true or 1"),
        (PLAIN | {"label": 2}, "its label is 2"),
        (PLAIN | {"completion": " "}, "'completion' is empty"),
        (
            PLAIN | {"label": None},
            "'label' is null .* a completion row suits --objective sft",
        ),
        ({"messages": [USER, GOOD]}, "a chat row suits --objective sft"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "a row with chosen and rejected suits --objective dpo, ipo, orpo or simpo",
        ),
        ({"q": "a", "b": "c", "label": 1}, "--fields prompt=COLUMN completion=COLUMN"),
        ("text", "not an object with prompt and completion and label"),
    ],
)
def test_what_is_wrong_with_a_row(row: object, problem: str):
    with pytest.raises(BadRowError, match=problem):
        make_labeled(row, 1)


def test_other_objectives_name_the_one_that_labels_suit():
    with pytest.raises(BadRowError, match="label suits --objective kto"):
        make_pair(PLAIN, 1)
    with pytest.raises(BadRowError, match="label suits --objective kto"):
        make_row(PLAIN | {"label": False}, 1)
    # With sft, a desirable answer is learned, and its label is reported as unused.
    assert make_row(PLAIN, 1).unused == ("label",)


# In files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labeled")
    write_tiny_model(folder / "model", hidden=32)
    return folder


def sums(count: int = 30) -> list[dict]:
    """Sums, each with two answers in adjacent rows: one good, one bad."""
    rows = []
    for number in range(count // 2):
        prompt = f"{number} + 1 ="
        rows.append({"prompt": prompt, "completion": f" {number + 1}", "label": True})
        bad = " no" * (number % 7 + 1) + f" {number}"
        rows.append({"prompt": prompt, "completion": bad, "label": False})
    return rows


def load(folder: Path, rows: Sequence[dict], **settings: Any):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, tokenizer = ml.load(str(folder / "model"))
    plain = {"data": str(folder / "rows.jsonl"), "objective": "kto", "valid_split": 0}
    config = configure(TrainConfig, plain | settings)
    check_rows(config)
    data = load_data(config, tokenizer, "train")
    examples = data.examples["train"]
    assert isinstance(examples, LabeledExamples)
    return examples, data.reports["train"], config


def parts_of(example: Example) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and those of the answer."""
    first = int(example.supervised.argmax())
    return example.tokens[:first].tolist(), example.tokens[first:].tolist()


def test_mismatched_answers_are_all_answers_at_other_prompts(folder: Path):
    examples, report, _ = load(folder, sums())
    assert report.kinds == {"desirable": 15, "undesirable": 15}
    assert examples.matched == 0
    own = [parts_of(example) for example in examples]
    others = [parts_of(example) for example in examples.mismatched]
    assert [prompt for prompt, _ in others] == [prompt for prompt, _ in own]
    assert sorted(answer for _, answer in others) == sorted(answer for _, answer in own)
    for index, (prompt, answer) in enumerate(others):
        assert (prompt, answer) not in own
        assert examples.mismatched.lengths[index] == len(prompt) + len(answer) - 1
        assert examples.mismatched.target_counts[index] == len(answer)


def test_mismatched_answers_are_no_longer_than_the_longest_example(folder: Path):
    lengths = np.random.default_rng(0).integers(1, 31, (40, 2)).tolist()
    rows = [
        {"prompt": "a" * prompt, "completion": "b" * answer, "label": answer > 9}
        for prompt, answer in [(30, 1), (1, 30), (1, 1), *lengths]
    ]
    check_mismatched(load(folder, rows)[0])


def test_mismatched_answers_with_unsupervised_tokens_between(folder: Path):
    masks = np.random.default_rng(0).random((2, 600)) < 0.6
    examples = []
    for supervised in masks:
        supervised[20::20] = True
        supervised[19::20] = True  # each example has an answer, and begins after one
        rows = np.zeros(30, ROW)
        rows["prompt_digest"] = np.arange(30)
        spans = np.zeros(30, SPAN)
        spans["row"], spans["start"] = np.arange(30), 20 * np.arange(30)
        spans["stop"] = spans["start"] + 20
        examples.append(
            EncodedTable("rows", False, np.arange(600), supervised, rows, spans, RowProblems(), 600)
        )
    spans = np.concatenate([table.spans for table in examples])
    spans["table"][30:] = 1
    spans = np.random.default_rng(1).permutation(spans)
    whole = [example.supervised for example in Examples(examples, spans)]
    spans["inputs"] = [np.flatnonzero(each)[-1] for each in whole]
    spans["targets"] = [each.sum() for each in whole]
    check_mismatched(LabeledExamples(examples, spans))


def check_mismatched(examples: LabeledExamples) -> None:
    """Check the sizes of the mismatched answers, some of which are cut."""
    mismatched = examples.mismatched
    assert mismatched.lengths.max() <= examples.lengths.max()
    assert (mismatched.target_counts < np.roll(examples.target_counts, 1)).any()
    for index, example in enumerate(mismatched):
        assert example.supervised.any()
        assert np.flatnonzero(example.supervised)[-1] == mismatched.lengths[index]
        assert example.supervised.sum() == mismatched.target_counts[index]


def test_batches_hold_answers_labels_and_mismatched_answers(folder: Path):
    examples, _, config = load(folder, sums(), batch_size=4)
    examples.reference = np.arange(60, dtype=np.float32).reshape(30, 2)
    batches = plan_batches(examples, config.data, 0)
    assert isinstance(batches, LabeledBatches)
    seen = []
    for number in range(batches.per_epoch):
        batch = batches[number]
        members = np.concatenate(batches.rows_of(number))
        used = len(members)
        mismatched = batch.mismatched
        assert mismatched is not None
        assert mismatched.tokens.shape == batch.tokens.shape
        assert mismatched.targets.shape == batch.targets.shape
        assert batch.pairs == used
        assert batch.labels is not None
        assert batch.labels.tolist()[:used] == examples.is_desirable[members].tolist()
        for each, column in ((batch, 0), (mismatched, 1)):
            assert each.reference is not None
            assert each.reference[:used].tolist() == examples.reference[members, column].tolist()
        for row, index in enumerate(members):
            inputs = examples.mismatched[int(index)].tokens[:-1]
            assert mismatched.tokens[row, : len(inputs)].tolist() == inputs.tolist()
        seen += members.tolist()
    assert sorted(seen) == list(range(30))


def test_the_labels_are_part_of_the_fingerprint(folder: Path):
    rows = sums()
    one = load(folder, rows)[0].fingerprint()
    other = load(folder, [row | {"label": not row["label"]} for row in rows])[0].fingerprint()
    assert one != other


def test_held_out_answers_are_not_in_training(folder: Path):
    _, tokenizer = ml.load(str(folder / "model"))
    load(folder, sums())
    config = configure(TrainConfig, {"data": str(folder / "rows.jsonl"), "objective": "kto"})
    data = load_data(config, tokenizer)
    train, valid = data.examples["train"], data.examples["valid"]
    assert isinstance(train, LabeledExamples)
    assert isinstance(valid, LabeledExamples)
    assert len(valid) >= 2
    held_out = [answer for _, answer in map(parts_of, valid)]
    assert all(answer not in held_out for _, answer in map(parts_of, train.mismatched))


def test_unequal_labels_are_reported_with_weights(folder: Path):
    rows = sums()
    unequal = rows[::2] + rows[1:10:2]
    _, report, _ = load(folder, unequal)
    (note,) = report.notes
    assert "15 desirable and 5 undesirable" in note
    assert "--kto-weights 1 3 balances them" in note
    assert load(folder, unequal, kto_weights=[1, 3])[1].notes == []

    few = rows[1::2] + rows[:10:2]
    assert "--kto-weights 3 1 balances" in load(folder, few)[1].notes[0]
    (note,) = load(folder, rows[::2])[1].notes
    assert "no answer is labeled undesirable" in note


def test_one_prompt_is_reported(folder: Path):
    rows = [row | {"prompt": "Guess:"} for row in sums(6)]
    _, report, _ = load(folder, rows)
    assert any("6 of 6 mismatched answers" in note for note in report.notes)


def test_long_answers_are_cut(folder: Path):
    rows = [*sums(6), {"prompt": "a", "completion": "b" * 60, "label": True}]
    examples, report, _ = load(folder, rows, max_seq_length=20)
    assert report.cut_rows == 1
    assert max(examples.lengths.max(), examples.mismatched.lengths.max()) < 20
    examples, report, _ = load(folder, rows, max_seq_length=20, on_long="drop")
    assert (len(examples), report.dropped) == (6, 1)


def test_problems_are_reported_by_line(folder: Path):
    rows = [PLAIN, PLAIN | {"label": "maybe"}, {"text": "t"}]
    with pytest.raises(DataError) as caught:
        load(folder, rows)
    for words in ("rows.jsonl:2: its label is 'maybe'", "rows.jsonl:3"):
        assert words in str(caught.value)
    assert "a row needs prompt + completion + label" in str(caught.value)


@pytest.mark.parametrize("label", ["maybe: no 'label' (it has 'x')", "x: not JSON"])
def test_the_fields_are_listed_only_if_a_row_lacks_one(folder: Path, label: str):
    """What a row holds does not decide it."""
    with pytest.raises(DataError, match="its label is") as caught:
        load(folder, [PLAIN, PLAIN | {"label": label}])
    assert "a row needs" not in str(caught.value)


def test_documents_have_no_labels(folder: Path):
    (folder / "book.txt").write_text("words " * 50)
    with pytest.raises(DataError, match=r"book\.txt .*no preferences.*completion \+ label"):
        load(folder, sums(), data=str(folder / "book.txt"))
