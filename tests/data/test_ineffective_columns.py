"""Columns and message fields that ask for something are reported, or their rows are refused."""

from typing import Any

import pytest

from mlx_loraplus.data.labeled_rows import make_labeled
from mlx_loraplus.data.messages import BadRowError
from mlx_loraplus.data.preference_rows import make_pair
from mlx_loraplus.data.rows import make_row

PLAIN = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
WEIGHTS = ("weight", "loss_weight", "sample_weight", "Weight", "train", "loss", "weights")
EVERY_ROW = [(make_row, PLAIN), (make_row, CHAT), (make_row, {"text": "a"}),
             (make_pair, PAIR), (make_labeled, PLAIN | {"label": True})]  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(("make", "row"), EVERY_ROW)
def test_a_weight_of_a_row_has_no_effect(make: Any, row: dict[str, Any], name: str):
    for value in (0.5, 3, "2.5", -1):
        record = make(row | {name: value}, 1)
        (note,) = record.notes
        assert note.startswith(f"a row's {name!r} has no effect")
        assert record.unused == (), "one note says it all"
        assert "--data-weights" in note
    for value in (1, True, "1.0", "true", None, "heavy", [2]):
        record = make(row | {name: value}, 1)
        assert record.notes == ()
        is_text = value in ("heavy", [2])
        assert record.unused == ((name,) if is_text else ())


@pytest.mark.parametrize("value", [0, 0.0, False, "0", "False", "0.0"])
@pytest.mark.parametrize(("make", "row"), EVERY_ROW)
def test_a_row_with_weight_0_is_a_bad_row(make: Any, row: dict[str, Any], value: object):
    for name in WEIGHTS:
        with pytest.raises(BadRowError, match="excludes it from training; use --on-bad drop"):
            make(row | {name: value}, 1)

    # The advice is right: a row whose columns are named is trained on
    column = next(iter(row))
    assert make(row | {"weight": value}, 1, {column: column}).notes == ()


def test_columns_with_tokens_and_splits_are_noted():
    tokens = {"input_ids": [1, 2], "labels": "[-100, 2]", "attention_mask": [1, 1]}
    row = make_row(PLAIN | tokens | {"id": 3}, 1)
    (note,) = row.notes
    assert row.unused == ("id",)
    assert note.startswith("'input_ids', 'labels', 'attention_mask' of rows have no effect")
    assert make_row(PLAIN | {"labels": 3, "mask": "no list"}, 1).notes == ()
    row = make_row(PLAIN | {"split": "test"}, 1)
    (note,) = row.notes
    assert row.unused == ()
    assert note.startswith("'split' of rows has no effect")


@pytest.mark.parametrize("value", [0, 0.0, "0"])
def test_a_label_of_0_may_mark_an_unwanted_answer(value: object):
    row = make_row(PLAIN | {"label": value}, 1)
    (note,) = row.notes
    assert row.unused == ()
    assert note.startswith("rows with label 0 are trained on like the others")
    assert make_row(PLAIN | {"label": 1}, 1).notes == ()
    assert make_row(PLAIN | {"label": value}, 1, {"prompt": "prompt"}).notes == ()


def test_fields_of_messages_that_look_like_weights_are_noted():
    answer = {"role": "assistant", "content": "b", "loss_mask": 0, "trainable": False, "score": 3}
    record = make_row({"messages": [CHAT["messages"][0], answer]}, 1)
    assert record.notes == (
        "message fields without effect: 'loss_mask', 'trainable'; to exclude a message from"
        " training, give it weight 0",
        "message fields that only the chat template may use: 'score'",
    )


@pytest.mark.parametrize("name", ["text", "refusal", "message", "output"])
def test_text_outside_the_content_is_named(name: str):
    for role, content in (("assistant", {"content": None}), ("user", {})):
        with pytest.raises(
            BadRowError, match=f"if '{name}' holds its text, move that to 'content'"
        ):
            make_row({"messages": [{"role": role, name: "a", **content}]}, 1)
