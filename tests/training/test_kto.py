"""Whole runs on labeled answers: the KL estimate, resumed, accumulated, with every kind of adapter."""

import json
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
from mlx_loraplus.memory.trace_memory import MAX_TRACES
from mlx_loraplus.training.kto import describe_labeled, labeled_losses
from scripts.tiny_model import write_tiny_model
from tests.conftest import same
from tests.training.tiny_runs import (
    Place,
    adapter_of,
    compiled_choices,
    keep_loops,
    without_times,
    write_labeled,
)

KTO = {"objective": "kto", "learning_rate": 3e-3}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    write_tiny_model(tmp_path / "model", hidden=32)
    write_labeled(tmp_path / "data")
    return Place(tmp_path)


def nearly_same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    """Whether all arrays agree within 1e-5."""
    return all(
        mx.abs(array - other[name]).max().item() < 1e-5 * (1 + mx.abs(array).max().item())
        for name, array in one.items()
    )


def test_a_run_learns_and_reports(place: Place):
    run = place.run(**KTO, iters=10)
    start, *_ = run.history
    assert start["train"]["examples"] == 24
    assert "reference" in start

    # Before the first step, the model is its reference.
    (_, first), *_, (_, last) = run.losses("valid_loss")
    assert first == pytest.approx(0.5, abs=1e-4)
    assert last < first
    assert run.losses("valid_reward_margin")[-1][1] > 0
    assert run.losses("valid_kl")[0][1] == pytest.approx(0, abs=1e-4)
    assert run.losses("valid_reward_accuracy")[-1][1] > 0.5

    # What is reported belongs together.
    for event in run.history:
        for prefix in ("", "valid_"):
            if f"{prefix}reward_margin" in event:
                chosen = event[f"{prefix}rewards_chosen"]
                rejected = event[f"{prefix}rewards_rejected"]
                assert event[f"{prefix}reward_margin"] == pytest.approx(chosen - rejected, abs=1e-6)
                assert event[f"{prefix}logp_chosen"] < 0
                assert event[f"{prefix}kl"] >= 0
    assert any("KL" in line for line in place.told)
    report = (run.folder / "report.html").read_text()
    assert "Answers ranked right" in report
    assert "KL divergence" in report


@pytest.mark.parametrize("label", [True, False])
def test_validation_answers_may_be_of_one_kind(place: Place, label: bool):
    file = place.folder / "data" / "valid.jsonl"
    rows = [json.loads(line) | {"label": label} for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, rows)))
    run = place.run(**KTO, batch_size=1)
    assert run.finished
    present, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert run.losses(f"valid_rewards_{present}")
    assert not run.losses(f"valid_rewards_{absent}")
    assert not run.losses("valid_reward_margin")
    assert (run.folder / "report.html").exists()


def test_a_resumed_run_equals_the_undisturbed_one(place: Place):
    undisturbed = place.run("one", **KTO, grad_accumulation_steps=2)
    stopped = place.run("two", **KTO, grad_accumulation_steps=2, stop_at=3)
    assert stopped.outcome == "interrupted"
    resumed = place.run("two", **KTO, grad_accumulation_steps=2, resume=True)
    assert same(adapter_of(undisturbed), adapter_of(resumed))
    assert without_times(undisturbed.history) == without_times(resumed.history)


def test_a_resumed_run_compiles_the_steps_of_an_undisturbed_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    loops = keep_loops(monkeypatch)
    settings = {"compile": "on", "grad_accumulation_steps": 2, "iters": 5}
    undisturbed = place.run("one", **KTO | settings)
    place.run("two", **KTO | settings, stop_at=3)
    resumed = place.run("two", **KTO | settings, resume=True)
    assert compiled_choices(loops[0]) == compiled_choices(loops[-1])
    functions = {number for number, _ in loops[0].traces._kept}
    assert len(functions) == 2, "the gradients and z0 share the traces; the update has its own"
    assert loops[0].traces.most == MAX_TRACES - 1
    assert same(adapter_of(undisturbed), adapter_of(resumed))


def test_small_batches_that_accumulate_equal_one_large_batch(place: Place):
    # The second step has a KL estimate above zero, which all batches of a step share.
    settings = {"objective": "kto", "dropout": 0.0, "iters": 3, "warmup": 0, "optimizer": "sgd"}
    settings |= {"max_grad_norm": 0.0, "learning_rate": 20.0, "schedule": "constant"}
    one = place.run("one", batch_size=24, **settings)
    many = place.run("many", batch_size=6, grad_accumulation_steps=4, **settings)
    assert max(kl for _, kl in one.losses("kl")) > 1e-3
    assert nearly_same(adapter_of(one), adapter_of(many))
    for name in ("loss", "kl", "rewards_chosen", "reward_margin", "logp_rejected"):
        for (_, value), (_, other) in zip(one.losses(name), many.losses(name), strict=True):
            assert value == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": "dora"},
        {"adapter": "vera", "learning_rate": None},
        {"adapter": "full", "learning_rate": 1e-4},
        {"init": "pissa"},
        {"lr_ratio": 16},
        {"target_modules": ["q_proj", "lm_head"]},
        {"grad_checkpoint": "on"},
        {"compile": "on"},
        {"patience": 1},
    ],
    ids=str,
)
def test_other_settings_work(place: Place, settings: dict[str, Any]):
    if settings.get("adapter") == "full":
        settings = settings | {"dropout": 0.0}
    run = place.run(**KTO | settings)
    assert run.finished
    # pissa changes the base slightly.
    assert run.losses("valid_loss")[0][1] == pytest.approx(0.5, rel=1e-2)
    assert run.losses("valid_loss")[-1][1] < run.losses("valid_loss")[0][1]


def test_a_checkpointed_or_compiled_run_is_the_same(place: Place):
    shared = {"objective": "kto", "iters": 4, "optimizer": "sgd", "dropout": 0.0}
    shared |= {"learning_rate": 5.0, "max_grad_norm": 0.0}
    plain = place.run("plain", **shared)
    for name, settings in {"on": {"grad_checkpoint": "on"}, "c": {"compile": "on"}}.items():
        assert nearly_same(adapter_of(plain), adapter_of(place.run(name, **shared, **settings)))


def test_a_quantized_base_works(place: Place):
    model, tokenizer = ml.load(str(place.folder / "model"))
    nn.quantize(model, group_size=32, bits=4)
    run = ml.finetune(
        model, tokenizer, data=str(place.folder / "data"), objective="kto", iters=6, batch_size=4,
        learning_rate=3e-3, adapter_path=str(place.folder / "run"),
    )  # fmt: skip
    assert run.losses("valid_loss")[-1][1] < run.losses("valid_loss")[0][1]


def test_the_reference_may_be_the_adapter_at_the_start(place: Place):
    place.run("before", **KTO)
    settings = KTO | {"iters": 2, "resume_adapter_file": str(place.folder / "before")}
    base = place.run("base", **settings)
    start = place.run("start", **settings, reference="start")
    assert base.losses("valid_reward_margin")[0][1] > 1e-3
    assert start.losses("valid_reward_margin")[0][1] == pytest.approx(0, abs=1e-5)


# The formula and the settings


def test_the_loss_is_that_of_the_paper():
    objective = ObjectiveConfig(objective="kto", beta=0.5, kto_weights=(2.0, 3.0))
    ratios, labels, baseline = mx.array([1.0, 1.0]), mx.array([1.0, 0.0]), mx.array(0.4)
    losses, rewards = labeled_losses(objective, ratios, labels, baseline)
    distance = 0.5 * (1.0 - 0.4)
    expected = [2 * (1 - 1 / (1 + np.exp(-distance))), 3 * (1 - 1 / (1 + np.exp(distance)))]
    assert losses.tolist() == pytest.approx(expected)
    assert rewards.tolist() == [0.5, 0.5]


def test_means_over_no_answers_are_left_out():
    found = describe_labeled([3.0, 0.0, 2.0, -6.0, 0.0, 3.0, 0.3], 3)
    assert found == pytest.approx(
        {"rewards_chosen": 1.0, "reward_accuracy": 2 / 3, "logp_chosen": -2.0, "kl": 0.1}
    )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kto_weights": (1, 2)}, "kto_weights is for objective kto, not sft"),
        ({"objective": "kto", "label_smoothing": 0.1}, "label_smoothing is for objective dpo"),
        ({"objective": "kto", "kto_weights": (0, 1)}, "kto_weights"),
        ({"objective": "kto", "kto_weights": (1,)}, "kto_weights"),
        ({"objective": "kto", "pack": True}, "pack is for objective sft, not kto"),
        ({"objective": "kto", "data_weights": [1]}, "data_weights is for objective sft"),
    ],
)
def test_settings_that_do_not_fit_are_refused(place: Place, settings: dict, problem: str):
    with pytest.raises(ConfigError, match=problem):
        place.run(**settings)


def test_the_weights_change_the_run(place: Place):
    one = place.run("one", **KTO, iters=2)
    other = place.run("other", **KTO, iters=2, kto_weights=[1, 4])
    assert not same(adapter_of(one), adapter_of(other))
    assert other.losses("valid_loss")[0][1] == pytest.approx(1.25, abs=1e-3)


# After training


def test_evaluate_compares_with_the_base(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = place.run(**KTO | {"learning_rate": 1e-2}, iters=12)
    data = {"data": str(place.folder / "data"), "objective": "kto"}
    model, tokenizer = ml.load(str(place.folder / "model"))
    base = ml.evaluate(model, tokenizer, **data, split="train")
    model, tokenizer = ml.load(str(place.folder / "model"), adapter_path=str(run.folder))
    tuned = ml.evaluate(model, tokenizer, **data, split="train", base=base)
    assert base.preferred is not None
    assert tuned.preferred is not None
    assert tuned.preferred > base.preferred
    assert tuned.examples == 24

    # Only desirable answers are expected.
    assert tuned.answers
    assert all(answer.expected.replace(" ", "").isdigit() for answer in tuned.answers)

    # The command takes the objective from the run.
    monkeypatch.setenv("COLUMNS", "200")
    main(["--adapter-path", str(run.folder), "--test"])
    assert "chosen answers preferred" in capsys.readouterr().out


def test_the_dry_run_shows_the_labels(place: Place, capsys: pytest.CaptureFixture[str]):
    words = ["--model", str(place.folder / "model"), "--data", str(place.folder / "data")]
    main([*words, "--objective", "kto", "--dry-run", "--adapter-path", str(place.folder / "run")])
    shown = capsys.readouterr().out
    for text in ("formats: 12 desirable, 12 undesirable", "steps of 8 examples", "12 undesirable"):
        assert text in shown, shown
