"""A run checks its machine, chooses how its step is computed, and keeps that when it is resumed."""

import html
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import pytest

from mlx_loraplus import train
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.device import Machine
from mlx_loraplus.errors import LoRAPlusError
from mlx_loraplus.kernels.choices import StepChoices, default_choices
from mlx_loraplus.memory.plan import MemoryPlan, memory_plan_of
from mlx_loraplus.settings import configure
from mlx_loraplus.settings_file import read_settings
from mlx_loraplus.training import step_choices, validation
from mlx_loraplus.training.checkpoint import checkpoint_folder, read_checkpoint
from mlx_loraplus.training.fastest_step import OpenChoices, StepTiming, StepWay
from mlx_loraplus.training.selfcheck import CheckResult
from mlx_loraplus.training.step_choices import (
    StoredCheck,
    _digest_of_run,
    _freedom,
    key_of,
    machine_facts,
    read_stored,
    ways_to_check,
    write_stored,
)
from tests.conftest import TinyModel, same
from tests.training.test_failures import HELD_UP
from tests.training.test_fastest_step import state_of
from tests.training.test_model_probes import change_identity, refuse
from tests.training.test_selfcheck import wrong_gate
from tests.training.tiny_runs import Place, adapter_of, without_times

WAY = StepWay(StepChoices("native", 1 << 20), True, False)
# The settings of runs in which the default step is not compiled, even on a GPU.
EAGER: dict[str, Any] = {"compile": "off"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))


def act_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``--selfcheck auto`` check, as on a GPU."""
    monkeypatch.setattr(step_choices, "on_gpu", lambda: True)


def identity_of(run: ml.Run, step: int = 6) -> Any:
    return read_checkpoint(checkpoint_folder(run.folder, step)).identity


def told(place: Place, words: str) -> list[str]:
    return [line for line in place.told if words in line]


def test_auto_checks_nothing_on_a_cpu_and_off_nothing_on_a_gpu(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    runs = [place.run("auto")]
    act_as_gpu(monkeypatch)
    monkeypatch.setattr(step_choices, "check_step", refuse)
    runs.append(place.run("off", selfcheck="off", **EAGER))
    for run in runs:
        assert not told(place, "self-check")
        assert identity_of(run).choices == default_choices()
        assert identity_of(run).compiled is False
    assert same(adapter_of(runs[0]), adapter_of(runs[1]))
    assert not (place.folder / "cache" / "selfcheck").exists()


def test_a_run_is_checked_and_tuned_once(place: Place, monkeypatch: pytest.MonkeyPatch):
    act_as_gpu(monkeypatch)
    first = place.run("first", **EAGER)
    assert "agree with float32 on the CPU" in place.told_with("self-check")
    assert "s/step" in place.told_with("tuning: ")
    assert "(predicted: " in place.told_with("tuning: ")

    # The same choices without the tuning give the same run.
    for name in ("check_step", "tune_step"):
        monkeypatch.setattr(step_choices, name, refuse)
    second = place.run("second", **EAGER)
    assert "passed before" in place.told_with("self-check")
    assert place.told_with("tuning: ").endswith("(stored)")
    assert second.history[0]["choices"] == first.history[0]["choices"]
    assert same(adapter_of(first), adapter_of(second))
    assert without_times(first.history) == without_times(second.history)

    # The measured peak is recorded instead of the planned one.
    (file,) = (place.folder / "cache" / "selfcheck").iterdir()
    peak = json.loads(file.read_text())["best"]["peak"]
    assert first.start["memory"]["planned_gb"] == peak / 1e9
    assert not told(place, "was predicted")


def test_each_kernel_is_checked_eagerly_and_if_the_run_is_compiled_compiled_too(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    def ways(compiled: str) -> list[tuple[StepChoices, bool]]:
        config = configure(TrainConfig, {"model": "tiny", "compile": compiled})
        return ways_to_check(state, config)

    state = state_of(tiny("llama"), configure(TrainConfig, {"model": "tiny"}))
    eager = ways("off")
    kinds = [choices for choices, _ in eager]
    assert {choices.attention for choices in kinds} == {"native", "chunked"}
    assert {choices.cross_entropy for choices in kinds} == {"native", "composed"}
    assert {compiled for _, compiled in eager} == {False}

    both = {(choices, compiled) for choices in kinds for compiled in (False, True)}
    assert set(ways("on")) == both
    assert ways("auto") == eager
    monkeypatch.setattr("mlx_loraplus.training.compiled.on_gpu", lambda: True)
    assert set(ways("auto")) == both


def test_a_timing_belongs_to_its_objective_and_accumulation():
    base = configure(TrainConfig, {"model": "tiny"})
    others = ({}, {"grad_accumulation_steps": 2}, {"objective": "dpo"}, {"objective": "kto"})
    digests = {
        _digest_of_run(configure(TrainConfig, {"model": "tiny"} | other), 4, 32) for other in others
    }
    assert len(digests) == len(others)
    assert _digest_of_run(base, 4, 32) in digests


class FoundError(Exception):
    """What a run would tune."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, OpenChoices((True,), (True, False))),
        ({"compile": "off"}, OpenChoices((True,))),
        ({"grad_checkpoint": "on"}, OpenChoices((), (True, False))),
        ({"grad_checkpoint": "off", "compile": "on"}, OpenChoices()),
    ],
    ids=["auto", "eager", "checkpointing", "both given"],
)
def test_a_run_on_a_gpu_tries_what_its_settings_leave_open(
    settings: dict[str, Any],
    expected: OpenChoices,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
):
    def tune(*arguments: Any) -> None:
        raise FoundError(arguments[3])

    act_as_gpu(monkeypatch)
    monkeypatch.setattr(step_choices, "tune_step", tune)
    monkeypatch.setattr(step_choices, "check_step", lambda *_: CheckResult(skipped="a test"))
    with pytest.raises(FoundError) as found:
        place.run(**settings)
    assert found.value.args == (expected,)


def test_checkpointing_is_tried_only_where_it_is_right_and_the_opposite_only_where_it_fits(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    config = configure(TrainConfig, {"model": "tiny"})
    state = state_of(tiny("llama"), config)
    plan = memory_plan_of(config, state.model)
    needed = plan.memory(4, 32, checkpoint=False).total

    def tried(memory: int, *, checkpoint: bool, size: int = 1) -> tuple[bool, ...]:
        machine = Machine("cpu", memory, memory, memory)
        session: Any = SimpleNamespace(config=config, world=SimpleNamespace(size=size))
        now = replace(state, grad_checkpoint=checkpoint)
        return _freedom(session, now, replace(plan, machine=machine), 4, 32).grad_checkpoint

    assert tried(needed, checkpoint=True) == (False,)
    assert tried(needed - 1, checkpoint=True) == ()
    assert tried(needed, checkpoint=False) == (True,)
    assert tried(needed, checkpoint=False, size=2) == (), "another machine may have less memory"
    monkeypatch.setattr(step_choices, "is_checkpoint_sound", lambda _: False)
    assert tried(needed, checkpoint=False) == ()


def test_a_gpu_that_fails_while_ways_are_timed_ends_the_run_with_advice(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise RuntimeError(HELD_UP)

    monkeypatch.setattr("mlx_loraplus.training.fastest_step._time_repeatedly", fail)
    with pytest.raises(ml.DeviceError) as error:
        place.run("run", selfcheck="on", **EAGER)
    assert str(error.value).startswith(
        "macOS stopped the GPU's work because it held up the display"
    )
    assert 'were timed: selfcheck="off" trains in the default way' in str(error.value)
    assert place.run("run", selfcheck="off", overwrite=True, **EAGER).finished


def test_on_checks_again(place: Place):
    place.run("first", selfcheck="on", **EAGER)
    (file,) = (place.folder / "cache" / "selfcheck").iterdir()
    before = file.read_text()
    place.run("second", selfcheck="on", **EAGER)
    assert "agree with float32" in place.told_with("self-check")
    assert file.read_text() != before


def test_a_run_of_another_size_takes_only_what_does_not_depend_on_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    act_as_gpu(monkeypatch)
    first = place.run("first", **EAGER)
    key = key_of(identity_of(first).model, "lora")
    write_stored(StoredCheck(key, StepTiming(WAY, 1.0, 1), "of another run"), print)
    run = place.run("second", batch_size=3, **EAGER)
    assert "(the kernels' choices are stored)" in place.told_with("tuning: ")
    assert identity_of(run).choices == WAY.choices
    assert not identity_of(run).grad_checkpoint
    assert run.start["memory"]["planned_gb"] > 1e-6


def test_the_state_stores_the_machine_and_what_a_step_took(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    run = place.run("run", selfcheck="on", stop_at=3, **EAGER)
    stored = identity_of(run, 3)
    assert stored.machine == machine_facts()
    (file,) = (place.folder / "cache" / "selfcheck").iterdir()
    best = json.loads(file.read_text())["best"]
    measured = stored.measured
    assert (measured.seconds, measured.peak) == (best["seconds"], best["peak"])
    assert measured.rows == 4

    # run.yaml tells it, and the versions.
    text = (run.folder / "run.yaml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("# Machine: ")]
    for fact in (*machine_facts().values(), f"mlx {version('mlx')}", f"mlx-lm {version('mlx-lm')}"):
        assert fact in line
    assert f"{measured.seconds:.3g} s/step and " in line

    # A resume plans with the measured step, and does not compare with the prediction again.
    plans: list[MemoryPlan] = []
    problem = MemoryPlan.problem
    monkeypatch.setattr(
        MemoryPlan, "problem", lambda self, *a: plans.append(self) or problem(self, *a)
    )
    resumed = place.run("run", resume=True, grad_checkpoint="off", **EAGER)
    assert plans[-1].correction != 1
    assert plans[-1] == plans[-1].corrected(measured)
    assert not told(place, "was predicted")
    assert identity_of(resumed).measured == measured


def test_validations_take_the_choices_of_the_run(place: Place, monkeypatch: pytest.MonkeyPatch):
    """A slice that did not fit in the tuning does not come back in a validation."""
    sizes: list[int] = []
    make = validation.make_score

    def seen(split: Any, choices: StepChoices) -> Any:
        sizes.append(choices.slice_bytes)
        return make(split, choices)

    monkeypatch.setattr(validation, "make_score", seen)
    place.run("run", stop_at=3)
    stored = {"choices": {"attention": "chunked", "slice_bytes": 1 << 20}}
    change_identity(checkpoint_folder(place.folder / "run", 3), lambda found: found.update(stored))
    before = len(sizes)
    assert set(sizes) == {default_choices().slice_bytes}
    place.run("run", resume=True)
    assert set(sizes[before:]) == {1 << 20}


def test_run_yaml_tells_the_choices_and_can_be_read(place: Place):
    run = place.run("run", selfcheck="on", **EAGER)
    found = run.start["self_check"]
    assert found.startswith("loss and gradients"), found
    assert found in html.unescape((run.folder / "report.html").read_text())
    text = (run.folder / "run.yaml").read_text()
    assert "# Chosen for this machine, and kept by --resume: " in text.splitlines()[-1]
    assert " MiB slices, no checkpointing, eager" in text.splitlines()[-1]
    config = configure(TrainConfig, read_settings(run.folder / "run.yaml"), whole=False)
    assert (config.selfcheck, config.compile, config.grad_checkpoint) == ("on", "off", "auto")


def test_a_resume_keeps_the_choices_whatever_the_cache_says(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    stored = {"choices": {"attention": "native", "slice_bytes": 1 << 20}, "grad_checkpoint": True}
    undisturbed = place.run("one", grad_checkpoint="on")
    place.run("two", stop_at=3)
    change_identity(checkpoint_folder(place.folder / "two", 3), lambda found: found.update(stored))

    # The cache says otherwise.
    act_as_gpu(monkeypatch)
    key = key_of(identity_of(undisturbed).model, "lora")
    other = StepWay(StepChoices("chunked", 64 << 20), False, True)
    write_stored(StoredCheck(key, StepTiming(other, 1.0, 1)), print)

    resumed = place.run("two", resume=True)
    assert "passed before" in place.told_with("self-check")
    assert not told(place, "tuning: ")
    found = identity_of(resumed)
    assert found.choices == StepChoices("native", 1 << 20)
    assert found.grad_checkpoint is True
    assert found.compiled is False
    assert (
        "native attention, composed cross-entropy, 1 MiB slices, checkpointing, eager"
        in (resumed.folder / "run.yaml").read_text()
    )


def test_a_resume_keeps_whether_the_step_is_compiled(place: Place):
    place.run("run", stop_at=3, dropout=0.0)
    change_identity(
        checkpoint_folder(place.folder / "run", 3), lambda found: found.update(compiled=True)
    )
    assert identity_of(place.run("run", resume=True, iters=4, dropout=0.0), 4).compiled is True

    # A setting that is given counts more.
    resumed = place.run("run", resume=True, dropout=0.0, compile="off")
    assert identity_of(resumed).compiled is False


def test_another_machine_model_version_or_adapter_is_not_in_the_cache():
    key = key_of("abc", "lora")
    assert {"chip", "system", "device", "mlx", "mlx-lm", "mlx_loraplus", "model"} <= key.keys()
    stored = StoredCheck(key, StepTiming(WAY, 1.0, 10), "run")
    write_stored(stored, print)
    assert read_stored(key) == stored
    for name in key:
        assert read_stored(key | {name: "another"}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": {}}', '{"key": 1, "best": 2}'])
def test_a_damaged_entry_is_ignored(text: str, tmp_path: Path):
    key = key_of("abc", "lora")
    write_stored(StoredCheck(key), print)
    (file,) = (tmp_path / "cache" / "selfcheck").iterdir()
    file.write_text(text)
    assert read_stored(key) is None


def test_a_cache_that_can_not_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    write_stored(StoredCheck({"chip": "x"}), said.append)
    assert "the self-check is not stored: can't write" in said[0]


def test_a_wrong_gradient_stops_the_run_before_it_starts(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # The gate is wrong only on another device than that of the probe.
    monkeypatch.setattr("mlx_loraplus.kernels.patch._computes", lambda *_: True)
    wrong_gate(monkeypatch, 0.3)
    with pytest.raises(LoRAPlusError, match="computes wrong gradients"):
        place.run("refused", selfcheck="on")
    assert not (place.folder / "refused" / "run.yaml").exists()
    assert not (place.folder / "cache" / "selfcheck").exists()

    words = ["--model", str(place.folder / "model"), "--data", str(place.folder / "data")]
    words += ["--adapter-path", str(place.folder / "refused"), "--iters", "1", "--warmup", "0"]
    with pytest.raises(SystemExit, match="2"):
        train.main([*words, "--selfcheck", "on"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: this machine computes wrong gradients")
    assert "mlp.gate_proj.lora_" in said
    train.main([*words, "--selfcheck", "off"])
