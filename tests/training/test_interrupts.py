"""What can interrupt a run: stops, losses that are not finite, full disks, lost folders, memory."""

import ast
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import mlx_loraplus as ml
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.cli import train as main
from mlx_loraplus.config import AdapterConfig, OptimizerConfig, TrainConfig
from mlx_loraplus.settings import configure
from mlx_loraplus.training.checkpoint import find_checkpoint
from mlx_loraplus.training.interrupts import interruptible
from mlx_loraplus.training.optimizer import LoRAPlus
from mlx_loraplus.training.run_checks import warn_about_rates
from tests.conftest import TinyModel, randomize_adapters, same
from tests.training.tiny_models import OPTIMIZERS
from tests.training.tiny_runs import (
    Place,
    adapter_of,
    poison,
    validate_on_what_is_unlearned,
    without_times,
)

PACKAGE = Path(ml.__file__).parent

# Losses and gradients that are not finite


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"alpha": 20.0},
            (
                "s x lambda x eta is 0.02, and runs with 0.018 have diverged: lower"
                " learning_rate or lr_ratio or alpha"
            ),
        ),
        ({"alpha": 16.0}, None),
        (
            {"init": "init2", "alpha": 32.0},
            "s x eta is 0.002, and runs with 0.002 have diverged: lower learning_rate or",
        ),
        ({"init": "init2", "alpha": 20.0}, None),
    ],
)
def test_rates_at_which_runs_diverged_cause_a_warning(
    place: Place, settings: dict[str, Any], said: str | None
):
    place.run(
        iters=1, warmup=1, learning_rate=1e-3, lr_ratio=16, rank=16, schedule="constant", **settings
    )
    assert place.told.count("warning: the warm-up of 1 step takes the whole run of 1") == 1
    warnings = [line for line in place.told if "diverged" in line]
    assert len(warnings) == (said is not None)
    assert all(line.startswith(f"warning: {said}") for line in warnings)


def test_an_adapter_that_a_run_starts_from_keeps_its_alpha():
    given = {"alpha": 160, "learning_rate": 5e-4, "lr_ratio": 4, "resume_adapter_file": "stock"}
    said: list[str] = []
    warn_about_rates(configure(TrainConfig, given), 100, said.append)
    assert said[0].endswith("lower --learning-rate or --lr-ratio")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_that_are_not_finite_change_nothing_but_the_step(
    tiny: TinyModel, optimizer: str, compiled: bool
):
    model = tiny("llama")
    trainable = attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    config = OptimizerConfig(
        optimizer=optimizer, warmup=0, weight_decay=0.1 if optimizer != "adam" else 0.0
    )  # pyright: ignore
    rule = LoRAPlus(config, total_steps=10)
    rule.init(model, trainable.groups)
    good = tree_map(lambda array: mx.random.normal(array.shape), model.trainable_parameters())
    step = lambda gradients, usable: rule.update(model, gradients, usable)  # noqa: E731
    if compiled:
        state = [model.state, rule.state]
        step = mx.compile(step, inputs=state, outputs=state)
    step(good, mx.array(True))
    before, moments = dict(tree_flatten(model.trainable_parameters())), rule.arrays()
    mx.eval(before, moments)
    name = next(iter(before))
    bad = tree_map(lambda array: array, good)
    bad["model"]["layers"][2]["mlp"]["up_proj"]["lora_b"] = mx.full((4, 96), float("nan"))
    for gradients, usable in ((bad, True), (good, False)):
        step(gradients, mx.array(usable))
        assert same(before, model.trainable_parameters()), name
        now = rule.arrays()
        assert now.pop("step").item() == moments["step"].item() + 1
        assert same({n: a for n, a in moments.items() if n != "step"}, now)
        rule.state["step"] = moments["step"]
    step(good, mx.array(True))
    assert not same(before, model.trainable_parameters())
    assert all(
        mx.isfinite(array).all()
        for array in dict(tree_flatten(model.trainable_parameters())).values()
    )


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(place: Place, compiled: Any):
    poison(place, 7)
    run = place.run(
        iters=20, compile=compiled, grad_accumulation_steps=2, steps_per_eval=50
    )  # four epochs
    skipped = [event for event in run.history if "skipped" in event]
    assert [event["skipped"] for event in skipped] == [1, 2, 3, 4]
    assert skipped[0]["reason"] == "loss nan, gradient norm nan"
    assert {event["step"] for event in skipped} | {u for u, _ in run.losses()} == set(range(1, 21))
    assert not {event["step"] for event in skipped} & {u for u, _ in run.losses()}
    assert all(mx.isfinite(array).all() for array in adapter_of(run).values())
    assert all(np.isfinite(loss) for _, loss in run.losses())
    assert "skipped: loss nan" in place.told_with("(4 skipped so far)")


def test_too_many_in_a_row_stop_with_a_checkpoint_and_the_batch(place: Place):
    poison(place, *range(40))
    with pytest.raises(
        ml.LoRAPlusError,
        match=r"3 steps in a row were not finite; the last is step 3 .*not_finite",
    ):
        place.run(max_skipped_steps=3)
    told = json.loads((place.folder / "run" / "not_finite.json").read_text())
    assert (told["step"], told["reason"]) == (3, "loss nan, gradient norm nan")
    (batch,) = told["batches"]
    assert len(batch["rows"]) == len(batch["tokens"]) == 4
    assert all(row.startswith("train.jsonl:") for row in batch["rows"])
    checkpoint = find_checkpoint(place.folder / "run", print)
    assert checkpoint is not None
    assert (checkpoint.progress.step, checkpoint.progress.skipped) == (3, 3)

    # The page says so, and no longer waits for news.
    failed = ml.Run.load(place.folder / "run")
    assert failed.outcome == "failed"
    assert failed.history[-1]["reason"].startswith("3 steps in a row were not finite")
    page = (failed.folder / "report.html").read_text()
    assert "The run failed: 3 steps in a row were not finite" in page
    assert "data-refresh" not in page
    with pytest.raises(ml.LoRAPlusError, match="the last is step 6"):
        place.run(max_skipped_steps=3, resume=True)

    # The last validation, which was due at this step, is still made.
    with pytest.raises(ml.LoRAPlusError, match="no step took effect"):
        place.run(max_skipped_steps=3, resume=True)
    assert "resume: only the last validation is left" in place.told
    ended = ml.Run.load(place.folder / "run")
    assert ended.losses("valid_loss")[-1][0] == 6
    assert ended.start["resumed"] == [3, 6]


# Stops


def test_early_stopping_waits_for_patience_and_a_resumed_run_stops_there_too(place: Place):
    validate_on_what_is_unlearned(place)
    settings = {"iters": 30, "learning_rate": 0.02, "schedule": "constant", "patience": 3}
    undisturbed = place.run("one", **settings)
    losses = [loss for _, loss in undisturbed.losses("valid_loss")][1:]
    assert undisturbed.outcome == "stopped early"
    assert undisturbed.finished
    assert len(losses) - 1 - int(np.argmin(losses)) == 3
    place.run("two", stop_at=undisturbed.history[-1]["step"] - 3, **settings)
    resumed = place.run("two", resume=True, **settings)
    assert resumed.outcome == "stopped early"
    assert without_times(resumed.history) == without_times(undisturbed.history)
    assert same(adapter_of(resumed), adapter_of(undisturbed))
    assert place.run("two", resume=True, **settings).history == resumed.history
    assert (
        place.run("two", resume=True, **settings | {"patience": 5}).history[-1]["step"]
        > resumed.history[-1]["step"]
    )


def test_patience_needs_validation_rows(place: Place):
    (place.folder / "data" / "valid.jsonl").unlink()
    with pytest.raises(
        ml.ConfigError, match=r"patience needs validation examples: add a valid file"
    ):
        place.run(patience=2, valid_split=0)
    assert not (place.folder / "run").exists()


def test_max_minutes_ends_the_session_not_the_run(place: Place):
    undisturbed = place.run("one")
    outcomes = [place.run("two", max_minutes=1e-9).outcome]
    while outcomes[-1] == "out of time":
        outcomes.append(place.run("two", max_minutes=1e-9, resume=True).outcome)
    assert outcomes == ["out of time"] * 5 + ["finished"]
    assert same(adapter_of(place.run("two", resume=True)), adapter_of(undisturbed))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_first_signal_is_a_request_and_a_second_acts(number: signal.Signals):
    def act(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(number, act)
    try:
        with interruptible() as requested:
            assert not requested()
            os.kill(os.getpid(), number)
            assert requested()
            with pytest.raises(InterruptedError):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is act
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        with interruptible() as requested:
            os.kill(os.getpid(), number)
            assert not requested()
    finally:
        signal.signal(number, before)


def test_the_command_says_how_to_resume_and_resumes(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(place.folder)
    words = shlex.split("--model model --data data --adapter-path 'my run' --iters 5000")
    words += ["--steps-per-report", "1"]
    command = [sys.executable, "-m", "mlx_loraplus.train", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("step    3/"):
                with pytest.raises(SystemExit, match="2"):
                    main([*words, "--overwrite"])
                run.send_signal(signal.SIGTERM)
            if line.startswith("resume:  mlx_loraplus"):
                again = line.removeprefix("resume:  ")
    assert run.returncode == 130  # an interrupted run, so that `train && fuse` ends here
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1
    assert f"another run (process {run.pid}) is using my run" in refused
    assert again == "mlx_loraplus.train -c 'my run/run.yaml' --resume\n"

    step = find_checkpoint(place.folder / "my run", print).progress.step  # pyright: ignore[reportOptionalMemberAccess]
    on = ["-c", "my run/run.yaml", "--resume", "--iters", str(step + 2)]
    main(on)
    assert f"resume: from step {step} of {step + 2}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*on, "--rank", "4"])
    refused = capsys.readouterr().err
    assert "can't resume with other settings: rank 8 -> 4; for a new run, leave out" in refused

    # Both pieces of advice work: the command as it is, and another folder without --resume.
    assert refused.endswith("give only its own settings (-c my run/run.yaml)\n")
    main(["-c", "my run/run.yaml", "--resume"])
    main(["-c", "my run/run.yaml", "--rank", "4", "--iters", "1", "--adapter-path", "new"])
    assert "finished at step 1" in capsys.readouterr().out


def test_ctrl_c_before_the_first_step_leaves_a_run_that_resumes(place: Place):
    def interrupt(_: ml.Run, event: dict[str, Any]) -> None:
        if "schema" in event:  # the start, when the folder has its first files
            signal.raise_signal(signal.SIGINT)

    run = place.run("early", callback=interrupt, iters=4)
    assert (run.outcome, run.progress.step) == ("interrupted", 1)
    whole = place.run("whole", iters=4)
    resumed = place.run("early", iters=4, resume=True)
    assert same(adapter_of(resumed), adapter_of(whole))


def test_a_session_that_was_cut_off_is_reported(place: Place):
    place.run(stop_at=2)
    (place.folder / "run" / ".lock").write_text("12345")
    place.run(resume=True)
    assert (
        "the previous session (process 12345) was cut off: killed, or out of memory (peak"
        in place.told_with("cut off")
    )


def test_no_clock_that_can_jump_is_used_in_training():
    for path in (PACKAGE / "training").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # The date that an event of TensorBoard has is no duration.
        dates = [
            keyword.value
            for keyword in ast.walk(tree)
            if getattr(keyword, "arg", None) == "wall_time"
        ]
        dated = [node for date in dates for node in ast.walk(date)]
        for node in ast.walk(tree):
            clock = isinstance(node, ast.Attribute) and node.attr in ("time", "now", "time_ns")
            assert not clock or node in dated, path.name


def test_reports_watch_memory(place: Place):
    reports = [event for event in place.run(iters=2).history if "loss" in event]
    assert all(event["peak_memory_gb"] >= event["active_memory_gb"] > 0 for event in reports)
    assert all(event["cache_memory_gb"] >= 0 for event in reports)


def test_ctrl_c_while_the_last_files_are_written_can_be_resumed(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    def stop(_: ml.Run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlx_loraplus.training.run_writer.write_report", stop)
        with pytest.raises(KeyboardInterrupt):
            place.run("end", iters=2)
    assert "all steps are saved" in place.told_with("warning: finished")
    assert place.run("end", iters=2, resume=True).finished
    assert (place.folder / "end" / "report.html").is_file()
