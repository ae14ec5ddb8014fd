"""The dry run checks what training checks, estimates what it takes, and prints the command to start."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.nn as nn
import pytest
import yaml

from mlx_loraplus import ConfigError, cli, plan_memory
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.memory.model_shapes import measure
from mlx_loraplus.training import dry_run
from scripts.tiny_model import write_tiny_model
from tests.conftest import TinyModel
from tests.training.tiny_runs import Place


def words(place: Place, *more: str) -> list[str]:
    model, data = str(place.folder / "model"), str(place.folder / "data")
    run = str(place.folder / "my run")
    return ["--model", model, "--data", data, "--adapter-path", run, "--iters", "20", *more]


def test_a_run_is_described(place: Place, capsys: pytest.CaptureFixture[str]):
    cli.train(words(place, "--dry-run", "--rank", "4"))
    said = capsys.readouterr().out
    assert "20 steps of 8 examples; reports every 1 step, validations every 4 steps" in said
    assert "A 5.00e-04, B 4 times that, cosine, warm-up 2" in said
    assert "lora, 4,096 parameters to train" in said
    assert "at the peak, for 8 rows x 24 tokens" in said
    assert "in steps, plus validations" in said
    assert "for the adapter and its checkpoints, of " in said
    assert str(place.folder / "my run") in said
    assert not (place.folder / "my run").exists()

    # The command that it prints starts the run that it described.
    (line,) = [line for line in said.splitlines() if line.startswith("to start: ")]
    command = shlex.split(line.removeprefix("to start: "))
    assert command == ["mlx_loraplus.train", *words(place, "--rank", "4")]
    cli.train(command[1:])
    start = json.loads((place.folder / "my run" / "history.jsonl").read_text().splitlines()[0])
    assert "4,096" in start["adapter"]
    assert start["steps"] == 20


def test_a_resumed_run_is_described_with_what_its_first_session_chose(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    place.run("half", stop_at=6, iters=20, warmup=0, steps_per_report=1)
    run = ["-c", str(place.folder / "half" / "run.yaml"), "--resume", "--dry-run"]
    capsys.readouterr()
    cli.train([*run, "--iters", "40", "--grad-checkpoint", "auto"])
    said = capsys.readouterr().out
    assert "40 steps of 4 examples, of which 6 are done; reports every 1 step" in said
    assert "gradient checkpointing stays off" in said
    assert "iters 20 -> 40" in said

    # A dry run and training both refuse to train fewer steps than the run has.
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit):
            cli.train([*run[:3], *more, "--iters", "1"])
        problem = "6 steps, more than the 1 that are asked for: leave --iters and --epochs out"
        assert problem in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("more", "rows", "length"),
    [
        ([], "40 training examples of an epoch, so a step has only 40", "40 examples"),
        (
            ["--grad-accumulation-steps", "2"],
            "40 training examples of an epoch, so each of the 2 batches of a step has only 40",
            "80 examples",
        ),
        (["--batch-size", "40"], None, "40 examples"),
    ],
)
def test_a_batch_that_is_larger_than_the_data_is_noted(
    place: Place,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    rows: str | None,
    length: str,
):
    for also in (["--dry-run"], []):
        cli.train(words(place, "--batch-size", "64", "--iters", "2", *more, *also))
        said = capsys.readouterr().out
        assert said.count("note: --batch-size") == (rows is not None)
        assert rows is None or f"note: --batch-size 64 is more than the {rows}\n" in said
        assert f"2 steps of {length}" in said
        assert not also or "1 in an epoch, of up to 40 rows" in said


@pytest.mark.parametrize(
    ("more", "so", "length"),
    [
        (
            ["--iters", "2", "--grad-accumulation-steps", "100"],
            "a step repeats its examples: to avoid that, give at most 10",
            "2 steps of 400 examples",
        ),
        (
            ["--epochs", "1", "--grad-accumulation-steps", "100"],
            "the run is one step of 10 batches: for more steps, lower it, --batch-size, or both",
            "1 step of 40 examples",
        ),
        (["--iters", "2", "--grad-accumulation-steps", "10"], None, "2 steps of 40 examples"),
    ],
)
def test_a_step_that_is_longer_than_an_epoch_is_noted(
    place: Place, capsys: pytest.CaptureFixture[str], more: list[str], so: str | None, length: str
):
    for also in (["--dry-run"], []):
        cli.train([*words(place)[:-2], "--batch-size", "4", *more, *also])
        said = capsys.readouterr().out
        assert said.count("is more than the 10 batches of an epoch") == (so is not None)
        assert so is None or f" of an epoch, so {so}\n" in said
        assert not also or length in said


def test_what_loading_a_model_writes_is_not_between_the_lines(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def describe(*_: object) -> Iterator[tuple[str, str]]:
        yield "model", "first"
        print("a note", file=sys.stderr)
        yield "run", "last"

    monkeypatch.setattr(dry_run, "_describe_run", describe)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    cli.train(words(place, "--dry-run"))
    assert "a note\n\nmodel      first\nrun        last\n" in capsys.readouterr().out


def test_a_rate_that_spoils_the_second_step_stops_the_run(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        cli.train(words(place, "--dry-run", "--learning-rate", "1e30", "--schedule", "constant"))
    said = capsys.readouterr().out
    assert "step 2 would be skipped, because the loss or a gradient is not finite" in said
    assert "to start:" not in said


def test_the_demo_set_is_named_if_no_data_is_given(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    given = [word for word in words(place, "--dry-run") if word != str(place.folder / "data")]
    given.remove("--data")
    cli.train(given)
    assert "note: no --data given, so the built-in demo set is used" in capsys.readouterr().out


def test_several_processes_need_one_dry_run(place: Place, capsys: pytest.CaptureFixture[str]):
    cli.train(words(place, "--launch", "2", "--dry-run"))
    assert capsys.readouterr().out.endswith("--iters 20 --launch 2\n")


def test_an_adapter_may_be_given_as_its_weights_file(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    """mlx_lm.lora takes it so."""
    place.run("first", iters=1, warmup=0)
    start = str(place.folder / "first" / "adapters.safetensors")
    cli.train(words(place, "--dry-run", "--resume-adapter-file", start))
    assert "to start: mlx_loraplus.train" in capsys.readouterr().out


def test_a_run_from_an_adapter_is_described_with_that_adapters_settings(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    place.run("first", iters=1, warmup=0, rank=2, num_layers=1, alpha=4.0)
    start = ["--resume-adapter-file", str(place.folder / "first")]
    cli.train(words(place, "--dry-run", *start, "--grad-checkpoint", "auto"))
    described = capsys.readouterr().out
    cli.train(words(place, *start, "--grad-checkpoint", "auto"))
    trained = capsys.readouterr().out
    assert "lora, 1,024 parameters to train" in described
    assert re.findall("plan: (.* at the peak)", trained) == re.findall(
        "memory +(.* at the peak)", described
    )

    # A dry run refuses other settings than those of the adapter, as training does.
    shutil.rmtree(place.folder / "my run")
    for also in (["--dry-run"], []):
        with pytest.raises(SystemExit, match="2"):
            cli.train(words(place, *start, "--rank", "4", "--alpha", "3", *also))
        said = "".join(capsys.readouterr())
        assert "adapters with other settings: rank 4 (theirs: 2); alpha 3.0 (theirs: 4.0)" in said


def test_a_dry_run_needs_no_more_than_training_to_resume(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    """A resumed run has its adapters, so that the adapter that it started from may be gone."""
    place.run("first", iters=1, warmup=0)
    start = str(place.folder / "first")
    place.run("second", stop_at=2, iters=4, warmup=0, resume_adapter_file=start)
    shutil.rmtree(start)
    for also in (["--dry-run"], []):
        cli.train(["-c", str(place.folder / "second" / "run.yaml"), "--resume", *also])
    assert "to start: mlx_loraplus.train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--target-modules", "q_prj"], "nothing matches 'q_prj'"),
        (["--rank", "1000"], "--rank 1000 is above"),
        (["--num-layers", "9"], "--num-layers 9 is above"),
        (["--patience", "2", "--valid-split", "0"], "patience needs validation examples"),
        (["--resume-adapter-file", "nowhere"], "nowhere"),
        (["--resume"], "holds no run to resume"),
        (["--batch-size", "100000", "--max-seq-length", "100000"], None),
    ],
)
def test_what_training_refuses_is_refused(
    place: Place, capsys: pytest.CaptureFixture[str], more: list[str], problem: str | None
):
    if "--patience" in more:
        (place.folder / "data" / "valid.jsonl").unlink()
    if problem is None:
        cli.train(words(place, *more, "--dry-run"))  # the batch is only as large as the data
        return
    for also in (["--dry-run"], []):
        with pytest.raises(SystemExit, match="2"):
            cli.train(words(place, *more, *also))
        printed = capsys.readouterr()
        said = printed.out if also else printed.err
        assert problem in said.splitlines()[-1]
        assert not also or said.splitlines()[-1].startswith("training would stop: ")


def test_an_occupied_folder_and_bad_rows_are_told_together(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    place.run("my run", iters=1)
    with (place.folder / "data" / "train.jsonl").open("a") as file:
        file.write('{"prompt": "1"}\n')
    with pytest.raises(SystemExit, match="2"):
        cli.train(words(place, "--dry-run"))
    said = capsys.readouterr().out.splitlines()[-1]
    assert "already holds a run" in said
    assert "no 'completion'" in said


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_weights_are_timed_as_they_are_stored(tiny: TinyModel, bits: int):
    """The scales of groups of 32 take a bit for each number."""
    model = tiny("llama")
    if bits < 16:
        nn.quantize(model, group_size=32, bits=bits)
    assert measure(model, AdapterConfig(rank=4)).bits == bits
    assert dry_run._operations_per_second(bits) > 0


def test_slow_steps_and_a_full_disk(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dry_run, "_LONGEST", 0.0)
    free = shutil.disk_usage(Path("/"))._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    cli.train(words(place, "--dry-run"))
    said = capsys.readouterr().out
    assert re.search(
        r"time +at least 0\.\d+ (seconds|minutes) in steps, which this machine needs", said
    )
    assert "the first steps of the run report the time left" in said
    assert "are free: give another --adapter-path, or a smaller --keep-checkpoints" in said


def test_an_adapter_as_the_model_is_told_once(place: Place, capsys: pytest.CaptureFixture[str]):
    place.run("first", iters=1, warmup=0)
    first, data = str(place.folder / "first"), str(place.folder / "bad.jsonl")
    Path(data).write_text('{"a": 1}\n')
    with pytest.raises(SystemExit, match="2"):
        cli.train(["--model", first, "--data", data, "--dry-run"])
    said = capsys.readouterr().out
    assert "holds an adapter, not a model: give its model" in said
    assert "leave --model out" not in said
    assert "bad.jsonl:1: no known field" in said


def test_the_model_of_the_adapter_to_start_from_is_the_default(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    """As in all other commands: without it, the adapter would be put on Gemma 3."""
    place.run("first", iters=1, warmup=0, rank=2)
    start = ["--resume-adapter-file", str(place.folder / "first")]
    without_model = words(place, *start, "--grad-checkpoint", "auto")[2:]
    for also in (["--dry-run"], []):
        cli.train([*without_model, *also])
    run = yaml.safe_load((place.folder / "my run" / "run.yaml").read_text())
    assert run["model"] == str(place.folder / "model")

    # An adapter that names no model needs one.
    (place.folder / "first" / "run.yaml").unlink()
    file = place.folder / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": None}))
    for also in (["--dry-run"], []):
        with pytest.raises(SystemExit, match="2"):
            cli.train([*without_model, "--overwrite", *also])
        assert "does not say which model it belongs to: give --model" in capsys.readouterr().err


def test_a_plan_has_the_settings_of_the_adapter_to_start_from(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    place.run("first", iters=1, warmup=0, rank=2, num_layers=1)
    start = ["--resume-adapter-file", str(place.folder / "first")]
    sizes = []
    for more in (start, ["--rank", "2", "--num-layers", "1"], []):
        cli.plan(["--model", str(place.folder / "model"), *more])
        sizes += re.findall(r"adapters +.*", capsys.readouterr().out)
    assert sizes[0] == sizes[1] != sizes[2]

    for more, problem in (
        (["--rank", "4"], "rank 4 (theirs: 2)"),
        (["qwen"], "an adapter belongs to one model: leave out qwen"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.plan([*more, *start])
        assert problem in capsys.readouterr().err
    with pytest.raises(ConfigError, match="does not read the adapter in resume_adapter_file"):
        plan_memory(str(place.folder / "model"), resume_adapter_file=start[1])


def test_the_adapter_to_start_from_is_checked_and_its_settings_are_described(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    place.run("first", iters=1, warmup=0, rank=2)
    capsys.readouterr()
    start = ["--resume-adapter-file", str(place.folder / "first")]
    cli.train(words(place, "--dry-run", *start))
    assert "lora, 2,048 parameters to train" in capsys.readouterr().out

    for also in (["--dry-run"], []):
        with pytest.raises(SystemExit, match="2"):
            cli.train(words(place, *start, "--rank", "4", *also))
        said = "".join(capsys.readouterr()).splitlines()[-1]
        assert "the run starts from adapters with other settings: rank 4 (theirs: 2)" in said


def test_a_dry_run_names_what_it_starts_from_and_loads_it_once(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    place.run("first", iters=1, warmup=0, rank=2)
    loaded: list[str] = []
    load = dry_run.load

    def load_and_count(name: str):
        loaded.append(name)
        return load(name)

    monkeypatch.setattr(dry_run, "load", load_and_count)
    capsys.readouterr()
    cli.train(words(place, "--dry-run", "--resume-adapter-file", str(place.folder / "first")))
    said = capsys.readouterr().out
    assert f"model      {place.folder / 'model'}\n" in said
    assert f"start      from the adapter in {place.folder / 'first'}\n" in said
    assert loaded == [str(place.folder / "model")]

    # A resumed run starts from its own folder, even if it started from an adapter.
    cli.train(words(place, "--resume-adapter-file", str(place.folder / "first")))
    cli.train(["-c", str(place.folder / "my run" / "run.yaml"), "--resume", "--dry-run"])
    assert "from the adapter in" not in capsys.readouterr().out


def test_without_a_model_a_run_starts_on_the_model_of_its_adapter(place: Place):
    place.run("first", iters=1, warmup=0)
    start = ["--resume-adapter-file", str(place.folder / "first")]
    without = words(place, *start)[2:]
    for also in (["--dry-run"], []):
        cli.train([*without, *also])
    settings = (place.folder / "my run" / "run.yaml").read_text()
    assert f"model: {place.folder / 'model'}\n" in settings


def test_an_adapter_of_another_model_is_refused(place: Place, capsys: pytest.CaptureFixture[str]):
    place.run("first", iters=1, warmup=0)
    write_tiny_model(place.folder / "wide", hidden=64)
    start = ["--resume-adapter-file", str(place.folder / "first")]
    for also in (["--dry-run"], []):
        with pytest.raises(SystemExit, match="2"):
            cli.train([*words(place, *start, *also), "--model", str(place.folder / "wide")])
        said = "".join(capsys.readouterr()).splitlines()[-1]
        assert "belongs to another model" in said
