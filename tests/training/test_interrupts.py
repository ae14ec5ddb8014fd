"""What can interrupt a run: stops, losses that are not finite, full disks, lost folders, memory."""

import ast
import json
import os
import resource
import shutil
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
from mlx_loraplus.config import AdapterConfig, OptimizerConfig, TrainConfig
from mlx_loraplus.data.batches import collate
from mlx_loraplus.failures import DISPLAY, GPU, MEMORY, TIMEOUT, failure_of
from mlx_loraplus.settings import configure
from mlx_loraplus.training.checkpoint import checkpoint_folder, find_checkpoint
from mlx_loraplus.training.interrupts import explain_failure, interruptible
from mlx_loraplus.training.optimizer import LoRAPlus
from tests.conftest import TinyModel, randomize_adapters, same
from tests.training.tiny_models import OPTIMIZERS
from tests.training.tiny_runs import (
    Place,
    adapter_of,
    examples,
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
                " learning_rate, lr_ratio"
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
    assert place.told.count("warning: the warm-up of 1 steps is longer than the run of 1") == 1
    warnings = [line for line in place.told if "diverged" in line]
    assert len(warnings) == (said is not None)
    assert all(line.startswith(f"warning: {said}") for line in warnings)


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


def poison(place: Place, *numbers: int) -> None:
    """Make some training rows' loss not finite: they hold a character whose embedding is no number."""
    lines = (place.folder / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    for number in numbers:
        lines[number] = json.dumps({"prompt": "~ =", "completion": " 1"}) + "\n"
    (place.folder / "data" / "train.jsonl").write_text("".join(lines))
    weights: Any = mx.load(str(place.folder / "model" / "model.safetensors"))
    vocabulary = json.loads((place.folder / "model" / "tokenizer.json").read_text())["model"][
        "vocab"
    ]
    embedding = np.array(weights["model.embed_tokens.weight"])
    embedding[vocabulary["~"]] = np.nan
    mx.save_safetensors(
        str(place.folder / "model" / "model.safetensors"),
        weights | {"model.embed_tokens.weight": mx.array(embedding)},
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
        match=r"3 steps in a row were not finite, the last is step 3 .*not_finite",
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
    with pytest.raises(ml.LoRAPlusError, match="the last is step 6"):
        place.run(max_skipped_steps=3, resume=True)


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
        ml.ConfigError, match=r"patience needs validation examples: add a valid\.jsonl"
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


def test_the_command_says_how_to_resume_and_resumes(place: Place):
    train = [sys.executable, "-m", "mlx_loraplus.train"]
    words = [
        "--model",
        "model",
        "--data",
        "data",
        "--adapter-path",
        "my run",
        "--iters",
        "5000",
        "--steps-per-report",
        "1",
    ]
    with subprocess.Popen(
        [*train, *words], cwd=place.folder, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("step    3/"):
                second = subprocess.run(
                    [*train, *words, "--overwrite"],
                    cwd=place.folder,
                    capture_output=True,
                    text=True,
                )
                run.send_signal(signal.SIGTERM)
            if line.startswith("resume:  mlx_loraplus"):
                again = line.removeprefix("resume:  ")
    assert run.returncode == 130  # an interrupted run, so that `train && fuse` ends here
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert f"another run (process {run.pid}) is using my run" in second.stderr
    assert again == "mlx_loraplus.train -c 'my run/run.yaml' --resume\n"
    step = find_checkpoint(place.folder / "my run", print).progress.step  # pyright: ignore[reportOptionalMemberAccess]
    on = [*train, "-c", "my run/run.yaml", "--resume", "--iters", str(step + 2)]
    done = subprocess.run(on, cwd=place.folder, capture_output=True, text=True, check=True)
    assert f"resume: from step {step} of {step + 2}" in done.stdout
    refused = subprocess.run([*on, "--rank", "4"], cwd=place.folder, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "can't resume with other settings: rank 8 -> 4" in refused.stderr


# Disks and folders


def full_disk(most: int) -> None:
    """Let no file grow beyond ``most`` bytes, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_keeps_the_older_checkpoint(place: Place, policy: Any):
    undisturbed = place.run("one")
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    at = {3: lambda: full_disk(20_000), 5: lambda: full_disk(soft)}
    try:
        if policy == "stop":
            with pytest.raises(ml.OutputError, match="can't write"):
                place.run("two", at=at, on_save_error=policy)
        else:
            assert place.run("two", at=at).finished
            assert "step 4 is not saved, the previous checkpoint is kept" in place.told_with(
                "warning"
            )
    finally:
        full_disk(soft)
    names = {path.name for path in (place.folder / "two" / "checkpoints").glob("0*")}
    assert names == ({"000002"} if policy == "stop" else {"000002", "000006"})
    assert same(adapter_of(place.run("two", resume=True)), adapter_of(undisturbed))


def test_a_best_adapter_that_met_a_full_disk_is_saved_when_there_is_room(place: Place):
    validate_on_what_is_unlearned(place)
    settings = {"learning_rate": 0.02, "schedule": "constant", "iters": 10}
    undisturbed = place.run("one", **settings)
    losses = dict(undisturbed.losses("valid_loss"))
    best = min((step for step in losses if step), key=losses.__getitem__)
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    try:
        run = place.run(
            "two",
            at={best - 1: lambda: full_disk(20_000), best + 3: lambda: full_disk(soft)},
            **settings,
        )
    finally:
        full_disk(soft)
    assert f"step {best} is not saved" in "".join(place.told)
    assert f"was at step {best}: its adapter is kept" in place.told_with("best validation")
    assert same(adapter_of(run), adapter_of(undisturbed))


@pytest.mark.parametrize("stop_at", [3, -1])
def test_a_disk_that_stays_full_ends_the_session_with_an_error(place: Place, stop_at: int):
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    full_disk(20_000)
    try:
        with pytest.raises(
            ml.OutputError,
            match=r"the last steps are not saved: can't write .* then repeat them with resume=True",
        ):
            place.run(stop_at=stop_at)
    finally:
        full_disk(soft)
    assert list((place.folder / "run" / "checkpoints").iterdir()) == []


def test_a_folder_that_vanishes_is_created_again(place: Place):
    undisturbed = place.run("one")
    run = place.run("two", at={3: lambda: shutil.rmtree(place.folder / "two")})
    assert "has vanished and is created again" in place.told_with("warning")
    assert same(adapter_of(run), adapter_of(undisturbed))
    assert (run.folder / "run.yaml").is_file()
    assert checkpoint_folder(run.folder, 6).is_dir()


def test_a_folder_that_cannot_be_written_is_reported_before_anything_slow(place: Place):
    with pytest.raises(ml.OutputError, match="/sys/run"):
        place.run("/sys/run")
    assert not any(line.startswith("step") for line in place.told)


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


# A device that fails


OUT_OF_MEMORY = (
    "[METAL] Command buffer execution failed: Insufficient Memory"
    " (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)
HELD_UP = (
    "[METAL] Command buffer execution failed: Impacting Interactivity"
    " (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
)
TOO_LONG = (
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error"
    " (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
)
IGNORED = (
    "[METAL] Command buffer execution failed: Ignored (for causing prior/excessive GPU errors)"
    " (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)."
)
FAILURES = {
    OUT_OF_MEMORY: MEMORY,
    "[metal::malloc] Resource limit (499000) exceeded.": MEMORY,
    (
        "[metal::malloc] Attempting to allocate 99999999999 bytes which is greater than the"
        " maximum allowed buffer size of 9534832640 bytes."
    ): MEMORY,
    "[malloc] Unable to allocate 4294967296 bytes.": MEMORY,
    "cudaMallocAsync(&data, size, stream) failed: out of memory": MEMORY,
    HELD_UP: DISPLAY,
    TOO_LONG: TIMEOUT,
    "cudaStreamSynchronize(stream_) failed: the launch timed out and was terminated": TIMEOUT,
    IGNORED: GPU,
}


def test_failures_are_recognized_by_mlx_texts():
    assert {text: failure_of(RuntimeError(text)) for text in FAILURES} == FAILURES
    assert failure_of(MemoryError()) is MEMORY
    for other in (RuntimeError("another bug"), ValueError("out of memory"), None):
        assert failure_of(other) is None
    assert failure_of(ml.PeerError("lost (Unable to allocate)")) is None


@pytest.mark.parametrize("text", FAILURES)
def test_a_failed_step_says_what_happened_and_what_helps(text: str):
    config = configure(TrainConfig, {"batch_size": 8, "max_seq_length": 64})
    parts = [collate(examples(4)), collate(examples(8))]
    with (
        pytest.raises(ml.DeviceError) as error,
        explain_failure(parts, config, can_checkpoint=True),
    ):
        raise RuntimeError(text)
    message = str(error.value)
    length = parts[1].tokens.shape[1]
    assert message.startswith(f"{FAILURES[text].what} on a batch of 8 rows x {length} tokens")
    assert text in message
    assert message.endswith(
        f"start again with --batch-size below 8 or --max-seq-length below {length}"
    )
    helps = {
        MEMORY: "set --grad-checkpoint on (then continue with --resume), or",
        DISPLAY: "caffeinate -i",
        TIMEOUT: "MLX_MAX_OPS_PER_BUFFER=8",
        GPU: "close other programs that use the GPU, and try again (then continue with --resume)",
    }
    assert helps[FAILURES[text]] in message


def test_other_errors_and_settings_that_are_at_their_end():
    config = configure(TrainConfig, {"batch_size": 1})
    with (
        pytest.raises(RuntimeError, match="another"),
        explain_failure([], config, can_checkpoint=False),
    ):
        raise RuntimeError("another bug")
    told = pytest.raises(
        ml.DeviceError, match=r"Unable to allocate [^;]*; start again with --max-seq-length below"
    )
    with told, explain_failure([], config, can_checkpoint=False):
        np.zeros(1 << 60, np.uint8)


def fail(text: str) -> None:
    raise RuntimeError(text)


@pytest.mark.parametrize("text", [OUT_OF_MEMORY, HELD_UP])
def test_a_failed_run_is_recorded_and_resumes_bit_exactly(place: Place, text: str):
    undisturbed = place.run("one")
    with pytest.raises(ml.DeviceError) as error:
        place.run("two", at={5: lambda: fail(text)})
    folder = place.folder / "two"
    command = f"mlx_loraplus.train -c {folder}/run.yaml --resume"
    if text == OUT_OF_MEMORY:
        command += " --grad-checkpoint on"
    assert str(error.value).endswith(
        f"; the run stopped after step 5, and step 4 is saved; to continue: {command}"
    )

    # Everything up to the failure is in the history, and the checkpoint is whole.
    failed = ml.Run.load(folder)
    assert failed.outcome == "failed"
    assert text in failed.history[-1]["reason"]
    assert [step for step, _ in failed.losses()] == [1, 2, 3, 4, 5]
    resumed = place.run("two", resume=True)
    assert without_times(resumed.history) == without_times(undisturbed.history)
    assert same(adapter_of(resumed), adapter_of(undisturbed))


def test_a_run_that_fails_before_its_first_checkpoint_starts_again(place: Place):
    undisturbed = place.run("one")
    with pytest.raises(ml.DeviceError, match=r"after step 1, and no step is saved; to continue: "):
        place.run("two", at={1: lambda: fail(TOO_LONG)})
    assert same(adapter_of(place.run("two", resume=True)), adapter_of(undisturbed))


FAILING = """
import sys
import mlx_loraplus as ml
from mlx_loraplus.arguments import command
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.settings import settings_of

def callback(run, event):
    if event["step"] == 3 and "loss" in event:
        raise RuntimeError(sys.argv[1])

with command("mlx_loraplus.train", TrainConfig, sys.argv[2:]) as (config, _):
    model, tokenizer = ml.load(config.model)
    ml.finetune(model, tokenizer, callback=callback, **settings_of(config))
"""


def test_a_failed_process_ends_with_one_line_whose_command_works(place: Place):
    words = ["--model", "model", "--data", "data", "--adapter-path", "run", "--iters", "4"]
    words += ["--steps-per-save", "2", "--steps-per-report", "1"]

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=place.folder, capture_output=True, text=True)

    failed = python("-c", FAILING, HELD_UP, *words)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert failed.stderr.startswith("error: macOS stopped the GPU's work because it held up")
    resume = failed.stderr.strip().rpartition("step 2 is saved; to continue: ")[2].split()
    assert resume[0] == "mlx_loraplus.train"
    done = python("-m", *resume)
    assert "resume: from step 2 of 4" in done.stdout
    assert done.returncode == 0

    other = python("-c", FAILING, "another bug", *words, "--overwrite")
    assert other.returncode == 1
    assert "Traceback" in other.stderr


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
