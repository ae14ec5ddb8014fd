"""A sweep of preferences, and one that starts from an adapter, on a tiny model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import pytest
import yaml

from mlx_loraplus import cli, train
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.command_config import SweepConfig
from mlx_loraplus.settings import configure
from mlx_loraplus.sweep.sweep import Point, Sweep
from mlx_loraplus.sweep.sweep_page import sweep_page
from mlx_loraplus.sweep.trial import Trial
from mlx_loraplus.training import reference
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import same
from tests.training.tiny_runs import write_labeled, write_pairs

NAME = "chosen answers preferred"  # as evaluate calls it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, pairs, labeled answers, sums, and two adapters."""
    folder = tmp_path_factory.mktemp("preferences")
    write_tiny_model(folder / "model")
    write_pairs(folder / "pairs")
    write_labeled(folder / "labeled")
    write_sums(folder / "sums")
    for name, iters in (("start", 4), ("other", 5)):
        model, tokenizer = ml.load(str(folder / "model"))
        ml.finetune(
            model, tokenizer, data=str(folder / "sums"), adapter_path=str(folder / name), iters=iters,
            learning_rate=1e-2, rank=4, target_modules=["q_proj"], train_modules=["norms"], sample_rows=0,
        )  # fmt: skip
    return folder


def sweep(place: Path, folder: Path, **settings: Any) -> Sweep:
    model, tokenizer = ml.load(str(place / "model"))
    data = "labeled" if settings.get("objective") == "kto" else "pairs"
    plain = {
        "data": str(place / data), "objective": "dpo", "iters": 4, "rounds": 1, "seeds": 1, "batch_size": 4,
        "learning_rates": (1e-3, 1e-2), "lr_ratios": (1, 4), "adapter_path": str(folder),
    }  # fmt: skip
    before = dict(model.parameters())
    found = ml.sweep_rates(model, tokenizer, **plain | settings)
    assert not find_adapters(model)
    assert same(model.parameters(), before)
    return found


def run_best(folder: Path, run: Path) -> ml.Run:
    """Train with what a sweep found."""
    train.main(["-c", str(folder / "best.yaml"), "--adapter-path", str(run)])
    return ml.Run.load(run)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Return a list that grows by the number of answers that a reference scores."""
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))
    counts: list[int] = []
    original: Callable[..., Any] = reference.answer_log_probs

    def counting(model: Any, trunk_and_head: Any, answers: Any, *others: Any) -> Any:
        counts.append(len(answers))
        return original(model, trunk_and_head, answers, *others)

    monkeypatch.setattr(reference, "answer_log_probs", counting)
    return counts


@pytest.mark.parametrize("objective", ["dpo", "ipo", "orpo", "simpo", "kto"])
def test_a_trial_of_each_objective_is_the_run_that_train_makes(
    place: Path, tmp_path: Path, scored: list[int], objective: str
):
    folder = tmp_path / "s"
    found = sweep(place, folder, objective=objective)
    valid = 6 if objective == "kto" else 5
    has_reference = objective in ("dpo", "ipo", "kto")
    assert scored == ([24, 24, valid, valid] if has_reference else []), "once for all trials"

    run = run_best(folder, tmp_path / "run")
    assert len(scored) in (0, 4), "the run finds what the sweep stored"
    (trial,) = [trial for trial in found.trials if trial.point == found.best]
    assert run.losses("valid_loss")[-1][1] == pytest.approx(trial.loss, rel=1e-6)

    # What shows whether the chosen answers become less likely is stored.
    logps = [logp for _, logp in run.losses("valid_logp_chosen")]
    seen = [event["valid_logp_chosen"] for event in (found.before, trial.history[-1])]
    assert seen == pytest.approx([logps[0], logps[-1]], rel=1e-6)

    # The accuracy is that of evaluate, and is shown.
    model, tokenizer = ml.load(run.folder)
    data = str(place / ("labeled" if objective == "kto" else "pairs"))
    shown = ml.evaluate(model, tokenizer, data=data, objective=objective, answers=0)
    assert trial.accuracy == pytest.approx(shown.preferred)
    assert NAME in (folder / "sweep.html").read_text()


def test_the_defaults_are_those_of_the_objective(place: Path, tmp_path: Path):
    found = sweep(place, tmp_path, learning_rates=(), rounds=2, iters=3)
    assert found.default == Point(2.5e-5, 4.0, 8, 16.0)
    assert {trial.point.learning_rate for trial in found.trials} == {
        6.25e-6, 2.5e-5, 1e-4, 4e-4,
    }  # fmt: skip


@pytest.mark.parametrize(("objective", "is_shown"), [("sft", False), ("simpo", True)])
def test_the_table_and_the_page_show_which_answers_are_preferred(objective: str, is_shown: bool):
    point = Point(1e-3, 4.0, 8, 16.0)
    trials = [Trial(point, 6, seed, 0.5, seed / 4, 1.0, 6) for seed in (1, 2)]
    config = configure(SweepConfig, {"iters": 6, "objective": objective})
    found = Sweep(config, point, trials, "finished")
    text, page = " ".join(str(found).split()), sweep_page(found).decode()
    assert ("38%" in text, NAME in page, ">38%<" in page) == (is_shown,) * 3
    assert ("preferred" in text) is is_shown


@pytest.mark.parametrize(("logp", "is_worse"), [(-9.0, False), (-30.0, True)])
def test_a_best_point_that_makes_chosen_answers_unlikely_asks_for_no_higher_rate(
    logp: float, is_worse: bool
):
    after = {"step": 6, "valid_logp_chosen": logp, "valid_reward_margin": 2.0}
    points = [Point(rate, 4.0, 8, 16.0) for rate in (1e-4, 4e-4)]
    trials = [
        Trial(point, 6, 0, 0.5 - point.learning_rate, 1.0, 1.0, 6, [after]) for point in points
    ]
    config = configure(SweepConfig, {"iters": 6, "objective": "dpo"})
    before = {"step": 0, "valid_logp_chosen": -10.0, "valid_reward_margin": 0.0}
    found = Sweep(config, points[0], trials, "finished", before)
    told = " ".join(found.advice())
    assert found.best == points[1]
    assert ("so a higher one may be better" in told) is not is_worse
    assert ("than before training (log-probability -10.0 -> -30.0)" in told) is is_worse
    assert ("try a lower --learning-rate, a higher --beta" in told) is is_worse
    assert (found.widen_command() is None) is is_worse
    assert ("less likely than before training" in sweep_page(found).decode()) is is_worse


def test_labels_of_one_kind_have_no_pairs_to_rank(place: Path, tmp_path: Path):
    row = {"prompt": "1 + 1 =", "completion": " 2", "label": True}
    rows = [row | {"prompt": f"1 + {number} ="} for number in range(8)]
    data = {"train": rows, "valid": rows[:2]}
    found = sweep(place, tmp_path, objective="kto", data=data)
    assert [trial.accuracy for trial in found.trials] == [None] * len(found.trials)
    assert NAME in " ".join(sweep_page(found).decode().split())


def test_a_trial_that_diverges_is_cut(place: Path, tmp_path: Path):
    wild = {"learning_rates": (1e-3, 30.0), "lr_ratios": (16,), "max_grad_norm": 0, "iters": 20}
    found = sweep(place, tmp_path, **wild)
    (cut,) = [trial for trial in found.trials if trial.point.learning_rate == 30.0]
    assert cut.loss == math.inf
    assert cut.done < cut.steps


def test_losses_that_vary_from_pair_to_pair_cut_no_trial(place: Path, tmp_path: Path):
    found = sweep(place, tmp_path, objective="simpo", batch_size=1, seeds=2, iters=18)
    events = [event for trial in found.trials for event in trial.history]
    losses = [event["loss"] for event in events if "loss" in event]
    assert max(losses) > 1.5 * 1.21, "the loss before training is 1.20"
    assert [trial.done for trial in found.trials] == [18] * len(found.trials)


def test_a_sweep_starts_from_an_adapter(place: Path, tmp_path: Path):
    start = {"resume_adapter_file": str(place / "start"), "reference": "start"}
    folder = tmp_path / "s"
    whole = sweep(place, folder, **start)
    assert {(trial.point.rank, trial.point.alpha) for trial in whole.trials} == {(4, 16.0)}
    first = json.loads((folder / "trials.jsonl").read_text().splitlines()[0])
    assert first["resume_adapter_file"]

    # A trial is the run that train makes from the adapter.
    run = run_best(folder, tmp_path / "run")
    (trial,) = [trial for trial in whole.trials if trial.point == whole.best]
    assert run.losses("valid_loss")[-1][1] == pytest.approx(trial.loss, rel=1e-6)
    assert run.losses("valid_loss")[0][1] == pytest.approx(math.log(2))
    assert run.config.adapter.target_modules == ("q_proj",)
    assert run.config.adapter.train_modules == ("norms",)

    # Without it, the trials are others.
    fresh = sweep(place, tmp_path / "fresh", rank=4, target_modules=["q_proj"])
    assert [trial.loss for trial in fresh.trials] != [trial.loss for trial in whole.trials]


@pytest.mark.parametrize(
    "kind",
    [
        {"init": "pissa", "quantize": 4, "quantize_group_size": 32},
        {"adapter": "vera", "rank": 8},
        {"adapter": "dora", "rslora": True},
    ],
)
def test_an_adapter_of_any_kind_can_be_the_start(place: Path, tmp_path: Path, kind: dict[str, Any]):
    model, tokenizer = ml.load(str(place / "model"))
    start = {"data": str(place / "sums"), "adapter_path": str(tmp_path / "start"), "iters": 2}
    ml.finetune(model, tokenizer, sample_rows=0, **start | kind)

    file = {"resume_adapter_file": str(tmp_path / "start")}
    found = sweep(place, tmp_path / "s", lr_ratios=(4,), **file)
    run = run_best(tmp_path / "s", tmp_path / "run")
    (trial,) = [trial for trial in found.trials if trial.point == found.best]
    assert run.losses("valid_loss")[-1][1] == pytest.approx(trial.loss, rel=1e-6)


def test_a_sweep_from_an_adapter_is_resumed_with_it_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sweep(place, tmp_path, resume_adapter_file=str(place / "start"))
    written = tmp_path / "sweep.yaml"
    cli.sweep(["-c", str(written), "--resume"])
    assert "resume: 5 trials already ended" in capsys.readouterr().out

    settings = yaml.safe_load(written.read_text())
    written.write_text(yaml.safe_dump(settings | {"resume_adapter_file": str(place / "other")}))
    with pytest.raises(SystemExit):
        cli.sweep(["-c", str(written), "--resume"])
    assert "resume_adapter_file differ;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ranks": (2, 4)}, "ranks can't be tried with resume_adapter_file"),
        ({"alphas": (8,)}, "alphas can't be tried"),
        ({"rank": 8}, r"rank 8 \(theirs: 4\)"),
        ({"adapter": "full"}, "full does not have"),
        (
            {"objective": "orpo", "reference": "start"},
            "reference is for objective dpo, ipo and kto",
        ),
    ],
)
def test_settings_that_the_adapter_decides(place: Path, tmp_path: Path, settings: Any, told: str):
    with pytest.raises(ml.ConfigError, match=told):
        sweep(place, tmp_path, resume_adapter_file=str(place / "start"), **settings)


def test_a_sweep_of_an_older_version_can_be_resumed(place: Path, tmp_path: Path):
    plain = {"objective": "sft", "data": str(place / "sums")}
    whole = sweep(place, tmp_path, **plain)
    path = tmp_path / "trials.jsonl"
    first, *lines = path.read_text().splitlines()
    identity = json.loads(first)
    del identity["resume_adapter_file"], identity["settings"]["objective"]
    path.write_text("\n".join([json.dumps(identity), *lines]) + "\n")

    again = sweep(place, tmp_path, resume=True, **plain)
    assert again.trials == whole.trials
    with pytest.raises(ml.ConfigError, match="objective, rows differ"):
        sweep(place, tmp_path, resume=True)
