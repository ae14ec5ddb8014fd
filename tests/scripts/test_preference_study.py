"""The study of preferences on a tiny model: its rows, its commands, its search and its tables."""

import json
import re
from pathlib import Path

import pytest
import yaml

from scripts.study import preferences as study
from scripts.study.preferences_page import demo_table, search_table
from scripts.tiny_model import write_tiny_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the study small: a tiny model, few rows, few steps, results of its own."""
    model = str(write_tiny_model(tmp_path / "model"))
    monkeypatch.setattr(study, "MODEL", model)
    files = {name: tmp_path / file.name for name, file in study.RESULTS.items()}
    monkeypatch.setattr(study, "RESULTS", files)
    monkeypatch.setattr(study, "STEPS", 2)
    monkeypatch.setattr(study, "MAX_TOKENS", 4)
    monkeypatch.setattr(study, "SEARCH_PAIRS", 4)
    commands = {
        name: re.sub("--iters [0-9]+", "--iters 2", command.replace("smollm2-135m", model))
        for name, command in study.COMMANDS.items()
    }
    monkeypatch.setattr(study, "COMMANDS", commands)
    rows = {name: rows[:48] for name, rows in study.demo_rows().items()}
    monkeypatch.setattr(study, "demo_rows", lambda: rows)
    monkeypatch.setattr(study, "SFT_ROWS", 24)
    monkeypatch.setattr(study, "PAIR_ROWS", 24)
    return tmp_path / "demo"


def test_the_rows_hold_both_styles_and_no_split_shares_a_prompt(tmp_path: Path):
    study.write_rows(tmp_path)
    files = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*.jsonl")}
    rows = {name: study.read_rows(path) for name, path in files.items()}
    assert {name: len(found) for name, found in rows.items()} == {
        "sft/train.jsonl": 600, "sft/valid.jsonl": 24,
        "pairs/train.jsonl": 120, "pairs/valid.jsonl": 24, "pairs/test.jsonl": 150,
        "ratings/train.jsonl": 240,
    }  # fmt: skip

    # KTO learns the answers of the pairs, one by one.
    ratings = rows.pop("ratings/train.jsonl")
    for number, row in enumerate(rows["pairs/train.jsonl"]):
        good, bad = ratings[2 * number : 2 * number + 2]
        assert (good["completion"], good["label"]) == (row["chosen"], "true")
        assert (bad["completion"], bad["label"]) == (row["rejected"], "false")

    # The answers of a pair have the same content, and differ in their style.
    for row in rows["pairs/train.jsonl"]:
        assert json.loads(row["chosen"]) == json.loads(row["rejected"])
        assert "\n" not in row["chosen"]
        assert "\n" in row["rejected"]

    # SFT learns each action in one style, and half of the rows in each.
    styles = ["\n" in row["completion"] for row in rows["sft/train.jsonl"]]
    assert 0.4 < sum(styles) / len(styles) < 0.6

    # No combination of arguments is in two splits.
    contents: list[set[str]] = []
    for found in rows.values():
        answers = [row.get("chosen") or row["completion"] for row in found]
        contents.append({json.dumps(json.loads(answer)) for answer in answers})
    assert len(set().union(*contents)) == sum(map(len, contents)) == 918


def test_the_search_continues_and_its_best_rates_get_more_seeds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(study, "RATES", {"dpo": (1e-3,), "kto": (1e-3,)})
    monkeypatch.setattr(study, "RATIOS", (16.0,))
    monkeypatch.setattr(study, "SEEDS", 2)
    study.write_rows(folder)

    # There is no time for a run at first, and a second call makes them all.
    file = study.RESULTS["search"]
    study.run_search(folder, study.Results(file), deadline=0.0)
    assert [line["part"] for line in study.Results(file).lines] == ["start", "start"]
    study.run_search(folder, study.Results(file), deadline=float("inf"))
    lines = [line for line in study.Results(file).lines if line["part"] == "search"]
    found = [(line["objective"], line["weight"], line["seed"]) for line in lines]
    assert found == [
        ("dpo", None, 0), ("dpo", None, 1), ("dpo", 0.5, 0), ("dpo", 0.02, 0),
        ("kto", None, 0), ("kto", None, 1), ("kto", 0.5, 0), ("kto", 0.02, 0),
    ]  # fmt: skip
    assert all(0 <= line["preferred"] <= 1 and line["commit"] for line in lines)

    # The table has a row for each cell, with the number of its seeds.
    table = search_table(lines)
    assert "| dpo | 16 | 0.00025 | default | 2 |" in table
    assert "| kto | 16 | 0.00025 | `beta` 0.5 | 1 |" in table


def seed_of(run: Path) -> int:
    """Return the seed in a run's settings."""
    return yaml.safe_load((run / "run.yaml").read_text())["seed"]


def test_the_demo_stores_its_seed_and_reads_lines_without_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    commands = {name: study.COMMANDS[name] for name in ("first", "dpo")}
    monkeypatch.setattr(study, "COMMANDS", commands)
    file = study.RESULTS["demo"]
    study.main(["demo", str(folder)])
    lines = study.Results(file).lines
    assert [(line["model"], line["seed"]) for line in lines] == [
        ("base", 0), ("first", 0), ("dpo", 0),
    ]  # fmt: skip

    # Lines that were stored before seeds were are those of seed 0, so nothing is measured again.
    old = [{key: value for key, value in line.items() if key != "seed"} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in old))
    study.main(["demo", str(folder)])
    assert study.Results(file).lines == [{"seed": 0} | line for line in old]

    # Another seed has runs of its own; the base is the same.
    study.main(["demo", str(folder), "--seed", "1"])
    lines = study.Results(file).lines
    assert [(line["model"], line["seed"]) for line in lines[3:]] == [("first", 1), ("dpo", 1)]
    assert seed_of(folder / "seed-1/dpo") == 1
    assert seed_of(folder / "dpo") == 0
    table = demo_table(lines)
    assert "| SmolLM2 135M | 1 | 48 |" in table
    assert "| DPO after it, β 0.5 | 2 | 48 |" in table


def test_content_counts_in_any_style():
    assert study.read_json('{\n  "a": 1\n}') == study.read_json('{"a": 1}')
    assert study.read_json('{"a": 1') is None
