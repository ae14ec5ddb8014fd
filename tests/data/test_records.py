import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_loraplus.data.records import Record, read_folder
from mlx_loraplus.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}'
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def chat(*messages: object, **fields: object) -> str:
    return json.dumps({"messages": list(messages), **fields})


def test_the_three_kinds_and_their_places(tmp_path):
    tools = [{"type": "function", "function": {"name": "lamp"}}]
    folder = write(
        tmp_path,
        train='{"prompt": "a", "completion": "b", "id": 7}\n\n  \n{"prompt": "", "completion": "d"}',
        valid=json.dumps({"messages": CHAT, "tools": tools, "id": 7}),
        test='{"text": "t"}\r\n{"text": "ü", "prompt": null}\r\n',
    )
    splits = read_folder(folder)
    assert splits.train == [
        Record("completion", {"prompt": "a", "completion": "b"}, "train.jsonl:1"),
        Record("completion", {"prompt": "", "completion": "d"}, "train.jsonl:4"),
    ]
    assert splits.valid == [Record("chat", {"messages": CHAT, "tools": tools}, "valid.jsonl:1")]
    assert splits.test == [
        Record("text", {"text": "t"}, "test.jsonl:1"),
        Record("text", {"text": "ü"}, "test.jsonl:2"),
    ]


def test_train_alone_is_enough(tmp_path):
    splits = read_folder(write(tmp_path, train=GOOD, valid="\n"))
    assert (len(splits.train), splits.valid, splits.test) == (1, [], [])


def test_validation_is_valid_but_not_both(tmp_path):
    write(tmp_path, train=GOOD, validation=GOOD)
    assert [record.source for record in read_folder(tmp_path).valid] == ["validation.jsonl:1"]
    write(tmp_path, valid=GOOD)
    with pytest.raises(DataError, match=r"both valid\.jsonl and validation\.jsonl"):
        read_folder(tmp_path)


def test_byte_order_mark(tmp_path):
    assert read_folder(write(tmp_path, train=b"\xef\xbb\xbf" + GOOD.encode())).train[0].fields["prompt"] == "a"


def test_assistant_may_only_call_tools(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "lamp", "arguments": "{}"}}]}
    row = chat(CHAT[0], call, {"role": "tool", "content": "on"}, CHAT[1])
    assert read_folder(write(tmp_path, train=row)).train[0].fields["messages"][1] == call


BAD_ROWS = {
    "{": "not JSON",
    "nonsense": "not JSON (Expecting value at column 1)",
    "[" * 100_000: "not JSON (nested too deep)",
    '{"text": ' + "1" * 5000 + "}": "not JSON",
    "[1]": "a list, not an object",
    "null": "null, not an object",
    "3": "a number, not an object",
    '{"question": "q", "answer": "a"}': "no known field (it has 'question', 'answer')",
    "{}": "no known field (it has none)",
    '{"prompt": "a"}': "no 'completion'",
    '{"completion": "a"}': "no 'prompt'",
    '{"prompt": "a", "completion": null}': "no 'completion'",
    '{"prompt": 1, "completion": "b"}': "'prompt' is a number, not a string",
    '{"prompt": "a", "completion": ["b"]}': "'completion' is a list, not a string",
    '{"prompt": "a", "completion": true}': "'completion' is a boolean, not a string",
    '{"prompt": "a", "completion": ""}': "'completion' is empty",
    '{"prompt": "a", "completion": " \\n\\t"}': "'completion' is empty",
    '{"text": ""}': "'text' is empty",
    '{"text": {}}': "'text' is an object, not a string",
    '{"text": "\\ud800"}': "half a surrogate pair",
    '{"text": "a", "messages": []}': "fields of several kinds (chat and text)",
    '{"text": "a", "prompt": "b", "completion": "c"}': "fields of several kinds (completion and text)",
    '{"messages": "hi"}': "'messages' is a string, not a list",
    chat(): "'messages' is empty",
    chat("hi"): "messages[0] is a string, not an object",
    chat(CHAT[0]): "no assistant turn",
    chat({"role": "human", "content": "Hi"}, CHAT[1]): "messages[0] has the role 'human'; roles are system, user",
    chat({"content": "Hi"}, CHAT[1]): "messages[0] has the role None",
    chat({"role": ["user"], "content": "Hi"}, CHAT[1]): "messages[0] has the role ['user']",
    chat(CHAT[0], {"role": "assistant"}): "messages[1] (assistant) has null as content, not a string",
    chat(CHAT[0], {"role": "assistant", "content": [{}]}): "messages[1] (assistant) has a list as content",
    chat(CHAT[0], {"role": "assistant", "content": " "}): "messages[1] (assistant) has empty content",
    chat({"role": "user"}, CHAT[1]): "messages[0] (user) has null as content, not a string",
    chat(*CHAT, tools="lamp"): "'tools' is a string, not a list",
}


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS.items(), ids=range(len(BAD_ROWS)))
def test_bad_row(tmp_path, row, problem):
    with pytest.raises(DataError) as error:
        read_folder(write(tmp_path, train=f"{row}\n"))
    message = str(error.value)
    assert "train.jsonl:1: " in message
    assert problem in message
    assert "\n" not in message
    assert len(message) < 600
    assert message.endswith(
        'each line must be one of {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
    )


def test_every_bad_row_of_every_file_is_told_at_once(tmp_path):
    write(tmp_path, train=f"{GOOD}\n\n{{\n[]\n{GOOD}\n", valid='{"text": ""}\n', test=b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError) as error:
        read_folder(tmp_path)
    message = str(error.value)
    for place in (
        "train.jsonl:3: ",
        "train.jsonl:4: ",
        "valid.jsonl:1: ",
        "test.jsonl:1: not UTF-8 (byte 0xe9 at column 14)",
    ):
        assert place in message
    assert "train.jsonl:1" not in message
    assert "train.jsonl:5" not in message


def test_many_bad_rows_are_counted(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl:8: .*; and 92 more;"):
        read_folder(write(tmp_path, train="{\n" * 100))


def test_mixed_kinds_in_a_file_but_not_across_files(tmp_path):
    write(tmp_path, train=GOOD, valid=f'{{"text": "a"}}\n{GOOD}\n{{"text": "b"}}\n{chat(*CHAT)}')
    with pytest.raises(DataError) as error:
        read_folder(tmp_path)
    assert "valid.jsonl:2: completion row, but valid.jsonl:1 is text; " in str(error.value)
    assert "valid.jsonl:4: chat row, but valid.jsonl:1 is text" in str(error.value)
    assert "train" not in str(error.value).replace(str(tmp_path), "")


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match=r"not found: '.*gone'; give a folder that holds train\.jsonl"):
        read_folder(tmp_path / "gone")


def test_empty_folder_and_wrong_names(tmp_path):
    with pytest.raises(DataError, match=r"no train\.jsonl in .*, which holds nothing; "):
        read_folder(tmp_path)
    write(tmp_path, training=GOOD)
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(DataError, match=r"which holds train\.jsonl, training\.jsonl; "):
        read_folder(tmp_path)


def test_a_file_instead_of_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"is a file: .*; give the folder"):
        read_folder(write(tmp_path, train=GOOD) / "train.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_train_file(tmp_path, content):
    with pytest.raises(DataError, match=r"train\.jsonl has no rows"):
        read_folder(write(tmp_path, train=content))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    (write(tmp_path, train=GOOD) / "train.jsonl").chmod(0)
    with pytest.raises(DataError, match=r"can't read .*: Permission denied"):
        read_folder(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "assistant", "tool"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "prompt", "completion", "text", "tools", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(json_values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20), max_size=4))
def test_any_file_loads_or_gives_one_clear_line(tmp_path, lines):
    write(tmp_path, train=b"\n".join(lines))
    try:
        records = read_folder(tmp_path).train
    except DataError as error:
        message = str(error)
    else:
        message = ""
        assert 0 < len(records) <= sum(line.count(b"\n") + 1 for line in lines)
        assert len({record.kind for record in records}) == 1
    assert "\n" not in message
