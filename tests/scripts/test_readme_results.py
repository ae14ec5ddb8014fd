"""What the generated tables of docs/ say of stored results, and what the stored results must be."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import readme_results
from scripts.bench import preferences as preference_steps
from scripts.tiny_model import write_tiny_model

PLACE: dict[str, Any] = {
    "machine": {"cpu": "A", "cores": 2},
    "versions": {"mlx": "1", "mlx-lm": "2", "mlx_loraplus": "3"},
    "commit": "abc",
    "date": "2026-11-30",
}


def test_the_page_of_full_says_what_trained_and_how_long(monkeypatch: pytest.MonkeyPatch):
    def trainer(losses: list[float]) -> dict[str, Any]:
        return {"losses": losses, "seconds": [1.0], "peak_bytes": 10**6}

    result = PLACE | {
        "model": "tiny", "rate": 1e-5, "steps": 8,
        "training": {
            "float32": {"rows": 4, "stock": trainer([2.0] * 6), "ours": trainer([2.0] * 6)},
            "bfloat16": {"rows": 1, "stock": trainer([2.0] * 3), "ours": trainer([2.0] * 3)},
        },
        "rounding": {"float32": [2.0, 1.0]},
    }  # fmt: skip
    monkeypatch.setattr(readme_results, "_result", lambda *_: result)
    first, _, second = readme_results.full_tables().partition("The next table")
    assert "the weights of all blocks" in first
    assert "| float32 | 4 | 6 |" in first
    assert "| bfloat16 | 1 | 3 |" in first
    assert "8 steps" not in first
    assert "Every weight trains here, for 8 steps" in second


def test_a_step_of_every_objective_is_measured_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = str(write_tiny_model(tmp_path / "model"))
    monkeypatch.setattr(preference_steps, "RESULT", tmp_path / "preferences.json")
    preference_steps.main(["--model", model, "--length", "16", "--steps", "1", "--rounds", "1"])
    result = json.loads((tmp_path / "preferences.json").read_text())
    assert result["commit"]
    assert result["pairs"] == 2
    steps = result["objectives"]
    assert list(steps) == ["sft", "dpo", "ipo", "orpo", "simpo", "kto"]
    assert all(0 <= step["kl_seconds"] < step["seconds"] for step in steps.values())

    # Only KTO has a forward pass before the others.
    others = [step["kl_seconds"] for name, step in steps.items() if name != "kto"]
    assert steps["kto"]["kl_seconds"] > max(others)


def test_the_table_of_steps_shows_each_objective_beside_sft(monkeypatch: pytest.MonkeyPatch):
    def step(seconds: float, kl: float, peak: int) -> dict[str, float]:
        return {"seconds": seconds, "kl_seconds": kl, "peak_bytes": peak}

    result = PLACE | {
        "model": "tiny", "pairs": 2, "length": 256,
        "objectives": {
            "sft": step(2.0, 1e-6, 10**8), "dpo": step(2.1, 1e-6, 10**8), "kto": step(3.0, 0.9, 11 * 10**7),
        },
    }  # fmt: skip
    monkeypatch.setattr(readme_results, "_result", lambda *_: result)
    monkeypatch.setattr(readme_results.Path, "exists", lambda _: True)
    table = readme_results.preference_steps_table()
    assert "| dpo | 2.10 | 1.05x |  | 100 MB | 1.00x |" in table
    assert "| kto | 3.00 | 1.50x | 0.90 | 110 MB | 1.10x |" in table
    assert "at abc; 2026-11-30" in table


def test_every_objective_has_passed_its_judge():
    file = Path(readme_results.__file__).parent / "judges" / "results" / "preferences.json"
    judged = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert {row["objective"].split(",")[0] for row in judged} == {
        "dpo", "ipo", "orpo", "simpo", "kto",
    }  # fmt: skip
    assert [row["objective"] for row in judged if not row["passed"]] == []
