"""Runs on rows from Python: they resume to the bit, and other commands find their data."""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import yaml

from mlx_loraplus.train import main
from tests.conftest import same
from tests.training.tiny_runs import Place, adapter_of, without_times

ROWS = [
    {"prompt": f"{a} + {b} =", "completion": f" {a + b}."} for a in range(1, 9) for b in range(1, 5)
]
VALID = ROWS[:4]
KINDS: dict[str, Callable[[], Any]] = {
    "generators": lambda: {"train": iter(ROWS), "valid": (row for row in VALID)},
    "frames": lambda: {"train": pd.DataFrame(ROWS), "valid": pd.DataFrame(VALID)},
    "datasets": lambda: datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(ROWS),
            "validation": datasets.Dataset.from_list(VALID),
        }
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_resumes_to_the_bit(kind: str, place: Place):
    whole = place.run("whole", data=KINDS[kind]())
    place.run("cut", data=KINDS[kind](), stop_at=3)
    cut = place.run("cut", data=KINDS[kind](), resume=True)
    assert same(adapter_of(whole), adapter_of(cut))
    assert without_times(whole.history)[-1] == without_times(cut.history)[-1]


def test_the_command_line_resumes_it_too(place: Place):
    whole = place.run("whole", data=ROWS, steps_per_eval=100)
    cut = place.run("cut", data=iter(ROWS), steps_per_eval=100, stop_at=3)
    main(["-c", str(cut.folder / "run.yaml"), "--resume"])
    assert same(adapter_of(whole), adapter_of(ml.Run.load(cut.folder)))


def test_other_rows_are_refused(place: Place):
    place.run("cut", data=ROWS, stop_at=3)
    with pytest.raises(ml.ConfigError, match=r"can't resume from .*: the rows of data"):
        place.run("cut", data=[*ROWS[1:], ROWS[0]], resume=True)


def test_the_run_names_where_its_data_is(place: Place):
    run = place.run(data=ROWS)
    (name,) = yaml.safe_load((run.folder / "run.yaml").read_text())["data"]
    assert Path(name).name.startswith("32-rows-")
    assert place.told_with("train: 29 rows")


def test_rows_are_evaluated_and_swept(place: Place):
    model, tokenizer = ml.load(str(place.folder / "model"))
    assert ml.evaluate(model, tokenizer, split="test", data={"test": VALID}).examples == 4
    with pytest.raises(
        ml.DataError,
        match=r"Python has no test rows: give data={\"test\": rows}, because rows without a split",
    ):
        ml.evaluate(model, tokenizer, split="test", data=ROWS)

    found = ml.sweep_rates(
        model,
        tokenizer,
        data=pd.DataFrame(ROWS),
        valid_split=0.2,
        learning_rates=(1e-3,),
        lr_ratios=(1, 4),
        iters=2,
        rounds=1,
        seeds=1,
        batch_size=4,
        adapter_path=str(place.folder / "sweep"),
    )
    assert len(found.trials) == 3


def test_a_plan_does_not_read_rows():
    rows = iter(ROWS)
    ml.plan_memory("gemma-3-1b", memory="16GB", data=rows, data_weights=(0.5,))
    assert len(list(rows)) == len(ROWS)
