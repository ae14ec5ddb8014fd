"""Runs whose steps are skipped because they are not finite: how they end, and what is advised."""

import json
import re
from typing import Any

import pytest

import mlx_loraplus as ml
from mlx_loraplus import cli
from mlx_loraplus.runs.next_steps import closing, next_commands
from mlx_loraplus.runs.report_headline import headline
from mlx_loraplus.runs.state import Progress, progress_of
from tests.training.tiny_runs import Place, poison

PATIENT = {"max_skipped_steps": 100, "warmup": 0}


def labels(run: ml.Run) -> list[str]:
    return [label for label, _ in next_commands(run)]


def words(place: Place, *more: str) -> list[str]:
    folders = {"--model": "model", "--data": "data", "--adapter-path": "run"}
    given = [word for flag, name in folders.items() for word in (flag, str(place.folder / name))]
    return [*given, "--batch-size", "4", "--max-seq-length", "32", *more]


def test_a_run_that_skips_most_steps_fails(place: Place, capsys: pytest.CaptureFixture[str]):
    """Its adapter is of no use, and a resume would skip as many again."""
    poison(place, *range(30))
    settings = ["--iters", "10", "--max-skipped-steps", "100", "--sample-rows", "0"]
    with pytest.raises(SystemExit, match="2"):
        cli.train(words(place, *settings))
    said, error = capsys.readouterr()
    run = ml.Run.load(place.folder / "run")
    assert 5 < run.progress.skipped < 10
    assert run.progress.mostly_skipped
    skipped = f"{run.progress.skipped} of 10 steps were skipped because the loss or a gradient was"
    assert error.startswith(f"error: {skipped} not finite; steps between them were finite, so no")
    assert "correct or remove their rows" in error
    assert "resume" not in error

    # Nothing offers the adapter, or says that the run is finished.
    assert "failed at step 10" in said
    assert not re.search("^(finished|try it|fuse it|resume|longer|again)", said, re.MULTILINE)
    assert (run.outcome, labels(run)) == ("failed", [])
    assert "correct or remove their rows" in headline(run).next_step

    # The file that the message names has the rows of the last skipped step.
    bad = json.loads((run.folder / "not_finite.json").read_text())
    assert str(run.folder / "not_finite.json") in error
    assert bad["step"] == [event["step"] for event in run.history if "skipped" in event][-1]
    assert bad["batches"][0]["rows"][0].startswith("train.jsonl:")


def test_a_run_that_ends_with_an_adapter_that_gives_no_numbers_fails(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    """The step itself was finite, so nothing was skipped."""
    settings = ["--iters", "1", "--warmup", "0", "--learning-rate", "1e30"]
    with pytest.raises(SystemExit, match="2"):
        cli.train(words(place, *settings))
    said, error = capsys.readouterr()
    assert error.endswith(
        "error: the validation loss has not been a number since step 1; train from the start with"
        " a lower --learning-rate, such as 5.0e-04\n"
    )
    run = ml.Run.load(place.folder / "run")
    assert run.outcome == "failed"
    assert not re.search("^(finished|try it|fuse it|resume|longer)", said, re.MULTILINE)
    again = re.search("^again: +mlx_loraplus.train (.*)", said, re.MULTILINE)
    assert again is not None
    cli.train(again[1].split())


def test_a_rate_that_spoils_all_steps_from_one_on_is_to_be_lowered(place: Place):
    with pytest.raises(ml.LoRAPlusError) as error:
        place.run(iters=6, learning_rate=1e30, schedule="constant", **PATIENT)
    message = str(error.value)
    run = ml.Run.load(place.folder / "run")
    first = 7 - run.progress.skipped
    assert 1 < first <= 3
    assert f"every step from step {first} on was skipped, so train from the start" in message
    assert "a lower learning_rate or lr_ratio" in message
    assert labels(run) == ["again"]


def test_a_run_that_never_had_a_finite_step_is_not_cured_by_another_rate(place: Place):
    poison(place, *range(40))
    with pytest.raises(ml.LoRAPlusError, match="no step took effect: all 4 were") as error:
        place.run(iters=4, **PATIENT)
    for message in (str(error.value), headline(ml.Run.load(place.folder / "run")).next_step):
        assert "so no other rate helps: look at the rows" in message
        assert "other weights of the model" in message
    assert labels(ml.Run.load(place.folder / "run")) == []


def test_a_run_that_skips_a_few_steps_finishes_and_counts_them(place: Place):
    poison(place, 7)
    run = place.run(iters=10, **PATIENT)
    assert run.outcome == "finished"
    path = run.folder / "not_finite.json"
    assert (
        "1 of 10 steps was skipped because the loss or a gradient was not finite; the rows of the"
        f" last one are in {path}"
    ) in closing(run)
    assert "train.jsonl:8" in json.loads(path.read_text())["batches"][0]["rows"]
    assert "try it" in labels(run)


@pytest.mark.parametrize(("bad", "resumes"), [([7], True), (range(40), False)])
def test_a_resume_is_advised_only_if_single_batches_are_bad(place: Place, bad: Any, resumes: bool):
    poison(place, *bad)
    with pytest.raises(ml.LoRAPlusError, match="a step was not finite") as error:
        place.run(iters=20, max_skipped_steps=1)
    assert ("resume=True" in str(error.value)) == resumes
    if resumes:
        assert ml.Run.load(place.folder / "run").progress.step > 1


@pytest.mark.parametrize(
    ("skipped", "step", "expected"),
    [
        ([], 4, (False, False)),
        ([2], 2, (False, True)),
        ([3, 4], 4, (False, True)),
        ([2, 3, 4], 4, (True, True)),
        ([1, 2, 3], 4, (True, False)),
        ([1, 2], 2, (True, False)),
        ([2, 4, 5], 5, (True, False)),
    ],
)
def test_when_a_run_has_failed_and_when_its_rate_is_the_reason(
    skipped: list[int], step: int, expected: tuple[bool, bool]
):
    history = [{"step": number, "skipped": count} for count, number in enumerate(skipped, 1)]
    progress = progress_of([{"step": 0}, *history, {"step": step, "outcome": "failed"}])
    assert (progress.mostly_skipped, progress.suspects_rate) == expected
    assert progress.took_effect == (len(skipped) < step)
    assert Progress().took_effect
    assert not Progress().mostly_skipped


# Dry runs


def test_a_dry_run_refuses_what_would_skip_all_steps(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    poison(place, *range(40))
    for more, first in (
        ([], "the first 5 steps"),
        (["--iters", "2"], "the first 2 steps"),
        (["--max-skipped-steps", "1"], "the first step"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.train(words(place, *more, "--dry-run"))
        said = capsys.readouterr().out
        assert "to start:" not in said
        stop = said.splitlines()[-1]
        assert stop.startswith(f"training would stop: {first} would be skipped, because the loss")
        assert "(loss nan, gradient norm nan)" in stop
        assert re.search(r"look at its rows \(train.jsonl:\d+, ", stop)
    assert not (place.folder / "run").exists()


def test_a_dry_run_warns_of_a_first_step_that_is_skipped(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    """Rows of equal length share batches, so that each batch is bad or good."""
    poison(place, *range(20))
    warned = 0
    for seed in range(4):
        cli.train(words(place, "--iters", "6", "--seed", str(seed), "--dry-run"))
        said = capsys.readouterr().out
        assert "to start:" in said
        warned += "warning: the first step would be skipped, because the loss" in said
    assert 0 < warned < 4
