"""The torture's sessions tell a run that was stopped from one at its end."""

import signal
from pathlib import Path

import yaml

from scripts.stress.torture import SETTINGS, Session, file_of
from scripts.tiny_model import write_sums, write_tiny_model


def test_a_stopped_session_is_not_at_the_run_s_end(tmp_path: Path):
    write_tiny_model(tmp_path / "model")
    write_sums(tmp_path / "data")
    settings = SETTINGS | {"model": str(tmp_path / "model"), "data": str(tmp_path / "data")}
    file_of(tmp_path, "settings", "").write_text(yaml.safe_dump(settings))
    first = Session(tmp_path, tmp_path / "run")
    first.until(lambda: "loss" in first.said)
    first.end(signal.SIGTERM)
    assert not first.ended()
    file_of(tmp_path, "settings", "").write_text(yaml.safe_dump(settings | {"iters": 1}))
    assert Session(tmp_path, tmp_path / "run").ended()
