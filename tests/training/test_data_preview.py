"""The preview of a small folder, checked by hand, and what the command prints."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_loraplus import ConfigError, preview
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.demo import demo_rows
from mlx_loraplus.memory.run_sizes import resolve_batch
from mlx_loraplus.settings import configure
from mlx_loraplus.train import main
from mlx_loraplus.training import dry_run
from tests.data.conftest import make_letters


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))


def folder(path: Path, **splits: list[Any]) -> str:
    path.mkdir()
    for name, rows in splits.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def test_what_is_found(tmp_path: Path):
    train = [
        row("ab", "cd"),
        row("ab", "cd"),
        row("AB ", "cd"),
        row("ef", "gh"),
        row("p" * 20, "q"),
        {"text": "t" * 9},
    ]
    valid = [row("ab", "cd"), row("ef", "other"), row("new", "x")]
    data = folder(tmp_path / "data", train=[*train, {"x": 1}], valid=valid)
    found = preview(data, make_letters(), max_seq_length=16, batch_size=2)
    report = found.data.reports["train"]
    assert (report.rows, report.bad, report.dropped, report.kinds) == (
        5,
        1,
        1,
        {"completion": 4, "text": 1},
    )
    assert report.bad_rows == [
        "train.jsonl:7: no known field (it has 'x'); none of them looks like text to learn"
    ]
    assert report.long_rows == ["train.jsonl:5 (22 tokens, dropped)"]
    assert (report.tokens, report.supervised_tokens) == (5 + 5 + 6 + 5 + 10, 3 + 3 + 3 + 3 + 9)

    duplicates, leaks, answers, begun = found.overlaps
    assert duplicates.count == 2, "case and white space do not count"
    assert duplicates.pairs == [
        ("train.jsonl:2", "train.jsonl:1"),
        ("train.jsonl:3", "train.jsonl:1"),
    ]
    assert (leaks.count, leaks.pairs) == (1, [("valid.jsonl:1", "train.jsonl:1")])
    assert (answers.count, answers.pairs) == (1, [("valid.jsonl:2", "train.jsonl:4")])
    assert begun.count == 0, "they are counted already"

    assert found.plan is not None
    assert found.plan.batches == 3
    assert found.plan.useful_tokens == 4 + 4 + 5 + 4 + 9
    assert found.plan.padding == pytest.approx(1 - (4 + 4 + 5 + 4 + 9) / (8 * 2 + 8 * 2 + 16 * 2))
    assert found.samples[0] == ("train.jsonl:1", [("ab", False), ("cd</s>", True)])
    assert len(found.data.problems) == 1

    text = str(found)
    for said in (
        (
            "train: 5 rows, 31 tokens, 21 supervised; 1 row dropped (nothing to train on in their"
            " first 16 tokens); 1 bad"
        ),
        "formats: 4 completion, 1 text",
        "learned: 67.7% of the tokens",
        "bad: train.jsonl:7: no known field",
        "long: train.jsonl:5 (22 tokens, dropped)",
        "valid: 3 rows",
        "2 duplicates in train (train.jsonl:2 = train.jsonl:1, train.jsonl:3 = train.jsonl:1)",
        "1 valid row that is in train (valid.jsonl:1 = train.jsonl:1)",
        "3 in an epoch, of up to 2 rows; ",
        "ab⟦cd</s>⟧",
        "training would stop: train.jsonl:7",
    ):
        assert said in text, said
    assert "<span style" in found._repr_html_()


def test_a_problem_of_many_rows_is_reported_once_as_in_training(tmp_path: Path):
    data = folder(tmp_path / "data", train=[row("ab", "cd"), *([{"prompt": "x"}] * 50), {"x": 1}])
    found = preview(data, make_letters())
    bad = [line for line in str(found).splitlines() if line.startswith("  bad: ")]
    assert [line.split(": ")[1] for line in bad] == ["train.jsonl:2 and others", "train.jsonl:52"]
    assert "51 bad rows: train.jsonl:2 and others: " in found.data.problems[0]


def test_names_that_are_no_text_can_be_printed(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "\\ud800": 1}\n')
    str(preview(str(tmp_path / "rows.jsonl"), make_letters())).encode()


def test_no_duplicates_among_the_parts_of_a_row(tmp_path: Path):
    data = folder(
        tmp_path / "data", train=[{"text": "a" * 100}, {"text": "b"}], test=[{"text": "B "}]
    )
    found = preview(data, make_letters(), max_seq_length=16, on_long="split")
    assert len(found.data.examples["train"]) > 5
    assert [overlap.count for overlap in found.overlaps] == [0, 1, 0, 0]


def test_nothing_to_train_on_is_a_problem_not_a_crash(tmp_path: Path):
    data = folder(tmp_path / "data", train=[{"x": 1}])
    found = preview(data, make_letters())
    assert found.plan is None
    assert "training would stop" in str(found)


def test_packed_plans(tmp_path: Path):
    rows = [row("a" * n, "b" * n) for n in range(1, 30)]
    data = folder(tmp_path / "data", train=rows)
    plans = [preview(data, make_letters(), pack=pack, batch_size=2).plan for pack in (False, True)]
    assert plans[0]
    assert plans[1]
    assert plans[1].batches < plans[0].batches
    assert plans[0].padding < 0.5


def test_packed_rows_get_the_batch_size_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLX_LORAPLUS_MEMORY", "8GB")
    data = folder(tmp_path / "data", train=[row("a", "b")] * 9)
    settings = {"data": data, "model": "smollm2-135m", "batch_size": "auto", "pack": True}
    planned = resolve_batch(configure(TrainConfig, settings), None, 2048).data.batch_size
    assert preview(tokenizer=make_letters(), **settings).config.data.batch_size == planned < 16


def test_the_command_prints_it_and_says_by_its_code_whether_training_would_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("MLX_LORAPLUS_CACHE")  # the model is there
    monkeypatch.setattr(dry_run, "_LONGEST", 0.0)  # seconds; no step is timed
    rows = demo_rows()["train"][:5]
    main(["--model", "smollm2-135m", "--data", folder(tmp_path / "good", train=rows), "--dry-run"])
    said = capsys.readouterr().out
    assert "train: 5 rows" in said
    assert "<|im_start|>assistant\n⟦ {" in said
    bad = folder(tmp_path / "bad", train=[*rows, {"prompt": "x"}])
    with pytest.raises(SystemExit) as stop:
        main(["--model", "smollm2-135m", "--data", bad, "--dry-run"])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "bad: train.jsonl:6: no 'completion'" in printed.out
    assert printed.out.splitlines()[-1].startswith(
        "training would stop: train.jsonl:6: no 'completion'"
    )
    assert not printed.err, "it is said once"
    with pytest.raises(ConfigError):
        dry_run.rehearse(configure(TrainConfig, {"model": "smollm2-135m", "data": bad}), {}, [])
