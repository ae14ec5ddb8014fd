"""The token cache: tables are written once and completely, and only reused if nothing changed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_loraplus.errors import DataError
from tests.data.reading import GOOD, LONG, load, texts, write


def test_a_table_is_encoded_once(tmp_path: Path, cache: Path, letters):
    folder, tokenizer = write(tmp_path / "data", train=f"{GOOD}\n{LONG}", valid=GOOD), letters()
    first = load(tokenizer, folder).examples["train"]
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    again = load(tokenizer, folder, max_seq_length=9, on_long="split", seed=5).examples["train"]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == made
    assert (len(first), len(again)) == (2, 3)
    assert len(list(cache.iterdir())) == 2
    (tmp_path / "moved").mkdir()
    (folder / "train.jsonl").rename(tmp_path / "moved" / "train.jsonl")
    assert load(tokenizer, tmp_path / "moved").examples["train"].place(0) == "train.jsonl:1"
    assert len(list(cache.iterdir())) == 2, "a file that was moved is known again"


def test_what_makes_other_tokens_makes_another_shard(tmp_path: Path, cache: Path, letters):
    folder, tokenizer = (
        write(tmp_path / "data", train='{"prompt": "a", "completion": "b"}'),
        letters(),
    )
    swapped = ["prompt=completion", "completion=prompt"]
    changes: list[dict[str, Any]] = [{}, {"train_on": "everything"}, {"fields": swapped}]
    for number, options in enumerate(changes, start=1):
        load(tokenizer, folder, **options)
        assert len(list(cache.iterdir())) == number, options
    for number, other in enumerate(
        (letters("chatml"), letters("alpaca"), letters(bos="<x>")), start=4
    ):
        load(other, folder)
        assert len(list(cache.iterdir())) == number
    (folder / "train.jsonl").write_text(GOOD.replace("b", "c"))
    os.utime(folder / "train.jsonl", (1, 1))
    examples = load(tokenizer, folder).examples["train"]
    assert len(list(cache.iterdir())) == 7
    assert texts(examples, tokenizer) == ["ac</s>"]


def test_a_crash_halfway_leaves_no_table(
    tmp_path: Path, cache: Path, letters, monkeypatch: pytest.MonkeyPatch
):
    from mlx_loraplus.data import dataset

    folder = write(tmp_path / "data", train="\n".join([GOOD] * 2000))
    real, calls = dataset.encode, []

    def encode(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(dataset, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        load(letters(), folder)
    assert list(cache.iterdir()) == []
    assert len(load(letters(), folder).examples["train"]) == 2000


def test_a_killed_build_is_not_taken_for_a_shard(tmp_path: Path, cache: Path, letters):
    folder = write(tmp_path / "data", train="\n".join([GOOD] * 100))
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from mlx_loraplus.data import dataset
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.settings import configure
from mlx_loraplus.data.load_data import load_data
from tests.data.conftest import make_letters
dataset._MAX_ROWS = 10
real = dataset.encode
def encode(*arguments, calls=[]):
    calls.append(1)
    return os._exit(9) if len(calls) == 5 else real(*arguments)
dataset.encode = encode
load_data(configure(TrainConfig, {{"data": {str(folder)!r}}}), make_letters())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    (left,) = cache.iterdir()
    assert left.name.startswith(".")
    assert len(load(letters(), folder).examples["train"]) == 100


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, letters, monkeypatch: pytest.MonkeyPatch
):
    from mlx_loraplus.data import dataset

    file, real = write(tmp_path / "data", train=GOOD) / "train.jsonl", dataset.encode

    def encode(*arguments: Any) -> Any:
        with file.open("a") as opened:
            opened.write(f"\n{GOOD}")
        return real(*arguments)

    monkeypatch.setattr(dataset, "encode", encode)
    with pytest.raises(DataError, match=r"train\.jsonl changed while it was read"):
        load(letters(), file)


def test_a_fingerprint_tells_other_examples_apart(tmp_path: Path, letters):
    rows = [GOOD, LONG, GOOD.replace("a", "c")]
    folder = write(tmp_path / "data", train="\n".join(rows))
    changes: list[dict[str, Any]] = [
        {},
        {"max_seq_length": 12},
        {"train_on": "everything"},
        {"valid_split": 0.4},
    ]
    prints = [
        load(letters(), folder, **options).examples["train"].fingerprint() for options in changes
    ]
    write(tmp_path / "other", train="\n".join(rows[::-1]))
    prints.append(load(letters(), tmp_path / "other").examples["train"].fingerprint())
    assert len(set(prints)) == 5
    assert load(letters(), folder).examples["train"].fingerprint() == prints[0]
