"""Rows of every kind are read, and bad rows are reported with the reason."""

import datetime
import json
import math
from typing import Any

import pytest

from mlx_loraplus.data.fields_setting import parse_names
from mlx_loraplus.data.messages import BadRowError
from mlx_loraplus.data.rows import make_row
from mlx_loraplus.errors import ConfigError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "lamp", "arguments": {"on": 1}}}],
}
TOOLS = [{"type": "function", "function": {"name": "lamp"}}]
SYSTEM = {"role": "system", "content": "Be kind"}

GOOD_ROWS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "completion": ({"prompt": "a", "completion": "b"}, "completion", {"prompt": "a", "completion": "b"}),
    "empty prompt": ({"prompt": "", "completion": "b"}, "completion", {"prompt": "", "completion": "b"}),
    "null is no field": ({"text": "ü", "prompt": None}, "text", {"text": "ü"}),
    "half a kind is none": ({"text": "t", "prompt": "p"}, "text", {"text": "t"}),
    "alpaca": ({"instruction": "a", "output": "c"}, "alpaca", {"prompt": "a", "completion": "c"}),
    "alpaca, nothing put in": (
        {"instruction": "a", "input": " ", "output": "c"}, "alpaca", {"prompt": "a", "completion": "c"},
    ),
    "alpaca, something put in": (
        {"instruction": "a", "input": "b", "output": "c"}, "alpaca", {"prompt": "a\n\nb", "completion": "c"},
    ),
    "question with a system message": (
        {"question": "a", "answer": "b", "system": "s"}, "question", {"prompt": "a", "completion": "b", "system": "s"},
    ),
    "chat": ({"messages": CHAT, "tools": TOOLS}, "chat", {"messages": CHAT, "tools": TOOLS}),
    "chat in strings": (
        {"messages": json.dumps(CHAT), "tools": json.dumps(TOOLS)}, "chat", {"messages": CHAT, "tools": TOOLS},
    ),
    "chat of a table": (
        {"messages": [message | {"tool_calls": None, "name": None} for message in CHAT], "tools": []},
        "chat", {"messages": CHAT},
    ),
    "tool calls without content": (
        {"messages": [CHAT[0], CALL, {"role": "tool", "content": "on"}]},
        "chat", {"messages": [CHAT[0], CALL, {"role": "tool", "content": "on"}]},
    ),
    "arguments as OpenAI writes them": (
        {"messages": [CHAT[0], CALL | {"tool_calls": [{"function": {"name": "lamp", "arguments": '{"on": 1}'}}]}]},
        "chat", {"messages": [CHAT[0], CALL]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind"},
        "sharegpt", {"messages": [SYSTEM, *CHAT]},
    ),
    "a system message that is there already": (
        {"messages": [SYSTEM, *CHAT], "system": "Be rude"}, "chat", {"messages": [SYSTEM, *CHAT]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD_ROWS)
def test_kinds(name: str):
    row, kind, fields = GOOD_ROWS[name]
    record = make_row(row | {"id": 7}, 1)
    assert (record.kind, record.fields, record.line) == (kind, fields, 1)
    assert "id" in record.unused


def test_columns_that_a_kind_does_not_use_are_reported():
    assert make_row(
        {"prompt": "a", "completion": "b", "input": {"c": 1}, "id": None}, 1
    ).unused == ("input",)
    assert make_row({"text": "t", "tools": "x", "system": 3}, 1).unused == ("tools", "system")
    assert make_row({"instruction": "a", "input": "b", "output": "c", "tools": []}, 1).unused == (
        "tools",
    )


def with_messages(*messages: object, **fields: object) -> dict[str, object]:
    return {"messages": list(messages), **fields}


BAD_ROWS: list[tuple[object, str]] = [
    ([1], "a list, not an object"),
    (None, "null, not an object"),
    (3, "a number, not an object"),
    ({"q": "q", "a": "a"}, "no known field (it has 'q', 'a'); choose the columns, such as --fields prompt=q completion=a"),
    ({}, "no known field (it has none)"),
    ({"prompt": "a"}, "no 'completion'"),
    ({"completion": "a"}, "no 'prompt'"),
    ({"instruction": "a"}, "no 'output'"),
    ({"prompt": "a", "completion": None}, "'completion' is null (it has 'prompt')"),
    ({"messages": None}, "'messages' is null (it has no other column)"),
    ({"question": None, "answer": math.nan, "id": 1}, "'question' and 'answer' are null (it has 'id')"),
    ({"q": "a", "a": None}, "no known field (it has 'q'; 'a' is null)"),
    ({"prompt": "a", "reply": None}, "no 'completion' (it has 'prompt'; 'reply' is null)"),
    ({"prompt": 1, "completion": "b"}, "'prompt' is a number, not a string; write numbers as text"),
    ({"prompt": "a", "completion": ["b"]}, "'completion' is a list, not a string"),
    ({"prompt": "a", "completion": True}, "'completion' is a boolean, not a string"),
    ({"prompt": "a", "completion": b"b"}, "'completion' is a bytes, not a string"),
    ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    ({"prompt": "a", "completion": " \n\t"}, "'completion' is empty"),
    ({"question": "a", "answer": " "}, "'answer' is empty"),
    ({"question": "a", "answer": "b", "system": 1}, "'system' is a number, not a string; write numbers as text"),
    ({"text": ""}, "'text' is empty"),
    ({"text": {}}, "'text' is an object, not a string"),
    ({"text": "\ud800"}, "half a surrogate pair"),
    ({"text": "a", "messages": []}, "fields of several row formats (chat and text): choose the columns, such as --fields messages=mes"),
    ({"text": "a", "prompt": "b", "completion": "c"}, "fields of several row formats (completion and text)"),
    ({"messages": "hi"}, "'messages' is a string, not a list"),
    ({"messages": "[hi"}, "'messages' is a string, not a list"),
    (with_messages(), "'messages' is empty"),
    (with_messages("hi"), "messages[0] is a string, not an object"),
    (with_messages(CHAT[0]), "no assistant turn"),
    (with_messages({"role": "alien", "content": "Hi"}, CHAT[1]), "messages[0] has the role 'alien'; allowed roles are s"),
    (with_messages({"content": "Hi"}, CHAT[1]), "messages[0] has the role None"),
    (with_messages({"role": ["user"], "content": "Hi"}, CHAT[1]), "messages[0] has the role ['user']"),
    (with_messages(CHAT[0], {"role": "assistant"}), "messages[1] (assistant) has null as content, not a string"),
    (with_messages(CHAT[0], {"role": "assistant", "content": [{}]}), "messages[1]: content part 0 is an object; only"),
    (with_messages(CHAT[0], {"role": "assistant", "content": " "}), "messages[1] (assistant) has empty content"),
    (with_messages({"role": "user"}, CHAT[1]), "messages[0] (user) has null as content, not a string"),
    (with_messages(*CHAT, tools="lamp"), "'tools' is a string, not a list"),
    (with_messages(*CHAT, system=3), "'system' is a number, not a string"),
    (with_messages(CHAT[0], {"role": "assistant", "tool_calls": "x"}), "messages[1] has tool_calls that are a string, not a l"),
    (with_messages(CHAT[0], {"role": "assistant", "tool_calls": [{}]}), "messages[1] has a tool call without a"),
    (with_messages(CHAT[0], CHAT[1] | {"at": datetime.date(2026, 1, 1)}), "a value that can't be written as JSON"),
    ({"conversations": [{"from": "alien", "value": "Hi"}, {"from": "gpt", "value": "b"}]}, "has the role 'alien'"),
    ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}, "conversations[0] (user) has null"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows(row: object, problem: str):
    with pytest.raises(BadRowError) as error:
        make_row(row, 1)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_fields_can_be_mapped():
    names = parse_names(["prompt=q", "completion=reply"])
    record = make_row({"q": "a", "reply": "b", "text": "t", "system": "s"}, 1, names)
    assert (record.kind, record.fields, record.unused) == (
        "completion",
        {"prompt": "a", "completion": "b", "system": "s"},
        ("text",),
    )
    assert make_row({"text": "t"}, 1, names).kind == "text", (
        "rows without these columns are auto-detected"
    )
    with pytest.raises(BadRowError, match=r"no 'reply' \(it has 'q', 'completion'\)"):
        make_row({"q": "a", "completion": "b"}, 1, names)
    chosen = parse_names(["messages=messages"])
    assert make_row({"messages": CHAT, "text": "t"}, 1, chosen).kind == "chat"


def test_an_empty_prompt_is_noted():
    for row in ({"prompt": " ", "completion": "b"}, {"instruction": "", "output": "b"}):
        (note,) = make_row(row, 1).notes
        assert note.startswith("the prompt is empty")
    assert make_row({"text": "b"}, 1).notes == ()


@pytest.mark.parametrize("pair", ["prompt", "prompt=", "promt=q", "=q"])
def test_an_invalid_mapping_is_refused(pair: str):
    with pytest.raises(ConfigError, match="is not of the form field=column"):
        parse_names([pair])
