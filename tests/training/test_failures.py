"""A device that fails: what is said of it, and a run that resumes bit-exactly."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import numpy as np
import pytest

from mlx_loraplus import cli
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.batches import one_per_row
from mlx_loraplus.failures import DISPLAY, GPU, MEMORY, TIMEOUT, failure_of, is_lost
from mlx_loraplus.kernels.patch import find_gated_mlps
from mlx_loraplus.kernels.row_masks import takes_caches
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.runs.next_steps import next_commands
from mlx_loraplus.settings import configure
from mlx_loraplus.training.interrupts import explain_failure
from mlx_loraplus.training.self_consistency import check_caches
from tests.conftest import TinyModel, same
from tests.training.tiny_runs import (
    Place,
    adapter_of,
    examples,
    without_times,
)

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
LOST_CUDA = "cudaStreamSynchronize(stream_) failed: an illegal memory access was encountered"
FAILURES = {
    OUT_OF_MEMORY: MEMORY,
    "[metal::malloc] Resource limit (499000) exceeded.": MEMORY,
    (
        "[metal::malloc] Attempting to allocate 99999999999 bytes which is greater than the"
        " maximum allowed buffer size of 9534832640 bytes."
    ): MEMORY,
    "[malloc] Unable to allocate 4294967296 bytes.": MEMORY,
    "cudaMallocAsync(&data, size, stream) failed: out of memory": MEMORY,
    "cudnnCreate(&handle) failed: CUDNN_STATUS_ALLOC_FAILED.": MEMORY,
    HELD_UP: DISPLAY,
    TOO_LONG: TIMEOUT,
    "cudaStreamSynchronize(stream_) failed: the launch timed out and was terminated": TIMEOUT,
    IGNORED: GPU,
    LOST_CUDA: GPU,
    "cudaGraphLaunch(graph_exec, stream_) failed: unspecified launch failure": GPU,
}


def test_failures_are_recognized_by_mlx_texts():
    assert {text: failure_of(RuntimeError(text)) for text in FAILURES} == FAILURES
    assert failure_of(MemoryError()) is MEMORY
    for other in (RuntimeError("another bug"), ValueError("out of memory"), None):
        assert failure_of(other) is None
    assert failure_of(ml.PeerError("lost (Unable to allocate)")) is None


def test_a_probe_does_not_take_a_failed_gpu_for_a_verdict(
    monkeypatch: pytest.MonkeyPatch, tiny: TinyModel
):
    """Lack of memory for an array is a verdict; after a failed command buffer nothing can be computed."""
    model = tiny("llama")
    trunk_and_head = find_trunk_and_head(model)
    assert trunk_and_head is not None
    assert takes_caches(model)
    assert not is_lost(RuntimeError("[malloc] Unable to allocate 4294967296 bytes."))
    assert not is_lost(RuntimeError("another bug"))
    assert is_lost(RuntimeError(OUT_OF_MEMORY))
    assert is_lost(RuntimeError(LOST_CUDA))
    assert is_lost(RuntimeError("[ring] connection to a peer was lost"))

    def probe_fails(kind: type, works: int, probe: Callable[[], object]) -> None:
        """Let the calls of a kind of module fail after some that work."""
        call, calls = kind.__call__, []

        def fail_later(self: Any, *arguments: Any, **keywords: Any) -> mx.array:
            calls.append(1)
            if len(calls) > works:
                raise RuntimeError(HELD_UP)
            return call(self, *arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "__call__", fail_later)
            with pytest.raises(RuntimeError, match="Impacting"):
                probe()

    probe_fails(type(model), 1, lambda: check_caches(model))
    probe_fails(type(model), 0, lambda: takes_caches(model))
    probe_fails(type(model.model), 1, lambda: find_trunk_and_head(model))
    probe_fails(type(model.layers[0].mlp), 0, lambda: find_gated_mlps(model))


@pytest.mark.parametrize("text", FAILURES)
def test_a_failed_step_says_what_happened_and_what_helps(text: str):
    config = configure(TrainConfig, {"batch_size": 8, "max_seq_length": 64})
    parts = [one_per_row(examples(4)), one_per_row(examples(8))]
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
    assert next_commands(failed)[0] == ("resume", command)
    page = re.sub("</?span[^>]*>", "", (folder / "report.html").read_text())
    assert f"<code>{command}</code>" in page
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


@pytest.mark.parametrize("place_of_failure", ["mlx_loraplus.training.trainer.validate", "answers"])
def test_a_run_that_is_saved_before_a_validation_resumes_with_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, place_of_failure: str
):
    """Also if it was the last one."""
    settings = {"sample_rows": 2}
    undisturbed = place.run("one", **settings)
    monkeypatch.setattr("mlx_loraplus.training.trainer.on_gpu", lambda: True)
    monkeypatch.setattr("mlx_loraplus.training.trainer.SAVE_SECONDS", 0.0)
    name = "mlx_loraplus.training.recorder.answer_questions"
    if place_of_failure != "answers":
        name = place_of_failure
    for validations in (2, 1):
        with monkeypatch.context() as patch:
            fail_after(patch, name, validations)
            with pytest.raises(ml.DeviceError, match=r"step \d is saved"):
                place.run("two", **settings, resume=validations == 1)
    resumed = place.run("two", **settings, resume=True)
    assert place.told_with("only the last validation is left")
    assert without_times(resumed.history) == without_times(undisturbed.history)
    assert resumed.progress.best_step == undisturbed.progress.best_step
    assert same(adapter_of(resumed), adapter_of(undisturbed))


def fail_after(patch: pytest.MonkeyPatch, name: str, works: int) -> None:
    """Let a function fail after some calls that work."""
    module, _, attribute = name.rpartition(".")
    function = getattr(import_module(module), attribute)
    calls: list[int] = []

    def fail_later(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) > works:
            raise RuntimeError(HELD_UP)
        return function(*arguments, **keywords)

    patch.setattr(name, fail_later)


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


def test_a_failed_process_ends_with_one_line_whose_command_works(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
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
    monkeypatch.chdir(place.folder)
    cli.train(resume[1:])
    assert "resume: from step 2 of 4" in capsys.readouterr().out

    other = python("-c", FAILING, "another bug", *words, "--overwrite")
    assert other.returncode == 1
    assert "Traceback" in other.stderr
