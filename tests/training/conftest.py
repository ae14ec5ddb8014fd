"""A place for whole runs."""

from pathlib import Path

import pytest

from scripts.tiny_model import write_sums, write_tiny_model
from tests.training.tiny_runs import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    write_tiny_model(tmp_path / "model")
    write_sums(tmp_path / "data")
    return Place(tmp_path)
