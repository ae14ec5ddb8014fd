"""A field written from several columns."""

import pytest

from mlx_loraplus import ConfigError
from mlx_loraplus.data.fields_setting import parse_names
from mlx_loraplus.data.messages import BadRowError
from mlx_loraplus.data.rows import make_row

NAMES = parse_names([r"prompt={subject}\n{body}", "completion=reply"])


def test_a_template_joins_columns():
    row = make_row({"subject": "Hi", "body": 3, "reply": "x", "id": 1}, 1, NAMES)
    assert row.fields == {"prompt": "Hi\n3", "completion": "x"}
    assert row.unused == ("id",)
    assert row.named


def test_braces_and_backslashes_can_be_written():
    names = parse_names([r"prompt={{{a}}}\\n\t", "completion=b"])
    assert make_row({"a": "x", "b": "y"}, 1, names).fields["prompt"] == "{x}\\n\t"


def test_a_template_may_write_any_text_field():
    names = parse_names(["text={a} {b}"])
    assert make_row({"a": "x", "b": "y"}, 1, names).fields == {"text": "x y"}
    names = parse_names(["question={a}", "answer=b", "system=You know {c}."])
    row = make_row({"a": "x", "b": "y", "c": "z"}, 1, names)
    assert row.fields == {"prompt": "x", "completion": "y", "system": "You know z."}


def test_rows_of_another_kind_are_recognised_as_ever():
    assert make_row({"text": "t"}, 1, NAMES).kind == "text"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"subject": "a", "reply": "x"}, "no 'body', which the template of prompt uses"),
        ({"subject": "a", "body": None, "reply": "x"}, "'body' is null, and the template of"),
        ({"subjct": "a", "body": "b", "reply": "x"}, "(did you mean 'subjct'?)"),
        ({"subject": "a", "body": [1], "reply": "x"}, "'body' holds a list, and the template"),
        ({"subject": "a", "body": "b", "replly": "x"}, "no 'reply' (it has 'subject', 'body'"),
        ({"subjct": "a", "bdy": "b", "rply": "x"}, "--fields names 'reply', which the row does"),
    ],
)
def test_a_row_that_lacks_a_column_is_bad(row: dict, told: str):
    with pytest.raises(BadRowError) as error:
        make_row(row, 1, NAMES)
    assert told in str(error.value)


def test_a_field_that_is_given_twice_is_refused():
    with pytest.raises(ConfigError, match=r"^--fields: prompt is given twice; .*prompt='{a} {b}'$"):
        parse_names(["prompt=q", "prompt=r"])


@pytest.mark.parametrize(
    "pair",
    ["prompt={a", "prompt=a}", "prompt={}", "prompt={a:3}", "prompt={a!r}", "prompt={{a}}",
     "messages={a}", "tools={a}"],
)  # fmt: skip
def test_what_is_no_template_is_refused(pair: str):
    with pytest.raises(ConfigError, match=r"^--fields: [^\n]*template"):
        parse_names([pair])
