"""What is held out for validation, and how often each source is seen."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.dataset import Examples
from mlx_loraplus.data.holdout import group_conversations, split_holdout
from mlx_loraplus.data.load_data import load_examples
from mlx_loraplus.data.long_rows import limit_lengths
from mlx_loraplus.data.sampling_weights import WeightedExamples
from mlx_loraplus.data.split_report import SplitReport
from mlx_loraplus.errors import DataError
from mlx_loraplus.settings import configure
from mlx_loraplus.training.make_batches import plan_batches
from tests.data.reading import GOOD, load, texts, write
from tests.data.test_long_rows import supervision, table_of

# --- valid_split and weights


def test_rows_are_held_out_by_prompt_and_seed(tmp_path: Path, letters):
    rows = [json.dumps({"prompt": f"p{n % 40}", "completion": f"c{n}"}) for n in range(80)]
    file = write(tmp_path / "data", rows="\n".join(rows)) / "rows.jsonl"
    splits = [load(letters(), file, valid_split=0.25, seed=seed).examples for seed in (1, 1, 2)]
    for split in splits:
        train, valid = (set(texts(split[name], letters())) for name in ("train", "valid"))
        assert len(train | valid) == 80
        assert len(valid) in (20, 21)
        assert not {text.split("c")[0] for text in train} & {text.split("c")[0] for text in valid}
    assert texts(splits[0]["valid"], letters()) == texts(splits[1]["valid"], letters())
    assert texts(splits[0]["valid"], letters()) != texts(splits[2]["valid"], letters())


@pytest.mark.parametrize(("count", "held_out"), [(9, 0), (10, 1), (40, 4)])
def test_a_single_file_holds_out_a_tenth_and_says_so(
    tmp_path: Path, letters, count: int, held_out: int
):
    rows = [json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in range(count)]
    file = write(tmp_path / "data", rows="\n".join(rows)) / "rows.jsonl"
    found = load(letters(), file, valid_split=None)
    assert len(found.examples["valid"]) == held_out
    assert len(found.examples["train"]) == count - held_out
    notes = found.reports["valid"].notes
    assert [f"held out of the {count} training examples" in note for note in notes] == [
        True
    ] * bool(held_out)
    assert len(load(letters(), file, valid_split=0).examples["valid"]) == 0


def test_nothing_is_held_out_beside_a_validation_file_or_of_rows_that_begin_alike(
    tmp_path: Path, letters
):
    rows = [json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in range(20)]
    folder = write(tmp_path / "data", train="\n".join(rows), valid=GOOD)
    found = load(letters(), folder, valid_split=None).examples
    assert (len(found["train"]), len(found["valid"])) == (20, 1)

    alike = [json.dumps({"prompt": "p", "completion": f"c{n}"}) for n in range(20)]
    file = write(tmp_path / "alike", rows="\n".join(alike)) / "rows.jsonl"
    assert len(load(letters(), file, valid_split=None).examples["train"]) == 20


def test_an_empty_validation_file_is_noted(tmp_path: Path, letters):
    rows = "\n".join(json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in range(20))
    for nothing in ("", "\n\n"):
        folder = write(tmp_path / "data", train=rows, valid=nothing, test="")
        found = load(letters(), folder, valid_split=None)
        assert len(found.examples["train"]) == 20
        first, second = found.reports["valid"].notes
        assert first == "valid.jsonl has no rows"
        assert second.startswith("there is no validation, because nothing is held out beside")
        assert found.reports["test"].notes == ["test.jsonl has no rows"]

    # A run says the same before it trains, and --valid-split, which its end advises, is possible.
    told: list[str] = []
    config = configure(TrainConfig, {"data": str(folder)})
    load_examples(config, letters(), told.append)
    assert "valid: no rows, so no validation loss" in told
    assert f"valid: {second}" in told
    assert len(load(letters(), folder, valid_split=0.25).examples["valid"]) == 5

    (folder / "valid.jsonl").unlink()
    assert len(load(letters(), folder, valid_split=None).examples["valid"]) == 2


def test_a_split_that_can_not_be(tmp_path: Path, letters):
    with pytest.raises(
        DataError, match="but the data already has a validation split: leave --valid-split out"
    ):
        load(letters(), write(tmp_path / "data", train=GOOD, valid=GOOD), valid_split=0.5)
    with pytest.raises(
        DataError,
        match=r"--valid-split 0\.5 needs rows with at least two different prompts, but there is",
    ):
        load(letters(), write(tmp_path / "other", train=f"{GOOD}\n{GOOD}"), valid_split=0.5)
    bad = write(tmp_path / "bad", train='{"x": 1}\n' * 3)
    with pytest.raises(DataError, match=r"^3 bad rows: train\.jsonl:1 and others: no known field"):
        load(letters(), bad, valid_split=0.5)
    assert load(letters(), bad, valid_split=0.5, strict=False).problems, (
        "the preview shows them too"
    )


@settings(max_examples=100, deadline=None)
@given(
    asked=st.lists(st.integers(1, 9), min_size=2, max_size=60),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_any_split_parts_the_rows(asked, share, seed):
    if len(set(asked)) < 2:
        return
    table = table_of([[False, True]] * len(asked))
    table.rows["prompt_digest"] = table.rows["opening_digest"] = asked
    examples = Examples([table], table.spans)
    train, valid = split_holdout(examples, group_conversations(examples), share, seed)
    rows = [examples.spans["row"].tolist() for examples in (train, valid)]
    assert sorted(rows[0] + rows[1]) == list(range(len(asked)))
    assert rows[0]
    assert rows[1]
    assert not {asked[row] for row in rows[0]} & {asked[row] for row in rows[1]}


def test_weights_say_how_often_a_source_is_seen(tmp_path: Path, letters):
    sources = []
    for name, count in (("a", 10), ("b", 4)):
        rows = [json.dumps({"prompt": "", "completion": f"{name}{n}"}) for n in range(count)]
        sources.append(write(tmp_path / name, rows="\n".join(rows)) / "rows.jsonl")
    train = load(letters(), *sources, data_weights=[0.5, 2.25]).examples["train"]
    assert isinstance(train, WeightedExamples)
    names = [text.removesuffix("</s>") for text in texts(train, letters())]
    epochs = [[names[i] for i in train.of_epoch(epoch)] for epoch in range(4)]
    for epoch in epochs:
        assert (
            len({name for name in epoch if name[0] == "a"})
            == len([name for name in epoch if name[0] == "a"])
            == 5
        )
        assert sorted(epoch.count(f"b{n}") for n in range(4)) == [2, 2, 2, 3]
    assert sorted(name for name in epochs[0] + epochs[1] if name[0] == "a") == sorted(
        f"a{n}" for n in range(10)
    )
    assert {sum(epoch.count(f"b{n}") for epoch in epochs) for n in range(4)} == {9}
    again = load(letters(), *sources, data_weights=[0.5, 2.25]).examples["train"]
    assert again.fingerprint() == train.fingerprint()
    table = table_of([[False, True]] * 3)
    with pytest.raises(DataError, match=r"--data-weights 0\.1 selects none of 3 rows"):
        WeightedExamples(Examples([table], table.spans), [0.1], 0)


@settings(max_examples=60, deadline=None)
@given(rows=supervision, weight=st.floats(0.1, 2.9), pack=st.booleans(), seed=st.integers(0, 3))
def test_every_row_is_seen_equally_often_whatever_the_weight(rows, weight, pack, seed):
    table = table_of(rows)
    whole = Examples([table], limit_lengths(table, SplitReport(64, "split")))
    if round(weight % 1 * len(whole)) + int(weight) == 0:
        return
    config = configure(TrainConfig, {"batch_size": 3, "max_seq_length": 64, "pack": pack})
    batches = plan_batches(WeightedExamples(whole, [weight], seed), config.data, seed)
    seen = np.zeros(len(whole), int)
    for number in range(len(whole) * batches.per_epoch):
        for row in batches.rows_of(number):
            np.add.at(seen, row, 1)
            assert not pack or batches.lengths[row].sum() <= batches.shape_of([row])[1], (
                "the row has room for them"
            )
        if (number + 1) % batches.per_epoch == 0:
            assert np.ptp(seen) <= 1, "after any number of epochs"
    assert len(set(seen)) == 1, "after as many epochs as there are rows"
