"""What scripts/bench/rivals hands to other trainers, and what it makes of their numbers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_loraplus.data.rows import Row
from scripts.bench import rival_tasks, rivals
from scripts.bench.rival_tasks import as_row, pair_rows
from scripts.bench.rival_trainers import ours
from scripts.bench.rival_trainers.common import BETA, Clock, Task, judge, read_task
from scripts.bench.rivals_table import OURS, markdown
from scripts.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]


def task_of(folder: Path, objective: str) -> Task:
    """A task of two passes over two batches of two, with a tiny model."""
    chance = np.random.default_rng(0)
    rows = [
        {"tokens": chance.integers(3, 97, length).tolist(), "offset": 3}
        for length in (6, 9, 12, 7, 8, 10, 6, 11)
    ]
    content = {
        "model": str(write_tiny_model(folder / "model")), "objective": objective, "batch_size": 2, "updates": 2,
        "passes": 2, "targets": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"], "rank": 4,
        "scale": 2.0, "rate": 1e-2, "seed": 0, "max_length": 64, "checkpoint": False,
        "rows": rows if objective == "dpo" else rows[:4], "held_out": rows[4:], "folder": str(folder),
    }  # fmt: skip
    (folder / "task.json").write_text(json.dumps(content))
    return read_task(str(folder / "task.json"))


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_ours_trains_what_a_task_says(tmp_path: Path, objective: str):
    task = task_of(tmp_path, objective)
    clock = Clock(task.updates)
    ours.train(task, clock)
    assert len(clock.moments) == len(clock.losses) == len(clock.padded) == task.steps
    assert len(clock.kernels) == task.passes
    assert clock.peak_bytes > clock.base_bytes > 0
    useful = sum(len(row["tokens"]) - 1 for row in task.rows)
    assert sum(clock.padded[task.updates :]) >= useful
    assert (clock.reference_seconds > 0) == (objective == "dpo")
    if objective == "dpo":  # the first update starts from the reference
        assert clock.losses[0] == pytest.approx(math.log(2), abs=1e-4)


def test_a_clock_counts_the_batches_of_one_shuffle_after_the_other():
    def batches(size: int) -> Any:
        while True:
            for length in (5, 9):
                yield np.zeros((size, length)), np.zeros((size, 2))

    clock = Clock(2)
    iterate = clock.counted(batches)
    lengths = [next(iterate(4))[0].shape[1] for _ in range(3)]
    assert lengths == [5, 9, 5]  # asking again does not start again
    assert clock.padded == [16, 32, 16]

    both = Clock(2)
    next(both.counted(batches, 2)(4))
    assert both.padded == [16 + 4]


def test_held_out_rows_are_judged_by_the_objective(tmp_path: Path):
    assert judge(task_of(tmp_path, "sft"), [-3.0, -5.0], 4, []) == 2.0
    loss = judge(task_of(tmp_path, "dpo"), [-1.0, -4.0], 4, [-2.0, -3.0])
    assert loss == pytest.approx(math.log1p(math.exp(-BETA * 2)))


class Characters:
    """A tokenizer of one token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_the_rejected_answer_is_another_rows():
    texts = [("a:", " 1"), ("b:", " 1"), ("c:", " 2")]
    rows = [Row("completion", {"prompt": p, "completion": c}, 1) for p, c in texts]
    found = pair_rows(rows, Characters())
    assert [(row["chosen"], row["rejected"]) for row in found[::2]] == [
        (" 1", " 2"),
        (" 1", " 2"),
        (" 2", " 1"),
    ]
    assert found[1]["tokens"] == Characters().encode("a: 2")
    assert {row["offset"] for row in found} == {2}


def test_a_row_that_is_supervised_in_two_places_is_refused():
    example = rival_tasks.Example(np.arange(5, dtype=np.int32), np.array([0, 1, 0, 1, 1]) > 0)
    with pytest.raises(ValueError, match="not supervised to its end"):
        as_row(example)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "gema"], "'gema' is not one of gemma, gemma-checkpoint, text"),
        (["--trainers", "unsloth,axolotl"], "'axolotl' is not one of mlx_loraplus, mlx-lm,"),
        (["--updates", "0"], "'0' is not a whole number of at least 1"),
        (["--data", "nowhere"], "--data nowhere: there is no such folder"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        rivals.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_every_trainer_has_its_file():
    for rival in rivals.RIVALS.values():
        assert (ROOT / "scripts/bench/rival_trainers" / f"{rival.module}.py").exists()


def run(seconds: float, peak: int, padded: int | None) -> dict[str, Any]:
    return {
        "seconds": seconds, "peak_bytes": peak + 5, "base_bytes": 5, "padded_tokens": padded, "losses": [9.0, 9.0, 2.0, 4.0],
        "held_out_loss": 1.5, "matmul_flops_per_second": 1e9,
    }  # fmt: skip


def test_the_table_shows_where_a_rival_wins_and_what_did_not_run():
    trainer = {"version": "1", "licence": "MIT", "mlx": "2", "mlx-lm": "3"}
    case = {
        "title": "Tiny", "batch_size": 8, "data": "demo", "updates": 2, "useful_tokens": 90,
        "machine": {"cpu": "A", "cores": 2}, "commit": "abc", "date": "2026-11-29",
        "runs": {
            OURS: [run(2.0, 10**8, 100)],
            "lean": [run(1.0, 5 * 10**7, 95), run(3.0, 7 * 10**7, 95), run(1.0, 5 * 10**7, 95)],
            "slow": [run(4.0, 2 * 10**8, None)],
        },
        "errors": {"absent": "ImportError: no Metal"},
    }  # fmt: skip
    text = markdown({"trainers": {OURS: trainer, "slow": trainer}, "cases": {"tiny": case}})
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in rows[1:]] == [
        "| lean",
        f"| {OURS}",
        "| slow",
        "| absent",
    ]
    assert rows[1] == "| lean | 0.50 | 0.50x | 90 | 50 MB | 0.50x | 5.3% | 3.000 | 1.500 |"
    assert "| slow | 2.00 | 2.00x | 22 | 200 MB | 2.00x | - | 3.000 | 1.500 |" in rows
    assert "its update takes 0.50 times as long as ours" in text
    assert "Less padding than ours: lean (5.3% against 10.0%)." in text
    assert "absent did not run: `ImportError: no Metal`" in text
    assert "slow 1 (MIT), mlx 2, mlx-lm 3" in text
