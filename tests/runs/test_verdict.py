"""The verdict at the end of a run, and the advice that follows from it."""

import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mlx_loraplus as ml
from mlx_loraplus import cli
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.runs.advice import give_advice
from mlx_loraplus.runs.next_steps import closing, next_commands
from mlx_loraplus.runs.state import Progress
from mlx_loraplus.runs.verdict import divergence, duration, perplexity, ranked_by_reward, verdict_of
from mlx_loraplus.settings import configure, fit_to_length
from tests.training.tiny_runs import Place


def run_with(losses: list[float], step: int = 10, **settings: Any) -> ml.Run:
    """Return an ended run with these validation losses, ``step`` apart, the first before training."""
    history: list[dict[str, Any]] = [
        {"step": step * number, "valid_loss": loss, "valid_seconds": 30.0}
        for number, loss in enumerate(losses)
    ]
    last = max(0, step * (len(losses) - 1))
    best = min(losses[1:], default=None)
    history.append({"step": last, "outcome": "finished", "best_step": None, "best_loss": best})
    config = configure(TrainConfig, {"adapter_path": "my run", "iters": last or 1, **settings})
    return ml.Run(config, history, Progress(last), last)


def advised(run: ml.Run) -> str | None:
    """Return the text of the advice, if there is any."""
    advice = give_advice(run, run.verdict)
    return advice and advice.text


@pytest.mark.parametrize(
    ("losses", "trend", "words"),
    [
        ([3.0, 2.0, 1.5, 1.2], "still falling", "still falling: train longer"),
        ([3.0, 2.0, 1.51, 1.5], "levelled off", "more steps would change little"),
        ([2.0, 0.13, 0.12, 0.05], "still falling", "still falling: train longer"),
        ([2.0, 0.1, 0.013, 0.001], "levelled off", "more steps would change little"),
        ([3.0, 1.5, 1.0, 1.4], "overfitting", "since step 20, whose adapter is kept"),
        ([3.0, 1.5, 1.0, 1.005], "levelled off", "levelled off"),
        ([1.0, 1.5, 1.2], "not better", "lower --learning-rate, such as 1.3e-04"),
        ([3.0, 1.0], None, "too few steps to say whether the loss has levelled off"),
        ([3.0, 1.001, 1.0], None, "too few steps to say whether the loss has levelled off"),
        ([3.0, 1.0, 1.4], None, "risen since step 10, whose adapter is kept; too few steps to say whether it overfits: train longer, or"),
    ],
)  # fmt: skip
def test_the_trend_and_its_advice(losses: list[float], trend: str | None, words: str):
    run = run_with(losses)
    found = verdict_of(run)
    assert found.trend == trend
    assert words in (advised(run) or "")
    longer = f"longer:  mlx_loraplus.train -c 'my run/run.yaml' --resume --iters {2 * run.steps}"
    assert (longer in closing(run)) == (trend in ("still falling", None))
    assert f"{losses[0]:.4f} -> {min(losses[1:]):.4f}" in found.summary()[0]
    assert found.minutes == len(losses) / 2
    assert json.dumps(found.stored(), allow_nan=False)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([3.0, 2.0, math.nan, math.nan], "not been a number since step 20 (the adapter of step 10 is kept)"),
        ([3.0, math.nan], "not been a number since step 10: train from the start with a lower"),
        ([math.nan, math.nan], "not a number even before training: check the model's answers"),
    ],
)  # fmt: skip
def test_a_validation_that_is_not_a_number_is_in_the_verdict(losses: list[float], words: str):
    run = run_with(losses)
    found = verdict_of(run)
    assert found.trend == "diverged"
    assert words in (advised(run) or "")
    assert json.dumps(found.stored(), allow_nan=False)


@pytest.mark.parametrize(
    ("losses", "diverged"), [([3.0], True), ([3.0, 3.1], True), ([3.0, 2.0], False)]
)
def test_skipped_steps_that_ended_a_run_that_was_not_better(losses: list[float], diverged: bool):
    run = run_with(losses, learning_rate=10.0)
    run.progress.step = step = run.history[-1]["step"] + 17
    run.progress.skipped = run.progress.skipped_in_a_row = 5
    skips = [{"step": step, "skipped": 5, "reason": "loss nan"}]
    end = {"step": step, "outcome": "failed", "reason": "5 steps in a row were not finite"}
    run.history = [*run.history[:-1], *skips, end]
    found = verdict_of(run)
    assert (found.trend == "diverged") == diverged
    lower = "train from the start with a lower --learning-rate, such as 5.0e-04"
    assert advised(run) == (lower if diverged else None)
    commands = [label for label, _ in next_commands(run)]
    assert commands == [("again" if diverged else "resume")], "no adapter is worth a try"
    assert "because the loss or a gradient was not finite" in divergence(run)


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.0, "7.0 seconds"), (90.0, "1.5 minutes"), (7200.0, "2.0 hours")]
)
def test_a_duration_is_in_a_unit_that_suits_it(seconds: float, text: str):
    assert duration(seconds) == text


def test_a_perplexity_has_one_format():
    texts = [perplexity(loss) for loss in (0.0, 1.0, 5.5, 10.0, 30.0)]
    assert texts == ["1", "2.72", "245", "22,026", "very large"]


@pytest.mark.parametrize(
    ("settings", "is_advised"),
    [({"objective": "dpo"}, True), ({"objective": "kto"}, True), ({"adapter": "full"}, False)],
)
def test_a_sweep_is_advised_where_it_works(settings: dict[str, str], is_advised: bool):
    words = advised(run_with([1.0, 1.5, 1.2], **settings)) or ""
    assert "no validation was better" in words
    assert ("(mlx_loraplus.sweep finds a rate)" in words) is is_advised


def run_of_preferences(objective: str, ranked: list[float], logps: list[float]) -> ml.Run:
    """Return a run whose loss still falls, with these shares and log-probabilities.

    The last log-probability holds for the rest of the run.
    """
    run = run_with([0.7, 0.6, 0.5, 0.4], objective=objective)
    shares = dict(zip((0, 10, 20, 30), ranked, strict=True))
    for event in run.history[:-1]:
        share = shares[event["step"]]
        event["valid_preferred" if objective == "dpo" else "valid_reward_accuracy"] = share
        event["valid_logp_chosen"] = logps[min(event["step"] // 10, len(logps) - 1)]
        event["valid_reward_margin"] = event["step"] / 10
    return run


@pytest.mark.parametrize(
    ("objective", "ranked", "logps", "words"),
    [
        ("dpo", [0.6, 0.6, 0.5, 0.45], [-9.0, -9.0], "fewer validation pairs are ranked right than before training (60% -> 45%)"),
        ("dpo", [0.1, 0.2, 0.3, 0.4], [-9.0, -9.0], "only 40% of the validation pairs are ranked right"),
        ("kto", [0.1, 0.5, 0.5, 0.5], [-9.0, -9.0], "only 50% of the validation answers are ranked right"),
        ("dpo", [0.6, 0.7, 0.8, 0.9], [-9.0, -20.0], "less likely than before training (log-probability -9.0 -> -20.0)"),
        ("dpo", [0.6, 0.7, 0.8, 0.9], [-9.0, -1.0, -4.0], "less likely than at step 10 (log-probability -1.0 -> -4.0)"),
        ("dpo", [0.6, 0.7, 0.8, 0.9], [-9.0, -1.0, -1.5], "the validation loss is still falling"),
        ("dpo", [0.6, 0.7, 0.8, 0.9], [-9.0, -9.0], "the validation loss is still falling"),
        ("dpo", [0.6, 0.7, 0.8, 0.9], [-0.0118, -0.0130], "the validation loss is still falling"),
    ],
)  # fmt: skip
def test_preferences_are_judged_by_the_ranking(
    objective: str, ranked: list[float], logps: list[float], words: str
):
    run = run_of_preferences(objective, ranked, logps)
    assert words in (advised(run) or "")
    labels = [label for label, _ in next_commands(run)]
    assert ("longer" in labels) == ("less likely" not in words), "more steps make a fall worse"


def test_labeled_answers_are_ranked_by_chance_before_training():
    """All rewards are zero up to rounding, so the recorded share means nothing."""
    run = run_of_preferences("kto", [0.1, 0.7, 0.8, 0.9], [-9.0, -9.0])
    assert run.verdict.ranked == (0.5, 0.9)
    assert "answers ranked right 50% -> 90%" in run.verdict.summary()[0]
    assert ranked_by_reward(run)[0] == (0, 0.5)

    # A run that starts from another adapter than its reference has ranked already.
    run.config = replace(run.config, resume_adapter_file="other")
    assert run.verdict.ranked == (0.1, 0.9)


def test_few_validations_of_a_long_run_are_too_few():
    run = run_with([3.0, 1.001, 1.0], step=100)
    assert run.verdict.trend is None
    assert "lower --steps-per-eval" in (advised(run) or "")
    assert run_with([3.0, 1.002, 1.001, 1.0], step=100).verdict.trend == "levelled off"
    risen = run_with([3.0, 1.0, 1.4], step=100)
    assert risen.verdict.trend is None
    told = advised(risen) or ""
    assert "risen since step 100" in told
    assert "whether it overfits: lower --steps-per-eval" in told
    assert run_with([3.0, 1.002, 1.001, 1.0], step=2).verdict.trend is None


def test_a_run_that_recovers_has_not_diverged():
    assert verdict_of(run_with([3.0, math.nan, 2.0, 1.0])).trend == "still falling"


def test_a_run_in_epochs_is_made_longer_in_epochs():
    run = run_with([3.0, 2.0, 1.0], iters=None, epochs=1.5)
    (line,) = [line for line in closing(run) if line.startswith("longer: ")]
    assert line.endswith("--resume --epochs 3")


def test_without_validation_it_says_what_is_unknown():
    run = run_with([])
    assert run.verdict.trend is None
    assert "unknown whether training helps on other data" in (advised(run) or "")
    assert run_with([math.nan, math.nan]).verdict.after is None


def test_the_advice_to_train_longer_works(place: Place):
    run = place.run(
        "longer", steps_per_eval=2, learning_rate=1e-4, schedule="constant", dropout=0.0
    )
    assert run.verdict.trend == "still falling"
    (line,) = [line for line in place.told if line.startswith("longer: ")]
    command = shlex.split(line.removeprefix("longer: "))
    assert command[0] == "mlx_loraplus.train"
    cli.train(command[1:])
    assert ml.Run.load(run.folder).progress.step == 12


def test_what_a_run_tells_at_its_end(place: Place):
    run = place.run("told", sample_rows=3)
    end = run.history[-1]
    losses = [loss for _, loss in run.losses("valid_loss")]
    assert end["valid_before"] == losses[0]
    assert end["valid_after"] == min(losses[1:])
    assert end["minutes"] > 0
    assert end["mean_tokens_per_second"] > 0
    assert any(line.startswith("exact sample answers 0 of 3 -> ") for line in closing(run))
    assert closing(run)[-2:] == [
        f"try it:  mlx_loraplus.chat {run.folder}",
        f"fuse it: mlx_loraplus.fuse {run.folder}",
    ]


def test_a_run_that_got_worse_says_so(place: Place):
    shutil.copytree(place.folder / "data", place.folder / "unlike")
    row = json.dumps({"prompt": "1 + 1 =", "completion": "~~~~~"}) + "\n"
    (place.folder / "unlike" / "valid.jsonl").write_text(row * 4)
    settings = {"data": str(place.folder / "unlike"), "steps_per_eval": 10}
    place.run("worse", learning_rate=0.02, schedule="constant", iters=10, **settings)
    assert place.told_with("no validation was better than before training")


def test_defaults_fit_the_length(place: Place):
    def fitted(steps: int, **settings: Any) -> tuple[int | None, ...]:
        config = fit_to_length(configure(TrainConfig, settings), steps)
        return config.optimizer.warmup, config.steps_per_report, config.steps_per_eval

    assert fitted(5) == (0, 1, 1)
    assert fitted(45) == (4, 1, 9)
    assert fitted(300) == (10, 10, 60)
    assert fitted(5000) == (10, 10, 200)
    assert fitted(5, warmup=3, steps_per_report=2, steps_per_eval=4) == (3, 2, 4)

    # What was used is stored, and a longer run keeps it.
    unset = dict.fromkeys(("warmup", "steps_per_report", "steps_per_eval"))
    run = place.run("fitted", iters=20, **unset)
    assert (run.config.optimizer.warmup, run.config.steps_per_eval) == (2, 4)
    again = place.run("fitted", iters=60, resume=True, stop_at=24, **unset)
    stored = ml.Run.load(run.folder).config
    assert (stored.optimizer.warmup, stored.steps_per_report, stored.steps_per_eval) == (2, 1, 4)
    assert again.history[-1]["step"] == 24


def test_the_first_step_is_reported_at_once_with_the_time_left(place: Place):
    place.run("first", iters=12, steps_per_report=10)
    reported = [line for line in place.told if line.startswith("step") and "rates" in line]
    assert [line.split("/")[0].split()[-1] for line in reported] == ["1", "10", "12"]
    assert reported[0].endswith(" left")
    assert not reported[-1].endswith(" left")


def test_a_base_that_was_loaded_elsewhere_has_to_be_named():
    run = run_with([3.0, 2.0], model="a llama model loaded elsewhere")
    assert closing(run)[-1].endswith(f"'{Path('my run')}' --model MODEL")
