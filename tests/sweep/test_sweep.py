"""A sweep on a tiny model: what it tries, cuts, keeps, finds and writes, and that it goes on."""

import html
import json
import math
import os
import re
import shlex
import signal
from pathlib import Path

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from rich.console import Console

from mlx_loraplus import cli, train
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.arguments import command
from mlx_loraplus.command_config import SweepConfig
from mlx_loraplus.config import AdapterConfig, TrainConfig
from mlx_loraplus.settings import configure
from mlx_loraplus.sweep.heatmap import Heatmap
from mlx_loraplus.sweep.sweep import Point, Sweep
from mlx_loraplus.sweep.sweep_page import sweep_page
from mlx_loraplus.sweep.trial import Trial, new_adapters
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import same

DEFAULT, OTHER = Point(1e-3, 4.0, 4, 8.0), Point(1e-2, 1.0, 4, 8.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_tiny_model(folder / "model")
    write_sums(folder / "data")
    return folder


def settings(place: Path, **changes) -> dict:
    plain = {
        "model": str(place / "model"), "data": str(place / "data"), "batch_size": 4, "iters": 6, "rounds": 2,
        "seeds": 2, "warmup": 2, "rank": 4, "learning_rates": (1e-3, 1e-2), "lr_ratios": (1, 4), "lr_ratio": 4,
        "learning_rate": 1e-4,
    }  # fmt: skip
    return plain | changes


def made(default: list[float], other: list[float], seeds: int = 3) -> Sweep:
    pairs = ((DEFAULT, default), (OTHER, other))
    trials = [
        Trial(p, 60, seed, loss, 0, 1.0, 60)
        for p, losses in pairs
        for seed, loss in enumerate(losses)
    ]
    return Sweep(SweepConfig(iters=60, seeds=seeds), DEFAULT, trials, "finished")


def test_a_sweep_tries_halves_repeats_and_writes_what_to_train_with(place: Path, tmp_path: Path):
    model, tokenizer = ml.load(str(place / "model"))
    before = dict(model.parameters())
    told: list[str] = []
    found = ml.sweep_rates(
        model, tokenizer, log=told.append, adapter_path=str(tmp_path / "s"), **settings(place)
    )
    assert found.outcome == "finished"
    short, whole = ([t for t in found.trials if t.steps == steps] for steps in (2, 6))
    assert {(t.point.learning_rate, t.point.lr_ratio) for t in short} == {
        (1e-3, 1),
        (1e-3, 4),
        (1e-2, 1),
        (1e-2, 4),
    }
    ranked = [t.point for t in sorted(short, key=lambda t: t.loss)]
    assert {(t.point, t.seed) for t in whole} == {
        (point, seed) for point in (*ranked[:2], found.default) for seed in (0, 1)
    }
    assert found.default == Point(1e-4, 4.0, 4, 16.0)
    assert not find_adapters(model)
    assert same(model.parameters(), before)
    run = configure(TrainConfig, yaml.safe_load((tmp_path / "s" / "best.yaml").read_text()))
    assert (run.optimizer.learning_rate, run.optimizer.lr_ratio) == (
        found.best.learning_rate,
        found.best.lr_ratio,
    )
    assert (tmp_path / "s" / "heatmap.png").stat().st_size > 1000
    page = (tmp_path / "s" / "sweep.html").read_text()
    assert found.verdict()[1:] in page
    assert page.count('class="best"') == 1, "the lowest loss of the first round"
    assert page.count('<tr class="marked">') == 1, "what to train with"
    assert re.search(r'<tr class="marked"><th scope="row">' + re.escape(str(found.best)), page)
    assert "chosen" in str(found)
    assert "6 steps" in str(found)
    assert found.verdict() in " ".join(str(found).split())
    assert any(
        line.startswith(
            "sweep: 4 trials of 2 steps, up to 6 trials of 6 steps; in all up to 44 steps"
        )
        for line in told
    )
    assert sum(trial.done for trial in found.trials) <= 44


def test_a_trial_is_the_run_that_train_makes(place: Path, tmp_path: Path):
    model, tokenizer = ml.load(str(place / "model"))
    folder = str(tmp_path / "s")
    found = ml.sweep_rates(
        model, tokenizer, adapter_path=folder, **settings(place, rounds=1, seeds=1)
    )
    train.main(["-c", f"{folder}/best.yaml", "--adapter-path", str(tmp_path / "run")])
    history = [
        json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    ]
    (trial,) = [t for t in found.trials if t.point == found.best]
    assert [e["valid_loss"] for e in history if "valid_loss" in e][-1] == pytest.approx(
        trial.loss, rel=1e-6
    )


def test_a_trial_that_diverges_is_cut_and_loses(place: Path, tmp_path: Path):
    model, tokenizer = ml.load(str(place / "model"))
    plain = settings(
        place, iters=20, seeds=1, learning_rates=(1e-3, 30.0), lr_ratios=(16,), max_grad_norm=0
    )
    found = ml.sweep_rates(model, tokenizer, adapter_path=str(tmp_path / "s"), **plain)
    (wild,) = [t for t in found.trials if t.point.learning_rate == 30.0]
    assert wild.loss == math.inf
    assert wild.done < wild.steps
    assert found.best.learning_rate < 1
    assert "diverged" in str(found)
    with pytest.raises(ml.ConfigError, match="diverged: give lower learning_rates"):
        ml.sweep_rates(
            model,
            tokenizer,
            adapter_path=str(tmp_path / "t"),
            **plain | {"learning_rates": (30.0,)},
        )


class FailingNorm(nn.RMSNorm):
    """A norm that fails as a GPU does, once it has been called a number of times."""

    calls_left = math.inf

    def __call__(self, x: mx.array) -> mx.array:
        if self.calls_left <= 0:
            raise RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error.")
        self.calls_left -= 1
        return super().__call__(x)


@pytest.mark.parametrize("further", [4, 6, 7], ids=["in a probe", "in a step", "in a validation"])
def test_a_gpu_that_fails_in_a_trial_keeps_those_before(place: Path, tmp_path: Path, further: int):
    model, tokenizer = ml.load(str(place / "model"))
    norm = FailingNorm(32)
    norm.weight = model.model.norm.weight
    model.model.norm = norm

    def log(line: str) -> None:
        if line.startswith("trial 1:"):
            norm.calls_left = further

    plain = settings(place, rounds=1, seeds=1) | {"adapter_path": str(tmp_path / "s")}
    with pytest.raises(ml.DeviceError) as error:
        ml.sweep_rates(model, tokenizer, log=log, **plain)
    command = f"mlx_loraplus.sweep -c {tmp_path}/s/sweep.yaml --resume"
    assert ("took too long on a batch of 4 rows" in str(error.value)) is (further > 4)
    assert "it took too long" in str(error.value)
    assert str(error.value).endswith(
        f"; 1 trial saved; to continue with the same settings: {command}"
    )
    assert not find_adapters(model)

    norm.calls_left = math.inf
    resumed = ml.sweep_rates(model, tokenizer, resume=True, **plain)
    assert resumed.outcome == "finished"


def test_a_sweep_goes_on_where_it_was_stopped(place: Path, tmp_path: Path):
    model, tokenizer = ml.load(str(place / "model"))
    whole = ml.sweep_rates(
        model, tokenizer, adapter_path=str(tmp_path / "whole"), **settings(place)
    )
    folder = {"adapter_path": str(tmp_path / "cut")}

    def interrupt(line: str) -> None:
        if line.startswith("trial 3"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ml.sweep_rates(model, tokenizer, log=interrupt, **folder, **settings(place))
    assert not find_adapters(model)
    with pytest.raises(ml.OutputError, match="resume=True continues it"):
        ml.sweep_rates(model, tokenizer, **folder, **settings(place))
    with pytest.raises(ml.ConfigError, match="iters differ"):
        ml.sweep_rates(model, tokenizer, resume=True, **folder, **settings(place, iters=9))
    part = ml.sweep_rates(
        model, tokenizer, resume=True, max_minutes=1e-6, **folder, **settings(place)
    )
    assert part.outcome == "out of time"
    assert len(part.trials) == 3
    rest = ml.sweep_rates(model, tokenizer, resume=True, **folder, **settings(place))
    assert [(t.point, t.steps, t.seed, t.loss) for t in rest.trials] == [
        (t.point, t.steps, t.seed, t.loss) for t in whole.trials
    ]


@pytest.mark.parametrize("line", ["[1]", '{"loss": 1}', '{"loss": "low"}', "[" * 100_000])
def test_trials_that_no_sweep_wrote_are_refused(place: Path, tmp_path: Path, line: str):
    model, tokenizer = ml.load(str(place / "model"))
    plain = settings(place, iters=1, rounds=1, seeds=1, learning_rates=(1e-3,), lr_ratios=(4,))
    ml.sweep_rates(model, tokenizer, adapter_path=str(tmp_path), **plain)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(
        ml.OutputError, match=r"can't be read .*start again with overwrite=True"
    ) as error:
        ml.sweep_rates(model, tokenizer, adapter_path=str(tmp_path), resume=True, **plain)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("default", "other", "verdict", "best"),
    [
        ([0.5, 0.6, 0.7], [0.3, 0.4, 0.5], "train with", OTHER),
        ([0.5, 0.6, 0.7], [0.3, 0.8, 0.4], "train with the defaults: .* within the noise", DEFAULT),
        ([0.5, 0.6, 0.7], [0.6, 0.7, 0.8], "train with the defaults: no trial", DEFAULT),
        ([math.inf, 0.6, 0.7], [0.6, 0.7, 0.8], "the defaults diverged", OTHER),
        ([0.5], [0.4], "one seed does not show the noise", OTHER),
    ],
)
def test_the_verdict_knows_the_noise(default, other, verdict, best):
    found = made(default, other)
    assert re.search(verdict, found.verdict())
    assert found.best == best


def test_a_best_value_at_an_edge_asks_for_wider_ones():
    points = [Point(rate, ratio, 8, 16.0) for rate in (1e-4, 4e-4) for ratio in (1.0, 4.0, 16.0)]
    trials = [
        Trial(point, 60, 0, 1.0 + abs(number - 1), 0, 1.0, 60)
        for number, point in enumerate(points)
    ]
    sweep = Sweep(SweepConfig(iters=60, adapter_path="found"), points[0], trials, "finished")
    (line,) = sweep.advice()
    assert (
        line
        == "the best learning_rate, 0.0001, is the lowest one tried, so a lower one may be better still"
    )
    wider = sweep.widen_command() or ""
    program, *words = shlex.split(wider)
    assert words == [
        "-c",
        "found/sweep.yaml",
        "--resume",
        "--learning-rates",
        "2.5e-05",
        "0.0001",
        "0.0004",
    ]
    with command(program, SweepConfig, words[2:]) as (config, _):
        assert config.learning_rates == (2.5e-5, 1e-4, 4e-4)
    assert wider in html.unescape(re.sub("</?span.*?>", "", sweep_page(sweep).decode()))

    # A best value within the grid needs nothing more.
    sweep.trials = [*trials, Trial(Point(5e-5, 4.0, 8, 16.0), 60, 0, 9.0, 0, 1.0, 60)]
    assert sweep.advice() == []
    assert sweep.widen_command() is None


def test_within_the_noise_no_wider_grid_is_advised():
    sweep = made([0.5, 0.6, 0.7], [0.3, 0.8, 0.4])
    assert "within the noise" in sweep.verdict()
    assert sweep.widen_command() is None


@pytest.mark.parametrize(("iters", "is_short"), [(5, True), (19, True), (20, False), (60, False)])
def test_short_runs_are_pointed_out(iters: int, is_short: bool):
    trials = [Trial(DEFAULT, iters, seed, 0.5, 0, 1.0, iters) for seed in range(2)]
    sweep = Sweep(SweepConfig(iters=iters), DEFAULT, trials, "finished")
    assert any("too short to compare rates" in line for line in sweep.advice()) == is_short


@pytest.mark.parametrize(
    "adapter",
    [
        {"init": "pissa"},
        {"init": "loftq", "quantize_group_size": 32},
        {"adapter": "dora"},
        {"adapter": "vera"},
        {"train": ("norms",)},
    ],
)
def test_a_model_is_as_it_was_after_every_kind_of_adapter(tiny, adapter):
    model = tiny("llama")
    before = dict(model.parameters())
    extra = {"train_modules": adapter["train"]} if "train" in adapter else adapter
    with new_adapters(model, TrainConfig(adapter=AdapterConfig(**{"rank": 4} | extra))):
        assert find_adapters(model)
    assert same(model.parameters(), before)
    assert not find_adapters(model)


def test_bad_settings_are_told_in_a_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for words, said in (
        (["--lr-ratios", "-1"], "--lr-ratios must"),
        (["--adapter", "vera", "--init", "pissa"], "--adapter vera has no --init"),
        (["--learning-rats", "1e-3"], "--learning-rates"),
        (["--adapter-path", str(place / "data" / "train.jsonl")], "is a file"),
        (["--adapter-path", str(tmp_path / "none"), "--resume"], "holds no sweep"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.sweep(words)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["sweep.yaml", "trials.jsonl", "sweep.html", "heatmap.png", "best.yaml"]
)
def test_what_no_sweep_wrote_is_kept_unless_overwritten(place: Path, tmp_path: Path, name: str):
    model, tokenizer = ml.load(str(place / "model"))
    short = settings(place, rounds=1, seeds=1, iters=2, learning_rates=(1e-3,), lr_ratios=(1,))
    for file in (name, "notes.txt"):
        (tmp_path / file).write_text("mine")

    told = (
        "already holds a sweep"
        if name == "trials.jsonl"
        else rf"holds {name} without the trials of a sweep"
    )
    with pytest.raises(ml.OutputError, match=told):
        ml.sweep_rates(model, tokenizer, adapter_path=str(tmp_path), **short)
    with pytest.raises(ml.OutputError, match=r"no sweep to resume|can't be read"):
        ml.sweep_rates(model, tokenizer, adapter_path=str(tmp_path), resume=True, **short)
    assert {file.read_text() for file in tmp_path.glob("*.*") if file.name != ".lock"} == {"mine"}

    ml.sweep_rates(model, tokenizer, adapter_path=str(tmp_path), overwrite=True, **short)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / name).read_bytes() != b"mine"
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(ml.OutputError, match="is a folder, where a sweep writes a file"):
        ml.sweep_rates(model, tokenizer, adapter_path=str(tmp_path), overwrite=True, **short)


def test_a_map_tells_what_was_not_tried():
    losses = np.array([[math.nan, math.inf, 1.0]])
    console = Console(width=80)
    with console.capture() as printed:
        console.print(Heatmap("map", "eta", "lambda", (1e-4, 1e-3, 1e-2), (4.0,), losses))
    words = printed.get().split("│")
    assert [word.strip() for word in words[-4:-1]] == ["not tried", "diverged", "1.0000"]
