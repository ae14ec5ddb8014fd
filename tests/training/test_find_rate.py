"""The search for the learning rate: what it finds, what it leaves behind, and with which settings it works."""

import json
import math
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import numpy as np
import pytest
import yaml

from mlx_loraplus import cli
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.batches import Batches
from mlx_loraplus.settings import configure, default_rate
from mlx_loraplus.training.distributed import ALONE
from mlx_loraplus.training.model_probes import probe_model
from mlx_loraplus.training.optimizer import LoRAPlus
from mlx_loraplus.training.range_test import Finding, TriedRate
from mlx_loraplus.training.rate_probe import FORWARD, probing
from mlx_loraplus.training.rate_search import MIN_STEPS, STEPS, RateSearch, search_rate
from mlx_loraplus.training.schedule import schedule_of
from mlx_loraplus.training.trainer import TrainState
from scripts.study.rate_methods import METHODS
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import TinyModel, same
from tests.training.teams import Runs, do_jobs
from tests.training.tiny_runs import Place, adapter_of, examples, without_times, write_pairs

AUTO = {"learning_rate": "auto", "iters": STEPS, "steps_per_eval": STEPS}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    write_tiny_model(folder / "model", layers=1)
    write_sums(folder / "data")
    write_pairs(folder / "pairs", count=40)
    write_labeled(folder / "labeled")
    return Place(folder)


def write_labeled(folder: Path) -> None:
    """Write sums with an answer that is labeled as right or wrong."""
    folder.mkdir()
    for name, count in (("train", 80), ("valid", 6)):
        rows = [
            {"prompt": f"{n} + 3 =", "completion": f" {n + 3 + n % 2}", "label": n % 2 == 0}
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def state_of(model: Any, config: TrainConfig, count: int = 60) -> TrainState:
    mx.random.seed(1)
    trainable = attach_adapters(model, config.adapter)
    rows = examples(3) * 30  # few examples again and again, so that something can be learned
    batches = Batches(rows[:count], 4, 0)
    schedule = schedule_of(config, batches.per_epoch)
    optimizer = LoRAPlus(config.optimizer, schedule.steps)
    optimizer.init(model, trainable.groups)
    probes = probe_model(model, pack=False)
    return TrainState(
        model, probes.trunk_and_head(model), optimizer, batches, schedule, probes=probes
    )


def config_of(**settings: Any) -> TrainConfig:
    return configure(TrainConfig, {"model": "tiny", "iters": STEPS, **settings})


# The methods


@pytest.mark.parametrize("method", METHODS)
def test_a_search_leaves_everything_as_it_was_and_is_repeatable(tiny: TinyModel, method: str):
    config = config_of(dropout=0.3)
    state = state_of(tiny("llama"), config)
    model, optimizer = state.model, state.optimizer
    model.eval()
    mx.random.seed(5)
    random = mx.random.state[0].tolist()
    before, moments = model.parameters(), dict(optimizer.arrays())
    settings = optimizer.config

    found = search_rate(state, config, ALONE, METHODS[method])
    assert found.tried
    assert 0 < found.steps <= STEPS + 0.5
    assert same(model.parameters(), before)
    assert same(optimizer.arrays(), moments)
    assert mx.random.state[0].tolist() == random
    assert not model.training
    assert optimizer.config is settings
    assert optimizer.state["step"].item() == 0

    again = search_rate(state, config, ALONE, METHODS[method])
    assert again.stored() | {"seconds": 0} == found.stored() | {"seconds": 0}


class Bowl:
    """A loss with a known best rate, in place of a model: each step goes as far as its rate.

    The loss is (w - 1)², and a method's direction is 1 at rate 1, so w = steps · rate.
    """

    def __init__(self, best: float, highest: float = 1e6):
        self.best, self.highest, self.has_diverged = best, highest, False
        self.spent, self.w = 0.0, 0.0

    def restart(self, next_step: int = 0) -> None:
        self.w = 0.0

    def step(self, rate: float) -> float:
        loss = self.loss()
        self.w += rate / self.best
        self.spent += 1
        return loss

    def losses(self, count: int) -> np.ndarray:
        self.spent += count * FORWARD
        return np.full(count, self.loss())

    def loss(self) -> float:
        if self.w > self.highest:
            self.has_diverged = True
            return math.nan
        return (self.w - 1) ** 2


@pytest.mark.parametrize("method", ["range test", "trials"])
def test_a_rate_ten_times_higher_is_found_ten_times_higher(method: str):
    low, high = (METHODS[method].find(Bowl(best), STEPS, best).critical for best in (1e-3, 1e-2))  # pyright: ignore
    assert low is not None
    assert high == pytest.approx(10 * low, rel=1e-6)
    assert 0.01 < low / 1e-3 < 10


@pytest.mark.parametrize("method", ["line search", "curvature"])
def test_a_loss_that_bends_more_needs_a_lower_rate(tiny: TinyModel, method: str):
    config = config_of()
    flat = search_rate(state_of(tiny("llama"), config), config, ALONE, METHODS[method])
    config = config_of(alpha=160)
    bent = search_rate(state_of(tiny("llama"), config), config, ALONE, METHODS[method])
    assert flat.critical is not None
    assert bent.critical is not None
    assert bent.critical < flat.critical / 3  # ten times the scale


def test_prodigy_grows_until_the_distance_is_covered(tiny: TinyModel):
    config = config_of()
    found = search_rate(state_of(tiny("llama"), config), config, ALONE, METHODS["prodigy"])
    rates = [each.rate for each in found.tried]
    assert rates == sorted(rates)
    assert found.critical == rates[-1] > rates[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_ends_a_probe_and_not_the_run(
    tiny: TinyModel, method: str, monkeypatch: pytest.MonkeyPatch
):
    config = config_of()
    state = state_of(tiny("llama"), config)
    before = state.model.parameters()
    state.model.update({"lm_head": {"weight": state.model.lm_head.weight * mx.inf}})
    found = search_rate(state, config, ALONE, METHODS[method])
    assert found.critical is None
    assert found.rate == default_rate(config)
    assert "no rate lowered the loss" in str(found)
    assert all(math.isnan(each.change) for each in found.tried)
    json.dumps(found.stored(), allow_nan=False)
    del before


@pytest.mark.parametrize("method", ["range test", "trials"])
def test_high_rates_that_diverge_do_not_hide_a_good_one(method: str):
    probe = Bowl(1.5e-4, highest=1.2)
    found = METHODS[method].find(probe, STEPS, 1e-3)  # pyright: ignore
    assert found.critical is not None
    assert found.critical < 1e-3
    assert probe.has_diverged


def test_the_probe_reads_the_batches_of_the_run_and_counts_its_work(tiny: TinyModel):
    config = config_of()
    state = state_of(tiny("llama"), config)
    with probing(state, config, ALONE) as probe:
        untrained = probe.losses(3)
        assert probe.spent == pytest.approx(3 * FORWARD)
        assert probe.step(1e-9) == pytest.approx(untrained[0], abs=1e-5)
        loss, gradients = probe.gradients()
        assert loss == pytest.approx(untrained[1], abs=1e-4)
        assert gradients.keys() == probe.parameters().keys()
        assert probe.spent == pytest.approx(2 + 3 * FORWARD)
        probe.step(1e-2)
        probe.restart()
        assert probe.losses(3).tolist() == untrained.tolist()


# What is said


def test_few_examples_or_steps_are_said_and_the_default_is_used(tiny: TinyModel):
    config = config_of()
    few = search_rate(state_of(tiny("llama"), config, count=4 * MIN_STEPS - 4), config, ALONE)
    assert few.rate == few.default == default_rate(config)
    assert f"enough examples for {MIN_STEPS} steps, and the data has enough for 7" in str(few)

    config = config_of(iters=STEPS - 1)
    short = search_rate(state_of(tiny("llama"), config), config, ALONE)
    assert short.rate == short.default
    assert f"the run has {STEPS - 1}" in str(short)


def test_the_line_says_what_was_tried_and_chosen():
    tried = (TriedRate(1e-5, -0.1), TriedRate(1e-3, math.nan))
    found = RateSearch(5e-4, 1e-3, "range test", 1e-3, tried, 29.7, 12.0)
    assert str(found) == (
        "learning rate: 0.0005 was found (range test, the work of 30 steps in 12.0 s; tried 1e-05 to"
        " 0.001; critical 0.001; the default is 0.001)"
    )
    assert found.stored()["tried"][1] == {"rate": 1e-3, "change": None}
    assert Finding(None, ()).critical is None


# Runs


def test_a_run_stores_the_rate_and_never_searches_again(place: Place):
    run = place.run("stored", stop_at=12, **AUTO)
    assert run.outcome == "interrupted"
    line = place.told_with("learning rate:")
    rate = run.config.optimizer.learning_rate
    assert f"{rate:.3g} was found" in line
    settings = yaml.safe_load((run.folder / "run.yaml").read_text())
    assert settings["learning_rate"] == rate
    search = run.start["found_rate"]
    assert search["rate"] == rate
    assert rate != search["default"]

    # Whether it is asked for auto or for the number, the run resumes with the stored rate.
    resumed = place.run("stored", **AUTO, resume=True)
    assert not [line for line in place.told if "learning rate:" in line]
    assert resumed.outcome == "finished"
    assert resumed.config.optimizer.learning_rate == rate
    assert resumed.start["found_rate"] == search
    report = (run.folder / "report.html").read_text()
    assert "How was the learning rate found?" in report
    assert "Change of the training loss at each rate" in report

    # The same run with the number, from the start, is bit-exactly the same.
    direct = place.run("direct", **AUTO | {"learning_rate": rate})
    assert same(adapter_of(resumed), adapter_of(direct))
    assert "found_rate" not in direct.start


KINDS: dict[str, dict[str, Any]] = {
    "packed": {"pack": True, "batch_size": 1, "max_seq_length": 40},
    "accumulated": {"grad_accumulation_steps": 2, "batch_size": 2},
    "compiled": {"compile": "on", "dropout": 0.0},
    "checkpointed": {"grad_checkpoint": "on"},
    "dora": {"adapter": "dora"},
    "vera": {"adapter": "vera", "rank": 8},
    "init2": {"init": "init2"},
    "pissa": {"init": "pissa", "quantize": 4, "quantize_group_size": 32},
    "embeddings": {"train_modules": "embed_tokens"},
    "full": {"adapter": "full", "dropout": 0.0},
    "sgd": {"optimizer": "sgd"},
    "muon": {"optimizer": "muon"},
    "dpo": {"objective": "dpo", "data": "pairs"},
    "orpo": {"objective": "orpo", "data": "pairs"},
    "kto": {"objective": "kto", "data": "labeled"},
}


@pytest.mark.parametrize("name", KINDS)
def test_it_works_with(place: Place, name: str):
    settings = dict(KINDS[name])
    if "data" in settings:
        settings["data"] = str(place.folder / settings["data"])
    once = AUTO | settings | {"max_minutes": 1e-9}
    run = place.run(f"kind-{name}", **once)
    search = run.start["found_rate"]
    assert not search["reason"], place.told_with("learning rate:")
    assert run.config.optimizer.learning_rate == search["rate"]

    # The search has left no trace in the run's first step.
    direct = place.run(f"direct-{name}", **once | {"learning_rate": search["rate"]})
    told = [without_times(each.history)[1:-1] for each in (run, direct)]
    assert told[0] == told[1]
    assert len(run.losses("loss")) == 1


def test_it_works_with_a_quantized_base(place: Place, tmp_path: Path):
    from mlx_lm.utils import quantize_model, save_model

    model, _ = ml.load(str(place.folder / "model"))
    config = json.loads((place.folder / "model" / "config.json").read_text())
    model, config = quantize_model(model, config, 32, 4)
    save_model(tmp_path, model)
    for file in (place.folder / "model").glob("*token*"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = place.run("quantized", **AUTO, model=str(tmp_path), max_minutes=1e-9)
    assert not run.start["found_rate"]["reason"]


def test_two_processes_find_the_same_rate(place: Place, tmp_path: Path):
    once = {"batch_size": 4, "sample_rows": 0, "max_minutes": 1e-9}
    runs = Runs(place.folder, AUTO | once)
    one, other = do_jobs(2, [runs.job("team")], tmp_path / "team")[0]
    assert one["history"][0]["found_rate"] == other["history"][0]["found_rate"]
    alone = runs.alone("alone")
    found = one["history"][0]["found_rate"]["rate"]
    assert found == pytest.approx(alone.start["found_rate"]["rate"], rel=0.02)


# In a notebook


def test_find_rate_finds_what_a_run_finds_and_changes_nothing(place: Place):
    model, tokenizer = ml.load(str(place.folder / "model"))
    before = model.parameters()
    settings = {"data": str(place.folder / "data"), "batch_size": 4, "iters": STEPS}
    found = ml.find_rate(model, tokenizer, **settings, adapter_path=str(place.folder / "none"))
    assert same(model.parameters(), before)
    assert not (place.folder / "none").exists()
    assert "was found" in repr(found)

    run = place.run("found", **AUTO, dropout=0.0)
    assert found.rate == run.start["found_rate"]["rate"]

    # It also works for the adapters of a run, which it does not change.
    model, tokenizer = ml.load(str(place.folder / "model"), adapter_path=str(run.folder))
    trained = model.parameters()
    assert ml.find_rate(model, tokenizer, **settings).rate > 0
    assert same(model.parameters(), trained)
    with pytest.raises(ml.ConfigError, match="find_rate finds the learning_rate: leave it out"):
        ml.find_rate(model, tokenizer, **settings, learning_rate=1e-3)


def test_a_dry_run_says_that_auto_will_search(place: Place, capsys: pytest.CaptureFixture[str]):
    words = (
        f"--model {place.folder}/model --data {place.folder}/data --learning-rate auto --dry-run"
    )
    cli.train([*words.split(), "--adapter-path", str(place.folder / "dry")])
    assert "auto searches before the first step" in capsys.readouterr().out


def test_auto_is_refused_where_nothing_searches(place: Place):
    model, tokenizer = ml.load(str(place.folder / "model"))
    with pytest.raises(ml.ConfigError, match="a sweep searches rates itself"):
        ml.sweep_rates(model, tokenizer, learning_rate="auto")
    with pytest.raises(ml.ConfigError, match="give LoRAPlus a number"):
        LoRAPlus(ml.OptimizerConfig(learning_rate="auto"), 10)
    with pytest.raises(ml.ConfigError, match=r"learning_rate must be .*'auto'"):
        configure(TrainConfig, {"learning_rate": "fast"})
