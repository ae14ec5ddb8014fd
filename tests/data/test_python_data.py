"""Rows from Python give the same training data as the same rows in files."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import datetime
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pytest

from mlx_loraplus import DataError
from mlx_loraplus.data.python_data import store_data
from tests.data.conftest import make_letters

ROWS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(4) for b in range(3)]
VALID = [{"prompt": "5 + 5 =", "completion": " 10"}]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Rows:
    """An iterable of rows that is no list."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(ROWS)


SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "iterable": Rows,
    "mappings": lambda: [MappingProxyType(row) for row in ROWS],
    "one split": lambda: {"train": ROWS},
    "pandas": lambda: pd.DataFrame(ROWS),
    "arrow": lambda: pyarrow.Table.from_pylist(ROWS),
    "dataset": lambda: datasets.Dataset.from_list(ROWS),
    "streamed": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "array": lambda: np.array(ROWS, object),
}


def preview(data: Any, **settings: Any) -> Any:
    return ml.preview(data, make_letters("chatml"), max_seq_length=128, **settings)


def examples_of(data: Any, split: str = "train", **settings: Any) -> list[list[int]]:
    found = preview(data, **settings)
    assert not found.data.problems
    return [example.tokens.tolist() for example in found.data.examples[split]]


def problem_with(data: Any, **settings: Any) -> str:
    """Return the one line that tells what is wrong with data."""
    with pytest.raises(DataError) as error:
        preview(data, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", SOURCES)
def test_rows_from_python_train_like_a_file(kind: str, tmp_path: Path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert examples_of(SOURCES[kind]()) == examples_of(file) == examples_of(str(file))
    assert len(examples_of(file)) + len(examples_of(file, "valid")) == len(ROWS)


@pytest.mark.parametrize("name", ["valid", "validation", "dev"])
def test_a_dict_of_splits(name: str):
    splits: dict[str, Any] = {"train": ROWS, name: pd.DataFrame(VALID), "test": iter(VALID)}
    for data in (splits, datasets.DatasetDict({
        key: datasets.Dataset.from_list(rows)
        for key, rows in {"train": ROWS, name: VALID, "test": VALID}.items()
    })):  # fmt: skip
        found = preview(data).data.examples
        assert [len(found[split]) for split in ("train", "valid", "test")] == [12, 1, 1]
        assert found["valid"].place(0) == "data valid:1"


def test_several_data_sets_and_their_weights(tmp_path: Path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    data = [file, pd.DataFrame(ROWS[:4]), {"train": ROWS[:2], "valid": VALID}]
    found = preview(data, data_weights=(1, 0.5, 2))
    train = found.data.examples["train"]
    assert len(train.of_epoch(0)) == 12 + 2 + 4
    assert {train.place(index).rpartition(":")[0] for index in range(len(train))} == {
        str(file), "data[1]", "data[2] train",
    }  # fmt: skip


def test_values_of_other_libraries_become_json():
    frame = pd.DataFrame(
        {
            "messages": [np.array(CHAT), np.array(CHAT)],
            "score": np.array([1, 2]),
            "when": [pd.Timestamp("2024-01-01"), pd.NaT],
            "tag": pd.array([1, None], dtype="Int64"),
            "picture": [b"\0", datetime.date(2024, 1, 1)],
        }
    )
    assert examples_of(frame) == examples_of([{"messages": CHAT}] * 2) == examples_of([CHAT] * 2)


def test_missing_values_are_bad_rows_with_their_numbers():
    frame = pd.DataFrame({"prompt": ["a", "b", "c"], "completion": ["x", np.nan, None]})
    found = preview(frame)
    assert found.data.reports["train"].bad == 2
    (problem,) = found.data.problems
    assert problem.startswith("2 bad rows: data:2")
    assert len(examples_of(frame, on_bad="drop")) == 1


def test_other_settings_work_with_rows(tmp_path: Path):
    assert len(preview(ROWS, valid_split=0.25).data.examples["valid"]) == 3
    renamed = [{"q": row["prompt"], "a": row["completion"]} for row in ROWS]
    assert examples_of(renamed, fields={"prompt": "q", "completion": "a"}) == examples_of(ROWS)
    leak = preview({"train": ROWS, "valid": ROWS[:1]}).overlaps
    assert any("data valid:1 = data train:1" in str(overlap) for overlap in leak)
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert preview(ROWS, pack=True).plan == preview(file, pack=True).plan


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("no_such_folder/x", "data not found|can't be loaded"),
        ("Once upon a time", "is the text 'Once upon a time', which is not a path; give texts"),
        (["Once upon a time", "there was"], r"data\[0\] is the text 'Once upon"),
        ((text for text in ("a", "b")), "row 1 of data is the text 'a'; give texts as {'text'"),
        (ROWS[0], r"data is one dict \(prompt, completion\); give a list of rows"),
        ({"prompt": ["a"], "completion": ["b"]}, "data is one dict"),
        ({}, "data is one dict"),
        ({"train": "rows.jsonl"}, r"data is one dict \(train\) whose values are not rows; give"),
        ({"train": ROWS, "valid": "v.jsonl"}, r"data\['valid'\] is of the type str \('v.jsonl'\), and a"),
        ({"train": ROWS, "extra": ROWS}, r"data\['extra'\] is not a split; give at most one each of"),
        ({"train": ROWS, "valid": VALID, "dev": VALID}, r"\['dev'\] is a second valid split"),
        ([], "data has no rows; to train on the demo set, leave data out"),
        (iter([]), "an iterator is empty after its first use"),
        (pd.DataFrame(), "data has no rows"),
        ({("a", "b")}, "data is of the type set, whose rows have no order; give a path"),
        (ROWS.copy, "data is of the type builtin_function_or_method, which must be called to give rows"),
        (5, "data is of the type int; give a path or a hub id, an iterable of rows"),
        (b"bytes", "data is of the type bytes; give"),
        ([ROWS, "file.jsonl"], r"data\[0\] is a list, but .* give rows next to data sets as"),
        ([{("a",): 1}], "row 1 of data can't be written as JSON: keys must be str"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), r"two columns have the same name \(a\): rename or drop"),
    ],
)  # fmt: skip
def test_wrong_data_is_one_line(data: Any, words: str):
    assert re.search(words, problem_with(data))


def test_wrong_rows_are_reported_together():
    (problem,) = preview([["a"], ["b"], 3]).data.problems
    assert problem.startswith("3 bad rows: data:1 and others: a list, not an object; data:3: a nu")


def test_no_data_is_refused_by_functions_that_train(tmp_path: Path):
    with pytest.raises(DataError, match="data is None; give a path"):
        store_data({"data": None})
    assert store_data({"rank": 4}) == {"rank": 4}


def test_an_error_of_the_users_generator_is_kept(cache: Path):
    def rows() -> Iterator[dict[str, str]]:
        yield ROWS[0]
        raise FileNotFoundError(2, "mine")

    with pytest.raises(FileNotFoundError, match="mine"):
        preview(rows())
    assert not list((cache / "python").iterdir())


def test_equal_rows_are_stored_once_and_for_a_month(cache: Path):
    (name,) = store_data({"data": ROWS})["data"]
    assert store_data({"data": iter(ROWS)})["data"] == [name]
    assert Path(name).name.startswith("12-rows-")
    (other,) = store_data({"data": {"valid": ROWS}})["data"]
    assert other != name
    assert len(list((cache / "python").iterdir())) == 2

    # Rows that are used stay
    long_ago = time.time() - 40 * 86_400
    for folder in (name, other):
        os.utime(folder, (long_ago, long_ago))
    preview(Path(name))
    store_data({"data": VALID})
    assert Path(name).exists()
    assert not Path(other).exists()


def test_rows_that_were_removed_from_the_cache_are_named(cache: Path):
    (name,) = store_data({"data": ROWS})["data"]
    shutil.rmtree(name)
    words = f"these rows came from Python, and their copy {name} was removed from the cache: give"
    assert words in problem_with(name)
