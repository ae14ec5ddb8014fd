"""Several processes train as one does: real ones, on 127.0.0.1."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_loraplus as ml
from mlx_loraplus.data.batches import Batches
from mlx_loraplus.data.packing import PackedBatches
from mlx_loraplus.training.distributed import World
from mlx_loraplus.training.rank_helpers import split_by_size
from mlx_loraplus.training.schedule import seed_of
from scripts.tiny_model import write_sums, write_tiny_model
from tests.training.teams import MOST, OUT_OF_MEMORY, Runs, do_jobs, wait_for, world
from tests.training.tiny_runs import (
    Place,
    adapter_of,
    examples,
    poison,
    validate_on_what_is_unlearned,
    write_labeled,
    write_pairs,
)

PLAIN = {
    "iters": 30, "batch_size": 5, "lr_ratio": 16, "warmup": 2, "steps_per_report": 1, "steps_per_eval": 10,
    "steps_per_save": 10, "sample_rows": 0, "schedule": "constant",
}  # fmt: skip
EQUAL: dict[str, dict[str, Any]] = {
    "accumulated": {
        "grad_accumulation_steps": 3,
        "iters": None,
        "epochs": 2,
    },  # 16 batches: the last window has one
    "packed": {
        "pack": True,
        "batch_size": 5,
        "max_seq_length": 64,
        "grad_accumulation_steps": 2,
        "iters": 10,
    },
    "compiled": {"compile": "on", "pack": True, "batch_size": 6, "max_seq_length": 64, "iters": 6},
}

PREFERENCES = {"iters": 6, "grad_accumulation_steps": 2, "steps_per_eval": 3}
PAIRS = PREFERENCES | {"objective": "dpo"}
LABELED = PREFERENCES | {"objective": "kto"}


def failing(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """What runs before the first step on every process, with the rank whose device fails there."""
    return {
        "finetune.model_fingerprint": ("1", {}),
        "finetune.probe_model": ("1", {}),
        "finetune.choose_grad_checkpoint": ("1", {}),
        "step_choices.check_step": ("0", {"selfcheck": "on"}),
        # Rows whose reference no other run has stored.
        "reference.find_trunk_and_head": ("1", {"data": str(folder / "new pairs"), **PAIRS}),
        "reference.answer_log_probs": ("1", {"data": str(folder / "new labeled"), **LABELED}),
    }


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("teams")
    write_tiny_model(folder / "model")
    write_sums(folder / "data", rows=38)
    write_sums(folder / "unlearned" / "data")
    write_pairs(folder / "pairs", count=19)
    write_labeled(folder / "labeled", count=19)
    write_pairs(folder / "new pairs", count=17)
    write_labeled(folder / "new labeled", count=17)
    validate_on_what_is_unlearned(Place(folder / "unlearned"))
    return Runs(folder, PLAIN)


@pytest.fixture(scope="module")
def two(teams: Runs) -> dict[str, list[dict]]:
    """Run all jobs of two processes in one start, and return their results by name."""
    other_data = write_sums(teams.folder / "other", rows=38, seed=1)
    jobs = {
        **{name: teams.job(f"2-{name}", **settings) for name, settings in EQUAL.items()},
        "pairs": teams.job("2-pairs", data=str(teams.folder / "pairs"), **PAIRS),
        "labeled": teams.job("2-labeled", data=str(teams.folder / "labeled"), **LABELED),
        "first leg": teams.job("legs", iters=4, steps_per_eval=4),
        "dropout": teams.job("2-dropout", dropout=0.3, iters=6, steps_per_eval=4),
        "dropout, first half": teams.job("2-halves", dropout=0.3, iters=4, steps_per_eval=4),
        "dropout, second half": teams.job("2-halves", dropout=0.3, iters=6, steps_per_eval=4, resume=True),
        "stopped early": teams.job("2-early", data=str(teams.folder / "unlearned" / "data"), patience=2,
                                   steps_per_eval=1, learning_rate=1e-2),
        "late": teams.job("2-late", by_rank={"1": {"max_minutes": 1e-6}, "0": {"max_minutes": 1e-6}}),
        "asked": teams.job("2-asked", iters=4000, by_rank={"1": {"asked_to_stop": True}}),
        "other settings": teams.job("refused", by_rank={"1": {"lr_ratio": 4, "seed": 3}}),
        "other data": teams.job("refused", by_rank={"1": {"data": str(other_data)}}),
        "no data": teams.job("refused", by_rank={"1": {"data": str(teams.folder / "nowhere")}}),
        "few rows": teams.job("refused", batch_size=1),
        **{
            f"fails in {where}": teams.job("failing", by_rank={rank: {"device_fails_in": where}}, **settings)
            for where, (rank, settings) in failing(teams.folder).items()
        },
        # One of the batches
        "a row for one": teams.job("2-short", batch_size=37, iters=2, steps_per_report=2),
    }  # fmt: skip
    return dict(zip(jobs, do_jobs(2, list(jobs.values()), teams.folder / "two"), strict=True))


@pytest.fixture(scope="module")
def legs(teams: Runs, two: dict[str, list[dict]]) -> ml.Run:
    """Resume with one process a run that two processes started."""
    assert "outcome" in two["first leg"][0], two["first leg"]
    return teams.alone("legs", iters=8, steps_per_eval=4, resume=True)


@pytest.fixture(scope="module")
def three(teams: Runs, legs: ml.Run) -> dict[str, list[dict]]:
    """Run all jobs of three processes in one start, and return their results by name."""
    assert legs.finished
    names = ("accumulated", "packed")
    jobs = {
        **{name: teams.job(f"3-{name}", **EQUAL[name]) for name in names},
        "last leg": teams.job("legs", iters=12, steps_per_eval=4, resume=True),
    }
    return dict(zip(jobs, do_jobs(3, list(jobs.values()), teams.folder / "three"), strict=True))


def assert_alike(run: ml.Run, one: ml.Run) -> None:
    """Compare losses and final adapters to 1e-5, and what was counted exactly."""
    for name in ("loss", "valid_loss"):
        assert [step for step, _ in run.losses(name)] == [step for step, _ in one.losses(name)]
        np.testing.assert_allclose(
            *([loss for _, loss in r.losses(name)] for r in (run, one)), rtol=0, atol=1e-5
        )
    counts = [[event.get("supervised_tokens") for event in r.history] for r in (run, one)]
    assert counts[0] == counts[1]
    first, second = adapter_of(run), adapter_of(one)
    for name, array in first.items():
        np.testing.assert_allclose(
            np.array(array), np.array(second[name]), rtol=0, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("name", EQUAL)
def test_two_and_three_processes_train_as_one(teams: Runs, two: dict, three: dict, name: str):
    one = teams.alone(f"1-{name}", **EQUAL[name])
    assert one.losses("loss")[-1][1] < one.losses("loss")[0][1] - 0.1  # it learned
    for size, said in ((2, two[name]), *([(3, three[name])] if name in three else [])):
        assert [rank["outcome"] for rank in said] == ["finished"] * size, said
        assert_alike(ml.Run.load(teams.folder / f"{size}-{name}"), one)


@pytest.mark.parametrize(("rows", "settings"), [("pairs", PAIRS), ("labeled", LABELED)])
def test_two_processes_train_on_preferences_as_one(
    teams: Runs, two: dict, rows: str, settings: dict
):
    assert [rank.get("outcome") for rank in two[rows]] == ["finished"] * 2, two[rows]
    one = teams.alone(f"1-{rows}", data=str(teams.folder / rows), **settings)
    other = ml.Run.load(teams.folder / f"2-{rows}")
    assert_alike(other, one)
    names = ["reward_margin", "reward_accuracy", "logp_chosen", "valid_logp_rejected"]
    if rows == "labeled":
        names += ["kl", "valid_kl"]
    for name in names:
        values = [[value for _, value in run.losses(name)] for run in (one, other)]
        # Before the first update, all rewards are zero up to rounding, which decides their order.
        first = 1 if name == "reward_accuracy" else 0
        np.testing.assert_allclose(values[0][first:], values[1][first:], rtol=1e-4, atol=1e-5)


def test_only_the_main_process_writes_and_prints(teams: Runs, two: dict, three: dict):
    assert not (teams.folder / "never").exists()
    for said in (*two.values(), *three.values()):
        assert all(not rank["lines"] for rank in said[1:])


def test_a_run_resumes_with_two_one_and_three_processes(teams: Runs, three: dict):
    assert three["last leg"][0]["outcome"] == "finished"
    assert_alike(
        ml.Run.load(teams.folder / "legs"), teams.alone("straight", iters=12, steps_per_eval=4)
    )


def test_dropout_differs_by_rank_and_resumes_bit_exactly(teams: Runs, two: dict):
    assert "outcome" in two["dropout, second half"][0], two
    whole, halves = (ml.Run.load(teams.folder / name) for name in ("2-dropout", "2-halves"))
    assert whole.losses("loss") == halves.losses("loss")
    for name, array in adapter_of(whole).items():
        assert mx.array_equal(array, adapter_of(halves)[name]), name
    seeds = {seed_of(0, step, part) for step in range(1, 5) for part in range(4)}
    assert len(seeds) == 16


def test_a_batch_may_leave_a_process_without_a_row(two: dict):
    assert [rank.get("outcome") for rank in two["a row for one"]] == ["finished"] * 2, two[
        "a row for one"
    ]


def test_all_processes_stop_if_one_does(two: dict):
    early = two["stopped early"]
    assert [rank["outcome"] for rank in early] == ["stopped early"] * 2
    assert len({json.dumps([e["step"] for e in rank["history"]]) for rank in early}) == 1
    assert [rank["outcome"] for rank in two["late"]] == ["out of time"] * 2
    assert two["late"][0]["history"][-1]["step"] == 1
    assert [rank["outcome"] for rank in two["asked"]] == [
        "interrupted"
    ] * 2  # SIGTERM came to the second alone
    assert two["asked"][0]["history"][-1]["step"] < 4000


def test_processes_that_differ_are_refused_with_one_line(two: dict, teams: Runs):
    for name, words in {
        "other settings": [
            "lr_ratio is 16.0 on rank 0, 4.0 on rank 1",
            "seed is 0 on rank 0, 3 on rank 1",
        ],
        "other data": ["the training data is", "on rank 0", "on rank 1", "the validation data"],
        "no data": ["rank 1: ", "nowhere"],
        "few rows": [
            "batch_size=1 leaves some of 2 processes without an example",
            "batch_size=2 or more",
        ],
    }.items():
        first, second = two[name]
        assert first["error"] == second["error"], name
        assert (first["told"], second["told"]) == (False, True), name
        assert all(word in first["error"] for word in words), first["error"]
        assert "\n" not in first["error"]
    assert not (teams.folder / "refused" / "adapters.safetensors").exists()


def test_a_device_that_fails_before_the_first_step_is_one_line_for_all(teams: Runs, two: dict):
    """It is not taken for a lost process by the others, which would say to resume."""
    for where, (rank, _) in failing(teams.folder).items():
        first, second = two[f"fails in {where}"]
        assert first["error"] == second["error"], where
        assert first["error"].startswith(f"rank {rank}: memory ran out ({OUT_OF_MEMORY}): close")
        assert (first["told"], second["told"]) == (False, True), where
        assert [first, second][int(rank)]["kind"] == "DeviceError", where
    assert not (teams.folder / "failing" / "adapters.safetensors").exists()


@pytest.mark.parametrize(
    ("parallel", "where"),
    [("data", "trainer.batches_of_step"), ("tensor", "finetune.probe_model")],
)
def test_a_device_that_fails_between_collectives_ends_its_process(
    teams: Runs, parallel: str, where: str
):
    """The others wait for it in a collective, so they can only notice that it has ended."""
    name = f"ends {parallel}"
    job = teams.job(name, by_rank={"1": {"device_fails_in": where}}, parallel=parallel)
    ((first, second),) = do_jobs(2, [job], teams.folder / f"logs {name}")
    assert second["kind"] == "DeviceError"
    assert second["error"].startswith("memory ran out")
    assert OUT_OF_MEMORY in second["error"]
    assert first["kind"] == "PeerError"
    assert first["error"].startswith("rank 0 of 2: another process has ended, hangs")
    assert "newest checkpoint, if there is one" in first["error"]
    assert (first["told"], second["told"]) == (False, False)


def test_a_run_without_effect_fails_on_all_processes_with_one_line(tmp_path: Path):
    write_tiny_model(tmp_path / "model")
    write_sums(tmp_path / "data")
    poison(Place(tmp_path), *range(40))
    words = Runs(tmp_path, PLAIN).words("run", iters=3, max_skipped_steps=50)
    with world(2, words, tmp_path / "logs") as processes:
        assert [process.wait(MOST) for process in processes] == [2, 2]
    lines = [
        line
        for rank in (0, 1)
        for line in (tmp_path / "logs" / f"{rank}.log").read_text().splitlines()
    ]
    (line,) = [line for line in lines if "error" in line]
    assert line.startswith("error: no step took effect: all 3 were skipped")
    assert ml.Run.load(tmp_path / "run").outcome == "failed"


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSTOP"])
def test_the_others_stop_with_a_checkpoint_where_one_is_lost(teams: Runs, kind: str):
    run = teams.folder / kind
    settings = {
        "iters": 4000,
        "distributed_timeout": 5 if kind == "SIGSTOP" else 600,
    }  # seconds that none is late by itself
    words = teams.words(kind, steps_per_eval=4000, steps_per_save=4000, **settings)
    with world(2, words, teams.folder / f"logs-{kind}") as processes:
        log = teams.folder / f"logs-{kind}" / "0.log"
        wait_for(log, r"step +5/", processes)
        processes[1].send_signal(getattr(signal, kind))
        assert processes[0].wait(MOST) == 2
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "rank 0 of 2: another process has ended, hangs" in error
    saved = [path.name for path in (run / "checkpoints").iterdir()]
    assert len(saved) == 1
    done = int(saved[0])
    assert done >= 5
    again = teams.alone(kind, iters=done + 3, steps_per_eval=4000, steps_per_save=4000, resume=True)
    straight = teams.alone(
        f"{kind}-straight", iters=done + 3, steps_per_eval=4000, steps_per_save=4000
    )
    assert_alike(again, straight)


def test_one_command_starts_processes_and_ctrl_c_stops_them_all(teams: Runs):
    words = teams.words("launched", iters=4000, steps_per_eval=4000)
    log = teams.folder / "launched.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", *words, "--launch", "2"]
        launcher = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for(log, r"step +3/", [launcher])
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(MOST) == 130, log.read_text()
    finally:
        launcher.kill()
    lines = log.read_text().splitlines()
    assert sum(line.startswith("step    3/4000") for line in lines) == 1
    assert sum(line.startswith("interrupted at step") for line in lines) == 1
    assert ml.Run.load(teams.folder / "launched").outcome == "interrupted"


def test_hosts_that_cannot_be_reached_are_reported(tmp_path: Path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["nowhere.invalid:5000"], ["127.0.0.1:5001"]]')
    environment = os.environ | {"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)}
    command = [sys.executable, "-m", "mlx_loraplus.train", "--iters", "1"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=MOST, check=False
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "rank 1 can't reach the other processes" in line


@pytest.mark.parametrize("pack", [False, True])
def test_shares_are_a_batch_and_packed_ones_have_one_shape(pack: bool):
    dealt_out = examples(50)
    for size in (2, 3, 4):
        kind, more = (PackedBatches, (48,)) if pack else (Batches, ())
        one, shared = kind(dealt_out, 6, 0, *more), kind(dealt_out, 6, 0, *more, size)
        for n in range(one.per_epoch):
            dealt = [row for part in range(size) for row in shared.rows_of(n)[part::size]]
            assert sorted(map(tuple, dealt)) == sorted(map(tuple, one.rows_of(n)))
            parts = [
                shared.collate(share)
                for part in range(size)
                if (share := shared.rows_of(n)[part::size])
            ]
            assert sum(part.target_count for part in parts) == one[n].target_count
            assert all(part.tokens.shape[0] <= shared.largest()[0] for part in parts)
            assert not pack or {part.tokens.shape for part in parts} == {shared.largest()}


def test_a_single_process_sends_and_copies_nothing():
    alone = World()
    tree = {"a": mx.ones(3)}
    assert alone.sum_shards(tree) is tree
    assert alone.any_rank([True, False]) == [True, False]
    assert alone.gather("x") == ["x"]
    assert (alone.is_main, alone.row_slice, alone.data_shards) == (True, slice(0, None, 1), 1)
    assert split_by_size([3, 3, 9, 1, 1], 6) == [(0, 2), (2, 3), (3, 5)]
