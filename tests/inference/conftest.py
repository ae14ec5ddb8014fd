"""A finished run on a tiny model."""

from pathlib import Path

import pytest

from tests.training.tiny_runs import Place


@pytest.fixture
def folder(place: Place) -> Path:
    """The adapter of a short run."""
    place.run("run")
    return place.folder / "run"
