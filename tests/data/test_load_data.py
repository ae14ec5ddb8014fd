"""From files to examples: what is reported, and how much memory it takes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.first_rows import check_rows
from mlx_loraplus.errors import DataError
from mlx_loraplus.runs import start_event
from mlx_loraplus.settings import configure
from tests.data.reading import GOOD, load, write

# --- what is reported


def test_every_bad_row_of_every_file_is_told_at_once(tmp_path: Path, letters):
    train = f"{GOOD}\n\n{{\n[]\n{GOOD}\n"
    folder = write(tmp_path / "data", train=train, valid='{"text": ""}', test=b'{"text": "\xe9"}')
    for read in (
        lambda: load(letters(), folder),
        lambda: check_rows(configure(TrainConfig, {"data": str(folder)})),
    ):
        with pytest.raises(DataError) as error:
            read()
        message = str(error.value)
        for place in (
            "train.jsonl:3: ",
            "train.jsonl:4: ",
            "valid.jsonl:1: 'text' is empty",
            "test.jsonl:1: not UTF-8",
        ):
            assert place in message
        assert "train.jsonl:1" not in message
        assert message.endswith("; --on-bad drop skips bad rows")
        assert "\n" not in message


def test_many_bad_rows_are_counted(tmp_path: Path, letters):
    folder = write(tmp_path / "data", train="{\n" * 1000 + GOOD)
    for read in (
        lambda: load(letters(), folder),
        lambda: check_rows(configure(TrainConfig, {"data": str(folder)})),
    ):
        with pytest.raises(
            DataError,
            match=(
                r"^1,000 bad rows: train\.jsonl:1 and others: not JSON .*; a row needs messages, "
            ),
        ):
            read()
    data = load(letters(), folder, on_bad="drop")
    assert str(data.reports["train"]) == "1 row, 3 tokens, 2 supervised; 1,000 bad rows dropped"
    assert len(data.reports["train"].bad_rows) == 100

    # Rows at which training stops are not called dropped.
    data = load(letters(), folder, strict=False)
    assert str(data.reports["train"]) == "1 row, 3 tokens, 2 supervised; 1,000 bad rows"


def test_rows_that_the_template_refuses_are_bad_rows(tmp_path: Path, letters):
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    folder = write(tmp_path / "data", train=f"{GOOD}\n{json.dumps({'messages': turns})}")
    with pytest.raises(
        DataError,
        match=r"train\.jsonl:2: the chat template refuses it \(Conversation roles must alt",
    ) as caught:
        load(letters("gemma3"), folder)
    # Its fields are right.
    assert "a row needs" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_a_file_without_rows(tmp_path: Path, letters, content: str):
    with pytest.raises(DataError, match=r"data: no training rows; a row needs messages, "):
        load(letters(), write(tmp_path / "data", train=content))


def test_kinds_may_be_mixed_and_are_told(tmp_path: Path, letters):
    rows = [GOOD, '{"text": "t"}', '{"question": "q", "answer": "a", "id": 3}', GOOD]
    report = load(letters(), write(tmp_path / "data", train="\n".join(rows))).reports["train"]
    assert report.kinds == {"completion": 2, "question": 1, "text": 1}
    assert "unused fields: 'id' (1 row, for example train.jsonl:3)" in report.notes
    assert any(
        note.startswith("no chat template, so question rows are rendered as")
        for note in report.notes
    )


def test_rows_without_the_columns_that_fields_names_are_noted(tmp_path: Path, letters):
    rows = [GOOD, '{"ask": "q", "say": "a"}', GOOD]
    fields = ["prompt=ask", "completion=say"]
    report = load(
        letters(), write(tmp_path / "data", train="\n".join(rows)), fields=fields
    ).reports["train"]
    note = (
        "none of the columns named by --fields ('ask', 'say') was found, so the columns were"
        " auto-detected (2 rows, for example train.jsonl:1)"
    )
    assert report.kinds == {"completion": 3}
    assert note in report.notes


def test_a_turn_whose_end_does_not_end_generation_is_noted(tmp_path: Path, letters):
    tokenizer = letters(
        "chatml", special="<|im_start|> <|im_end|>"
    )  # a base model with an end of text only
    folder = write(tmp_path / "data", train=GOOD)
    assert any(
        "do not end generation" in note for note in load(tokenizer, folder).reports["train"].notes
    )
    sound = letters("chatml", special="<|im_start|>", ends="</s> <|im_end|>")
    assert load(sound, folder).reports["train"].notes == []


def test_tokens_are_counted_as_in_the_history_of_the_run(tmp_path: Path, letters):
    """The template ends turns with a line break, which is not trained on."""
    tokenizer = letters("chatml", special="<|im_start|>", ends="<|im_end|>")
    data = load(tokenizer, write(tmp_path / "data", train=GOOD))
    examples, report = data.examples["train"], data.reports["train"]
    (example,) = examples
    assert not example.supervised[-1]
    assert report.tokens == np.flatnonzero(example.supervised)[-1] + 1
    assert start_event._counts_of(examples)["tokens"] == report.tokens


# --- memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    """scripts/stress/data_memory measures the same on millions of rows."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
import json
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.settings import configure
from mlx_loraplus.data.load_data import load_data
from mlx_loraplus.training.make_batches import plan_batches
from tests.data.conftest import make_letters
def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
tokenizer = make_letters()
for rows in (2_000, 10_000):
    path = Path({str(tmp_path)!r}) / f"{{rows}}.jsonl"
    row = json.dumps({{"prompt": "xy " * 100, "completion": "xyz " * 100}})
    path.write_text(f"{{row}}\\n" * rows)
    config = configure(TrainConfig, {{"data": str(path)}})
    batches = plan_batches(load_data(config, tokenizer, "train").examples["train"], config.data, 0)
    batches[0]
    print(peak())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    few, many = map(float, done.stdout.split())
    assert many - few < 20, "MB for 8,000 more rows: 6 MB of text, 28 MB of tokens on disk"


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n \n"), ("a.csv", "prompt,completion\n")])
def test_files_without_rows_are_refused_before_the_model_is_loaded(
    tmp_path: Path, name: str, text: str
):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="no training rows; a row needs messages"):
        check_rows(configure(TrainConfig, {"data": (str(tmp_path / name),)}))
