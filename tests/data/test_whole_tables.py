"""A table written as one object is named as such, and the advice to convert it works."""

import json
import re
from pathlib import Path
from typing import Any

import pandas
import pytest

from mlx_loraplus.data.messages import BadRowError
from mlx_loraplus.data.whole_tables import check_is_row

ROWS = [{"prompt": "Hi", "completion": "Hello"}, {"prompt": "1 + 1 =", "completion": "2"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


@pytest.mark.parametrize(
    ("table", "rows", "told"),
    [
        (COLUMNS, ROWS, "a table of columns with 2 values each"),
        ({name: values[:1] for name, values in COLUMNS.items()}, ROWS[:1], "1 value each"),
        ({name: dict(zip("01", x, strict=True)) for name, x in COLUMNS.items()}, ROWS, "2 values"),
        ({"messages": [CHAT]}, [{"messages": CHAT}], "a table of columns with 1 value each"),
        (dict(zip("ab", ROWS, strict=True)), ROWS, "an object of 2 rows, not a row"),
    ],
)
def test_the_advice_to_convert_a_table_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], rows: list, told: str
):
    with pytest.raises(BadRowError, match=told) as error:
        check_is_row(table)

    # Do what the message says.
    monkeypatch.chdir(tmp_path)
    Path("table.json").write_text(json.dumps(table))
    code = re.search(r"pandas\..*lines=True\)", str(error.value))
    assert code is not None
    eval(code[0], {"pandas": pandas, "FILE": "table.json"})
    written = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [{name: _text(value) for name, value in row.items()} for row in written] == rows


def _text(value: object) -> object:
    """pandas reads a column of digits as numbers."""
    return value if isinstance(value, list) else str(value)


@pytest.mark.parametrize(
    "row",
    [
        *ROWS, {"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT, "text", {}, None,
        {"input_ids": [1, 2], "labels": [1, 2]}, {"tokens": ["a", "b"], "tags": [0, 1]},
        {"text": ["Hello", " there"]}, {"messages": [["user", "Hi"], ["assistant", "Hello"]]},
        {"chosen": CHAT, "rejected": CHAT}, {"a": [], "b": []}, {"prompt": {"text": "Hi"}},
        {"prompt": ["Hi"], "completion": ["Hello", "Bye"]}, {"a": {"x": 1}, "b": {"y": 1}},
    ],
)  # fmt: skip
def test_a_row_is_not_taken_for_a_table(row: object):
    check_is_row(row)
