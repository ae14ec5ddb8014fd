"""Two small runs that are looked at in every way."""

from pathlib import Path

import pytest

import mlx_loraplus as ml
from scripts.tiny_model import write_sums, write_tiny_model
from tests.training.tiny_runs import Place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A tiny model and data, and on them the finished runs "plus" (ratio 4) and "plain" (ratio 1)."""
    place = Place(tmp_path_factory.mktemp("seen"))
    write_tiny_model(place.folder / "model")
    write_sums(place.folder / "data")
    place.run("plain", lr_ratio=1, sample_rows=3)
    place.run("plus", prompts=["<b>2 + 2</b> ="], sample_rows=3)
    return place


@pytest.fixture
def folder(place: Place) -> Path:
    """The run "plus"."""
    return place.folder / "plus"


def with_answers(run: ml.Run, right: dict[int, int], count: int = 6) -> ml.Run:
    """Give a run ``count`` prompts, of which ``right[step]`` have the expected answers at a step."""
    run.start["prompts"] = [{"prompt": f"{n} + 1 =", "expected": f"{n + 1}"} for n in range(count)]
    for event in run.history:
        if "valid_loss" in event:
            exact = right.get(event["step"], right[max(right)])
            event["answers"] = [f"{n + 1}" if n < exact else "no" for n in range(count)]
    return run


def with_losses(run: ml.Run, losses: dict[int, float]) -> ml.Run:
    for event in run.history:
        if "valid_loss" in event:
            event["valid_loss"] = losses[event["step"]]
    return run
