"""Two small runs that are looked at in every way."""

from pathlib import Path

import pytest

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
