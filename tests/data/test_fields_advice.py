"""Advice in error messages works when it is followed, and other public forms of rows are recognized."""

import json
import re
import shlex
from typing import Any

import pytest

from mlx_loraplus.data.fields_setting import parse_names
from mlx_loraplus.data.messages import BadRowError
from mlx_loraplus.data.rows import make_row

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
ADVISED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"source": "Hi", "target": "Salut"}, {"prompt": "Hi", "completion": "Salut"}),
    ({"article": "A long story", "summary": "Short"}, {"prompt": "A long story", "completion": "Short"}),
    ({"id": "a1", "date": "2026-01-02", "mail": "Where is it?", "reply": "On its way"},
     {"prompt": "Where is it?", "completion": "On its way"}),
    ({"id": 3, "tags": ["a", "b"], "story": "Once upon a time"}, {"text": "Once upon a time"}),
    ({"tags": ["a"], "turns": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
    ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, {"prompt": "Hi", "completion": "Hello"}),
    ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER]}, {"messages": [USER, ANSWER]}),
    ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
    ({"prompt": "Hi", "completion": "Hello", "label": False}, {"prompt": "Hi", "completion": "Hello"}),
    ({"instruction": "a", "input": "b", "output": "c", "text": "d"}, {"prompt": "a\n\nb", "completion": "c"}),
    ({"my question": "Why is it?", "the answer": "So it is"}, {"prompt": "Why is it?", "completion": "So it is"}),
    ({"prompt": "Why?", "completon": "So"}, {"prompt": "Why?", "completion": "So"}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "fields"), ADVISED, ids=range(len(ADVISED)))
def test_advice_is_right_when_followed(row: dict[str, Any], fields: dict[str, Any]):
    with pytest.raises(BadRowError, match="--fields ") as error:
        make_row(row, 1)
    words = shlex.split(str(error.value).split("--fields ")[1].split(" to train on them")[0])
    pairs = [word for word in words if re.match(r"\w+=", word)]
    assert make_row(row, 1, parse_names(pairs)).fields == fields


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        (USER, "it is one message: put all messages of a conversation into one row"),
        ({"from": "human", "value": "Hi"}, "it is one message"),
        (
            {"segments": [{"label": True, "text": "a"}]},
            "'segments' is a list of objects that are no",
        ),
        ({"data": [{"prompt": "a", "completion": "b"}]}, "the rows are in 'data'"),
        ({"how are you?": "so so", "fine": "good"}, "stand where its columns should be named"),
        ({"messages": "[{'role': 'user', 'content': 'Hi'}]"}, "perhaps a list as Python writes it"),
        ({"messages": '[{"role": "user", "content": "Hi'}, "is text that is no JSON"),
    ],
)
def test_rows_in_another_form_get_no_columns_as_advice(row: dict[str, Any], advice: str):
    with pytest.raises(BadRowError) as error:
        make_row(row, 1)
    assert advice in str(error.value)


def test_what_is_asked_is_not_advised_as_the_answer():
    row = {"context": "A story", "question": "Who?", "answers": {"text": ["She"]}}
    with pytest.raises(BadRowError, match=r"no 'answer' \(it has 'context', .*\)$"):
        make_row(row, 1)


KNOWN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"input": "a", "output": "b"}, {"prompt": "a", "completion": "b"}),
    ({"question": "a", "response": "b", "system_prompt": "s"}, {"prompt": "a", "completion": "b", "system": "s"}),
    ({"query": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}),
    ({"instruction": "a", "context": "c", "response": "b"}, {"prompt": "a\n\nc", "completion": "b"}),
    ({"instruction": "a", "context": "", "response": "b"}, {"prompt": "a", "completion": "b"}),
    ({"instruction": "", "input": "c", "output": "b"}, {"prompt": "c", "completion": "b"}),
    ({"dialog": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
    ({"messages": [{"from": "human", "value": "Hi"}, {"role": "model", "parts": [{"text": "Hello"}]}]},
     {"messages": [USER, ANSWER]}),
    ({"conversations": [{"role": "User", "content": [{"type": "input_text", "text": "H"}, "i"]}, ANSWER]},
     {"messages": [USER, ANSWER]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"q": "12 + 30 =", "number": "42"}, {"prompt": "12 + 30 =", "completion": "42"}),
        ({"what": "A litre of milk", "eur": "1.50 €"}, {"prompt": "A litre of milk", "completion": "1.50 €"}),
        ({"what": "The wall falls", "year": 1989}, {"prompt": "The wall falls", "completion": "1989"}),
        ({"a": "12 + 30 =", "b": "42", "c": "7"}, {"prompt": "12 + 30 =", "completion": "42"}),
        ({"word": "cat food", "id": "17"}, None),
    ],
)  # fmt: skip
def test_a_text_beside_another_value_may_be_its_prompt(
    row: dict[str, Any], fields: dict[str, Any] | None
):
    with pytest.raises(BadRowError, match="--fields text=") as error:
        make_row(row, 1)
    _, *alternative = str(error.value).split(" or --fields ")
    assert bool(alternative) == (fields is not None)
    for words in alternative:
        pairs = [word for word in shlex.split(words) if re.match(r"\w+=", word)]
        assert make_row(row, 1, parse_names(pairs)).fields == fields


@pytest.mark.parametrize(("row", "fields"), KNOWN, ids=range(len(KNOWN)))
def test_other_public_forms(row: dict[str, Any], fields: dict[str, Any]):
    assert make_row(row, 1).fields == fields


def test_switches_exclude_messages_from_training():
    other = {"role": "user", "content": "And?"}
    for wish in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": 0}):
        record = make_row({"system": "s", "messages": [USER, ANSWER | wish, other, ANSWER]}, 1)
        assert (record.untrained, record.fields["messages"][2]) == ((2,), ANSWER)
    with pytest.raises(
        BadRowError, match="has weight 2; use 0 or false to exclude the message from training, 1 or"
    ):
        make_row({"messages": [USER, ANSWER | {"weight": 2}]}, 1)
    with pytest.raises(BadRowError, match="contradict each other"):
        make_row({"messages": [USER, ANSWER | {"weight": 1, "train": False}]}, 1)
    with pytest.raises(BadRowError, match="every assistant turn is excluded from training"):
        make_row({"messages": [USER, ANSWER | {"weight": 0}]}, 1)
    assert "'mood'" in make_row({"messages": [USER | {"mood": "x"}, ANSWER]}, 1).notes[0]


def test_a_prompt_of_messages_is_not_trained_on():
    record = make_row({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, 1)
    assert (record.kind, len(record.fields["messages"]), record.untrained) == ("chat", 4, (1,))
    mixed = make_row({"prompt": [USER], "completion": "Hello"}, 1)
    assert (mixed.fields, mixed.untrained, mixed.unused) == ({"messages": [USER, ANSWER]}, (), ())


def test_fields_that_are_not_mapped_keep_their_columns():
    row = {"messages": [USER, ANSWER], "tools": [{"name": "lamp"}], "system": "s", "text": "t"}
    record = make_row(row, 1, parse_names(["messages=messages"]))
    assert (len(record.fields["messages"]), record.fields["tools"]) == (3, [{"name": "lamp"}])
    with pytest.raises(BadRowError, match="did you mean 'reply'"):
        make_row({"q": "a", "reply": "b"}, 1, parse_names(["prompt=q", "completion=replly"]))


CALLS = [{"type": "function", "function": {"name": "lamp", "arguments": {"on": True}}}]


@pytest.mark.parametrize("empty", [None, "", {}, "{}"])
def test_a_call_without_arguments_has_an_empty_object(empty: Any):
    call = {"function": {"name": "lamp", "arguments": empty}}
    record = make_row({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}, 1)
    (written,) = record.fields["messages"][1]["tool_calls"]
    assert written["function"]["arguments"] == {}


@pytest.mark.parametrize("broken", ['{"on": ', "on", "[1]", [1], 5, True])
def test_arguments_that_are_no_object_are_a_bad_row(broken: Any):
    call = {"function": {"name": "lamp", "arguments": broken}}
    with pytest.raises(
        BadRowError, match=r"messages\[1\] calls lamp with arguments that are not a JSON"
    ):
        make_row({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}, 1)


def test_calls_of_a_table_are_json():
    turn = {"role": "assistant", "content": None, "tool_calls": json.dumps(CALLS)}
    assert make_row({"messages": [USER, turn]}, 1).fields["messages"][1]["tool_calls"] == CALLS


def test_thoughts_in_several_places_are_noted():
    for turn, places in (
        ({"reasoning_content": "a", "thinking": "b"}, "reasoning_content and in thinking"),
        ({"thinking": "b", "content": "<think>\nc\n</think>\n\nHello"}, "thinking and in content"),
        ({"reasoning_content": "a", "thinking": " a\n"}, ""),
    ):
        record = make_row({"messages": [USER, ANSWER | turn]}, 1)
        assert [places in note for note in record.notes] == [True] * bool(places)


@pytest.mark.parametrize(
    "row",
    [
        {"What is 1 + 1?": "What is 2 + 2?", "2": "4"}, {"1": 2, "Where is my order now": "x", "3": "y"},
        {"Hello there.": "Hi"}, {"word " * 40: "Another long text, and so on"},
    ],
)  # fmt: skip
def test_a_csv_file_without_a_line_of_names_is_suspected(row: dict[str, Any]):
    """--fields with these names would work, but lose the first row."""
    with pytest.raises(BadRowError, match="write the line prompt,completion above the first row"):
        make_row(row, 2)
    for name in ("Customer question", "prompt text"):
        with pytest.raises(BadRowError, match="--fields "):
            make_row({name: "What is 1 + 1?", "reply": "It is two"}, 2)
