"""Whole runs on pairs of answers: every objective, resumed, accumulated, with every kind of adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_loraplus.cli import train as main
from mlx_loraplus.config import ObjectiveConfig
from mlx_loraplus.errors import ConfigError
from mlx_loraplus.files import cache_folder
from mlx_loraplus.kernels.choices import SMALLEST_SLICE, StepChoices
from mlx_loraplus.runs.advice import give_advice
from mlx_loraplus.training import preferences
from mlx_loraplus.training.preferences import pair_losses
from scripts.tiny_model import write_tiny_model
from tests.conftest import same
from tests.training.tiny_runs import Place, adapter_of, without_times, write_labeled, write_pairs

OBJECTIVES = ("dpo", "ipo", "orpo", "simpo")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    write_tiny_model(tmp_path / "model", hidden=32)
    write_pairs(tmp_path / "data")
    return Place(tmp_path)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_learns_and_reports(place: Place, objective: str):
    run = place.run(objective=objective, learning_rate=3e-3, iters=8)
    start, *_ = run.history
    assert start["train"]["examples"] == 24
    assert ("reference" in start) == (objective in ("dpo", "ipo"))

    # Loss, margin and accuracy improve, also on other pairs.
    losses = [loss for _, loss in run.losses("valid_loss")]
    margins = [margin for _, margin in run.losses("valid_reward_margin")]
    assert losses[-1] < losses[0]
    assert margins[-1] > margins[0]

    # What is reported belongs together.
    for event in run.history:
        for prefix in ("", "valid_"):
            if f"{prefix}loss" not in event:
                continue
            chosen, rejected = event[f"{prefix}rewards_chosen"], event[f"{prefix}rewards_rejected"]
            assert event[f"{prefix}reward_margin"] == pytest.approx(chosen - rejected, abs=1e-6)
            assert 0 <= event[f"{prefix}reward_accuracy"] <= 1
            assert 0 <= event[f"{prefix}preferred"] <= 1
            assert event[f"{prefix}logp_chosen"] < 0
    assert any("margin" in line for line in place.told)
    assert any("answers ranked right" in line for line in place.told)
    assert not any("perplexity" in line for line in place.told)
    report = (run.folder / "report.html").read_text()
    assert "Chosen answers preferred" in report
    assert "Rewards of the validation answers" in report


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_equals_the_undisturbed_one(place: Place, objective: str):
    undisturbed = place.run("one", objective=objective, grad_accumulation_steps=2)
    assert place.run("two", objective=objective, grad_accumulation_steps=2, stop_at=3).outcome == (
        "interrupted"
    )
    resumed = place.run("two", objective=objective, grad_accumulation_steps=2, resume=True)
    assert same(adapter_of(undisturbed), adapter_of(resumed))
    assert without_times(undisturbed.history) == without_times(resumed.history)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_small_batches_that_accumulate_equal_one_large_batch(place: Place, objective: str):
    settings = {"objective": objective, "dropout": 0.0, "iters": 1, "warmup": 0, "optimizer": "sgd"}
    settings |= {"max_grad_norm": 0.0, "learning_rate": 1.0}
    one = place.run("one", batch_size=24, **settings)
    many = place.run("many", batch_size=6, grad_accumulation_steps=4, **settings)
    compare_nearly(adapter_of(one), adapter_of(many))
    for name in ("loss", "rewards_chosen", "reward_margin", "logp_rejected"):
        assert one.losses(name)[0][1] == pytest.approx(many.losses(name)[0][1], rel=1e-4, abs=1e-6)


def compare_nearly(one: dict[str, mx.array], other: dict[str, mx.array]) -> None:
    for name, array in one.items():
        assert mx.abs(array - other[name]).max().item() < 1e-5 * (1 + mx.abs(array).max().item())


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": "dora"},
        {"adapter": "vera", "learning_rate": None},
        {"init": "pissa"},
        {"init": "loftq", "quantize_group_size": 32},
        {"lr_ratio": 16},
        {"target_modules": ["q_proj", "lm_head"]},
        {"train_modules": ["norms"]},
        {"grad_checkpoint": "on"},
        {"compile": "on"},
        {"patience": 1},
    ],
    ids=str,
)
def test_other_settings_work(place: Place, settings: dict[str, Any]):
    run = place.run(objective="dpo", **settings)
    assert run.finished
    first, last = run.losses("valid_loss")[0][1], run.losses("valid_loss")[-1][1]
    # pissa and loftq change the base slightly, so their margin does not start at zero.
    assert first == pytest.approx(np.log(2), rel=1e-2)
    assert last < first


def test_a_checkpointed_or_compiled_run_is_the_same(place: Place):
    # Adam would turn the rounding of small gradients into steps, and dropout depends on padding.
    shared = {"objective": "dpo", "iters": 3, "optimizer": "sgd", "dropout": 0.0}
    plain = place.run("plain", **shared)
    for name, settings in {"on": {"grad_checkpoint": "on"}, "c": {"compile": "on"}}.items():
        other = place.run(name, **shared, **settings)
        compare_nearly(adapter_of(plain), adapter_of(other))


def test_a_quantized_base_works(place: Place):
    model, tokenizer = ml.load(str(place.folder / "model"))
    nn.quantize(model, group_size=32, bits=4)
    run = ml.finetune(
        model, tokenizer, data=str(place.folder / "data"), objective="dpo", iters=4, batch_size=4,
        learning_rate=3e-3, adapter_path=str(place.folder / "run"),
    )  # fmt: skip
    assert run.losses("valid_loss")[-1][1] < run.losses("valid_loss")[0][1]


# The reference


def stored() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (cache_folder() / "reference").rglob("log_probs")}


def test_the_reference_is_computed_once(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(place.folder / "cache"))
    place.run("one", objective="dpo", iters=2)
    first = stored()
    place.run("two", objective="ipo", iters=2, rank=4)
    assert stored() == first, "another run on the same model and rows computes nothing"
    place.run(
        "three",
        objective="dpo",
        iters=2,
        valid_split=None,
        data=[str(place.folder / "data" / "train.jsonl")],
    )
    assert len(stored()) > len(first)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_reference_takes_the_smallest_slices_and_validations_those_of_the_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, objective: str
):
    """The reference is computed before the tuning, and must fit whatever that finds."""
    if objective == "kto":
        shutil.rmtree(place.folder / "data")
        write_labeled(place.folder / "data")
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(place.folder / "cache"))
    sizes: list[int] = []
    make = preferences.make_log_probs

    def seen(split: Any, choices: StepChoices, **rest: Any) -> Any:
        sizes.append(choices.slice_bytes)
        return make(split, choices, **rest)

    large = StepChoices(slice_bytes=64 << 20)
    monkeypatch.setattr("mlx_loraplus.training.reference.default_choices", lambda: large)
    monkeypatch.setattr("mlx_loraplus.training.finetune.choices_for", lambda _: large)
    monkeypatch.setattr(preferences, "make_log_probs", seen)
    run = place.run(objective=objective, iters=1, warmup=0)
    assert sizes[:4] == [SMALLEST_SLICE] * 4
    assert set(sizes[4:]) == {64 << 20}
    assert len(sizes[4:]) > 1
    assert run.finished


def test_the_reference_is_the_base_or_the_adapter_at_the_start(place: Place):
    place.run("before", objective="simpo", learning_rate=3e-3)
    settings = {"objective": "dpo", "iters": 3, "resume_adapter_file": str(place.folder / "before")}
    base = place.run("base", **settings)
    start = place.run("start", **settings, reference="start")
    assert base.losses("valid_reward_margin")[0][1] > 1e-3
    assert start.losses("valid_reward_margin")[0][1] == pytest.approx(0, abs=1e-5)
    assert base.start["reference"] != start.start["reference"]

    # Both resume.
    for name, extra in (("base", {}), ("start", {"reference": "start"})):
        resumed = place.run(name, **settings | {"iters": 5}, **extra, resume=True)
        assert resumed.finished


def test_adapters_on_the_model_are_not_part_of_the_base(place: Place):
    place.run("before", objective="simpo", learning_rate=3e-3)
    found = {}
    for reference in ("base", "start"):
        model, tokenizer = ml.load(
            str(place.folder / "model"), adapter_path=str(place.folder / "before")
        )
        run = ml.finetune(
            model, tokenizer, data=str(place.folder / "data"), objective="dpo", iters=2, batch_size=4,
            adapter_path=str(place.folder / reference), reference=reference,
        )  # fmt: skip
        found[reference] = run.losses("valid_reward_margin")[0][1]
    assert found["base"] > 1e-3
    assert found["start"] == pytest.approx(0, abs=1e-5)


def test_a_resume_with_another_reference_is_refused(place: Place):
    place.run("before", objective="simpo", learning_rate=3e-3, dropout=0.0)
    model, tokenizer = ml.load(
        str(place.folder / "model"), adapter_path=str(place.folder / "before")
    )
    settings = {
        "data": str(place.folder / "data"), "objective": "dpo", "reference": "start", "batch_size": 4, "dropout": 0.0,
        "adapter_path": str(place.folder / "run"),
    }  # fmt: skip
    ml.finetune(model, tokenizer, iters=2, **settings)
    model, tokenizer = ml.load(str(place.folder / "model"))
    with pytest.raises(ConfigError, match="was started with another reference model"):
        ml.finetune(model, tokenizer, iters=4, resume=True, **settings)


# Formulas and settings


def test_the_odds_of_a_certain_answer_are_finite():
    objective = ObjectiveConfig(objective="orpo")

    def loss(values: mx.array) -> mx.array:
        losses, _ = pair_losses(objective, values, mx.ones((3, 2)), mx.zeros((3, 2)))
        return losses.sum()

    value, gradient = mx.value_and_grad(loss)(
        mx.array([[0.0, -300.0], [-1e-9, -0.7], [-90.0, -1e-3]])
    )
    assert np.isfinite(value.item())
    assert np.isfinite(np.array(gradient)).all()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"objective": "sft", "beta": 0.1}, "beta is for objective dpo, ipo, simpo and kto, not"),
        ({"objective": "orpo", "beta": 0.1}, "not orpo: what TRL calls beta is orpo_lambda here"),
        ({"objective": "ipo", "label_smoothing": 0.1}, "label_smoothing is for objective dpo"),
        ({"simpo_gamma": 0.5}, "simpo_gamma is for objective simpo, not sft"),
        ({"objective": "dpo", "orpo_lambda": 0.5}, "orpo_lambda is for objective orpo, not dpo"),
        (
            {"objective": "simpo", "reference": "start"},
            "reference is for objective dpo, ipo and kto",
        ),
        ({"objective": "dpo", "pack": True}, "pack is for objective sft, not dpo"),
        ({"objective": "dpo", "train_on": "everything"}, "train_on everything is for"),
        ({"objective": "dpo", "on_long": "split"}, "on_long split is for objective sft"),
        ({"objective": "dpo", "parallel": "tensor"}, "parallel tensor is for objective sft"),
        ({"objective": "dpo", "data_weights": [1]}, "data_weights is for objective sft"),
    ],
)
def test_settings_that_do_not_fit_are_refused(place: Place, settings: dict, problem: str):
    with pytest.raises(ConfigError, match=problem):
        place.run(**settings)


def test_a_falling_chosen_answer_is_reported_once(place: Place):
    run = place.run(objective="dpo", learning_rate=0.02, iters=12, beta=0.5, schedule="constant")
    is_warning = "the chosen answers are less likely"
    warnings = [line for line in place.told if line.startswith("warning") and is_warning in line]
    chosen = [value for _, value in run.losses("valid_logp_chosen")]
    assert min(chosen) < 1.02 * chosen[0]
    assert len(warnings) == 1
    assert "a higher beta" in warnings[0]

    # The advice at the end is not to train longer.
    advice = give_advice(run, run.verdict)
    assert advice is not None
    assert is_warning in advice.text
    report = (run.folder / "report.html").read_text()
    assert "less likely than before training" in report

    place.run("orpo", objective="orpo", iters=4)
    assert not any("less likely" in line for line in place.told)


# After training


def test_evaluate_compares_with_the_base(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = place.run(objective="simpo", learning_rate=1e-2, iters=10)
    data = {"data": str(place.folder / "data"), "objective": "simpo"}
    model, tokenizer = ml.load(str(place.folder / "model"))
    base = ml.evaluate(model, tokenizer, **data, answers=2)
    model, tokenizer = ml.load(str(place.folder / "model"), adapter_path=str(run.folder))
    tuned = ml.evaluate(model, tokenizer, **data, answers=2, base=base)
    assert base.preferred is not None
    assert tuned.preferred is not None
    assert tuned.preferred > base.preferred
    assert base.preferred == run.losses("valid_preferred")[0][1]
    assert tuned.preferred == run.losses("valid_preferred")[-1][1]
    assert len(tuned.answers) == 2
    assert all(answer.expected.replace(" ", "").isdigit() for answer in tuned.answers)

    # The command takes the objective from the run.
    monkeypatch.setenv("COLUMNS", "200")
    main(["--adapter-path", str(run.folder), "--test"])
    assert "chosen answers preferred" in capsys.readouterr().out


def test_the_test_of_a_second_run_shows_its_start(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    first = place.run("first", objective="orpo", learning_rate=1e-2, iters=4)
    start = {"resume_adapter_file": str(first.folder), "reference": "start"}
    second = place.run("second", objective="dpo", learning_rate=1e-3, iters=2, **start)
    capsys.readouterr()
    main(["--adapter-path", str(second.folder), "--test"])
    shown = capsys.readouterr().out

    # The report names what it started from.
    assert f"reference, the model with {first.folder}, for 24 pairs" in place.told_with(
        "train: log"
    )
    report = (second.folder / "report.html").read_text()
    assert "adapter that it started from" in report
    assert "base model" not in report

    # The last validation of the first run is the start of the second.
    preferred = [value for _, value in first.losses("valid_preferred")]
    line = next(line for line in shown.splitlines() if "chosen answers preferred" in line)
    shares = [float(word.rstrip("%")) / 100 for word in line.split() if word.endswith("%")]
    assert shares[:2] == pytest.approx([preferred[0], preferred[-1]], abs=1e-3)
    assert len(shares) == 3
    assert all(name in shown for name in ("base", "start", "tuned"))

    # The first adapter is no longer there.
    shutil.rmtree(first.folder)
    main(["--adapter-path", str(second.folder), "--test"])
    assert "no longer holds an adapter" in " ".join(capsys.readouterr().out.split())


def test_the_dry_run_shows_pairs(place: Place, capsys: pytest.CaptureFixture[str]):
    words = ["--model", str(place.folder / "model"), "--data", str(place.folder / "data")]
    main([*words, "--objective", "dpo", "--dry-run", "--adapter-path", str(place.folder / "run")])
    shown = capsys.readouterr().out
    for text in (
        "formats: 24 preference",
        "steps of 8 pairs",
        "rejected answers",
        "of up to 8 pairs",
    ):
        assert text in shown, shown

    # Both answers of a sample are shown.
    row = json.loads((place.folder / "data" / "train.jsonl").read_text().splitlines()[0])
    shown = shown.replace(" ", "")  # the tiny tokenizer puts spaces between characters
    chosen, rejected = shown.split("train.jsonl:1,chosen")[1].split("train.jsonl:1,rejected")
    assert "⟦" + row["chosen"].replace(" ", "") in chosen
    assert "⟦" + row["rejected"].replace(" ", "") in rejected
