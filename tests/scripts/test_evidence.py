"""The harness of the evidence: it searches, repeats, goes on where it was left, and tells what it found."""

import json
import time
from pathlib import Path

import pytest

from scripts.study.evidence import Evidence, Pair, main  # isort: skip
from scripts.study.evidence_page import finals_table, search_table, updates_to_reach
from scripts.tiny_model import write_sums, write_tiny_model

METHODS = (("init1", 1.0, "adam"), ("init1", 4.0, "adam"), ("init1", 1.0, "rite"))


def test_it_searches_and_repeats_and_makes_no_trial_twice(tmp_path: Path):
    write_tiny_model(tmp_path / "model")
    write_sums(tmp_path / "data")
    (tmp_path / "data" / "test.jsonl").write_text((tmp_path / "data" / "valid.jsonl").read_text())
    pair = Pair(str(tmp_path / "model"), "sums", 2, 6, METHODS)
    file, lines = tmp_path / "evidence.jsonl", []

    def evidence(deadline: float) -> Evidence:
        return Evidence(pair, str(tmp_path / "data"), lines, file, deadline)

    evidence(time.perf_counter() + 1000).run()
    assert [json.loads(line) for line in file.read_text().splitlines()] == json.loads(
        json.dumps(lines)
    )
    made = len(lines)
    evidence(0.0).run()  # no time for a new trial, and none is needed
    assert len(lines) == made
    searched = [
        line
        for line in lines
        if line["stage"] == "search" and (line["lr_ratio"], line["rule"]) == (1, "adam")
    ]
    best = min(searched, key=lambda line: line["loss"])["learning_rate"]
    rates = sorted(line["learning_rate"] for line in searched)
    assert rates[0] < best < rates[-1]
    finals = [line for line in lines if line["stage"] == "final"]
    assert {(line["init"], line["lr_ratio"], line["rule"], line["seed"]) for line in finals} == {
        (*method, seed) for method in METHODS for seed in (0, 1, 2)
    }
    assert {
        line["learning_rate"] for line in finals if (line["lr_ratio"], line["rule"]) == (1, "adam")
    } == {best}
    assert all([step for step, _ in line["curve"]] == [0, 2, 4, 6] for line in finals)
    assert finals_table([pair.name], lines).count("| 3 |") == 3
    assert "LoRA, Init[1]: " in search_table([pair.name], lines)


@pytest.mark.parametrize(("loss", "step"), [(3.0, 0), (1.5, 15), (1.0, 20), (0.9, None)])
def test_updates_to_reach_a_loss(loss: float, step: float | None):
    assert updates_to_reach([(0, 2.0), (10, 2.0), (20, 1.0)], loss) == step


def test_it_wants_data(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([])
    assert "--data" in capsys.readouterr().err
