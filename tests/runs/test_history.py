"""What a run keeps, and what reads it again."""

import json
import math
from pathlib import Path

import pytest
import yaml

import mlx_loraplus as ml
from mlx_loraplus.config import OLD_NAMES
from mlx_loraplus.runs.history import SCHEMA, encode_history, read_history
from tests.training.tiny_runs import Place

REPORT = {
    "step", "loss", "grad_norm", "supervised_tokens", "useful_tokens", "padding", "seconds", "tokens_per_second",
    "peak_memory_gb", "active_memory_gb", "cache_memory_gb", "rate_a", "rate_b", "shapes", "norm_a", "norm_b",
    "norm_change",
}  # fmt: skip


def test_the_schema_is_as_it_was(folder: Path):
    events = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    start, *between, end = events
    assert set(start) == {
        "step", "schema", "steps", "model", "versions", "train", "valid", "adapter", "memory", "modules", "probes",
        "prompts", "choices", "started", "answer_tokens", "batch_rows",
    }  # fmt: skip
    assert start["schema"] == SCHEMA == 2, "a new schema is a deliberate line in a diff"
    assert start["train"]["examples"] == 40
    assert set(start["versions"]) == {"mlx_loraplus", "mlx", "mlx-lm"}
    assert set(end) == {
        "step", "outcome", "best_step", "best_loss", "seconds", "valid_before", "valid_after", "trend", "minutes",
        "mean_tokens_per_second",
    }  # fmt: skip
    assert {frozenset(event) for event in between} == {
        frozenset(REPORT),
        frozenset(
            {"step", "valid_loss", "valid_accuracy", "valid_seconds", "answers", "answer_seconds"}
        ),
    }
    reports = [event for event in between if "loss" in event]
    assert len(reports[0]["norm_a"]) == len(start["modules"]) == 14
    assert reports[-1]["norm_b"][0] > reports[0]["norm_b"][0] > 0


def test_a_folder_is_read_again(folder: Path):
    run = ml.Run.load(folder)
    assert run.finished
    assert run.steps == run.progress.step == 6
    assert run.config.prompts == ("<b>2 + 2</b> =",)
    best = min(run.losses("valid_loss")[1:], key=lambda point: point[1])
    assert run.history[-1]["best_step"] == best[0]
    assert repr(run).startswith(f"{folder}: finished, step 6 of 6, loss ")
    tokens = [event["useful_tokens"] for event in run.history if "loss" in event]
    assert run.spent([0, 2, 6], "useful_tokens") == pytest.approx([0, sum(tokens[:2]), sum(tokens)])


def test_answers_to_fixed_prompts_are_kept(folder: Path):
    run = ml.Run.load(folder)
    prompts, answers = run.start["prompts"], run.losses("answers")
    assert [step for step, _ in answers] == [0, 2, 4, 6]
    assert all(len(given) == len(prompts) == 4 for _, given in answers)
    assert prompts[-1] == {"prompt": "<b>2 + 2</b> =", "expected": None}
    for prompt in prompts[:3]:
        asked, wanted = (
            prompt[name].replace(" ", "") for name in ("prompt", "expected")
        )  # a token is a character
        first, second = asked.removesuffix("=").removeprefix("<s>").split("+")
        assert int(first) + int(second) == int(wanted)


def test_tables_of_pandas(folder: Path):
    run = ml.Run.load(folder)
    frame = run.to_dataframe()
    assert list(frame.index) == [0, 1, 2, 3, 4, 5, 6]
    assert frame["valid_loss"].dropna().index.tolist() == [0, 2, 4, 6]
    assert frame.loc[6, "loss"] == run.losses()[-1][1]
    assert math.isnan(frame.loc[0, "loss"])
    assert list(run.prompts().columns) == [
        "prompt",
        "expected",
        "step 0",
        "step 2",
        "step 4",
        "step 6",
    ]


def test_a_run_that_was_stopped_goes_on_in_one_history(place: Place):
    stopped = place.run("stopped", stop_at=3)
    assert stopped.outcome == ml.Run.load(stopped.folder).outcome == "interrupted"
    history = place.run("stopped", resume=True, iters=7).history
    assert history[0]["steps"] == 7
    assert [("schema" in event, "outcome" in event) for event in history].count((True, False)) == 1
    assert [event["outcome"] for event in history if "outcome" in event] == ["finished"]


def test_prompts_need_validations(place: Place):
    data = str(place.folder / "data" / "train.jsonl")
    with pytest.raises(ml.ConfigError, match="prompts are answered at validations"):
        place.run("none", data=data, valid_split=0, prompts=["hi"])
    assert not (place.folder / "none").exists()


def test_a_loss_that_is_no_number_is_null_in_json(folder: Path, tmp_path: Path):
    event = {"step": 7, "valid_loss": math.nan, "valid_accuracy": 0.0, "valid_seconds": 1.0}
    (tmp_path / "history.jsonl").write_bytes(encode_history([*ml.Run.load(folder).history, event]))
    last = (tmp_path / "history.jsonl").read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["valid_loss"] is None
    assert math.isnan(read_history(tmp_path)[-1]["valid_loss"])


def test_a_start_that_lacks_something_is_told_in_a_line(folder: Path, tmp_path: Path):
    (tmp_path / "run.yaml").write_text((folder / "run.yaml").read_text())
    (tmp_path / "history.jsonl").write_text('{"step": 0, "schema": 1, "steps": 3}\n')
    with pytest.raises(
        ml.OutputError, match=r"history.jsonl:1 is not the start of a run: it has no adapter$"
    ):
        ml.Run.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            '"valid_loss": ',
            '"valid_loss": "low", "was": ',
            "2 is not an event: its valid_loss is 'low'$",
        ),
        ('"loss": ', '"loss": [1], "was": ', r"3 is not an event: its loss is \[1\]$"),
        ('"useful_tokens": ', '"tokens": ', "3 is not an event: it has no useful_tokens$"),
        ('"weights_gb": ', '"weights": ', "1 is not the start of a run: it has no weights_gb$"),
        ('"train": {', '"train": 5, "was": {', "1 is not the start of a run: its train is 5$"),
        (
            '"examples": ',
            '"examples": "many", "was": ',
            "1 is not the start of a run: its examples is 'many'$",
        ),
    ],
)
def test_what_no_number_is_but_should_be_is_told_in_a_line(
    folder: Path, tmp_path: Path, old: str, new: str, told: str
):
    (tmp_path / "run.yaml").write_text((folder / "run.yaml").read_text())
    (tmp_path / "history.jsonl").write_text(
        (folder / "history.jsonl").read_text().replace(old, new)
    )
    with pytest.raises(ml.OutputError, match=f"history.jsonl:{told}") as error:
        ml.compare_runs(folder, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "can't be read: No such file"),
        ("", "is empty"),
        ('{"step": 1, "loss": 2}\n', "1 has schema 'none', not 2"),
        ('{"step": 0, "schema": 2}\n{"step": 0, "schema": 3}\n', "2 has schema 3, not 2"),
        ('{"step": 0, "schema": 1}\nnot json\n', "2 is not an event"),
        ('{"step": 0, "schema": 2}\n[1]\n', "2 is not an event"),
        ('{"step": 0, "schema": 1, "steps": 3}\n', "it has no run.yaml; give a run's folder"),
    ],
)
def test_what_is_no_run_is_told_in_a_line(tmp_path: Path, text: str | None, told: str):
    if text is not None:
        (tmp_path / "history.jsonl").write_text(text)
    with pytest.raises(ml.OutputError, match=told) as error:
        ml.Run.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_of_the_first_version_is_read(folder: Path, tmp_path: Path):
    """Its history counts updates, and its settings have their old names."""
    old = {"step": "update", "steps": "updates", "best_step": "best_update"}
    lines: list[str] = []
    for line in (folder / "history.jsonl").read_text().splitlines():
        event = {old.get(key, key): value for key, value in json.loads(line).items()}
        if "schema" in event:
            event["schema"] = 1
            event["prompts"] = [
                {"prompt": each["prompt"], "wanted": each["expected"]} for each in event["prompts"]
            ]
        lines.append(json.dumps(event))
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + "\n")
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    for name, now in OLD_NAMES.items():
        if now in settings:
            settings[name] = settings.pop(now)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))

    then, now = ml.Run.load(tmp_path), ml.Run.load(folder)
    assert then.losses("valid_loss") == now.losses("valid_loss")
    assert (then.steps, then.progress.best_step) == (now.steps, now.progress.best_step)
    assert then.prompts().equals(now.prompts())
    assert then.config.sample_rows == now.config.sample_rows
