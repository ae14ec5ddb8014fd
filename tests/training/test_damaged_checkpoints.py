"""Checkpoints that are damaged, foreign or half written are skipped, and a killed run loses no more."""

import hashlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import mlx_loraplus as ml
from mlx_loraplus.runs.history import SCHEMA
from mlx_loraplus.settings import settings_of
from mlx_loraplus.train import main
from mlx_loraplus.training.checkpoint import (
    checkpoint_folder,
)
from tests.conftest import same
from tests.training.tiny_runs import (
    Place,
    adapter_of,
    without_times,
)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "sums"])
def test_a_damaged_checkpoint_is_skipped_with_a_message(place: Place, damage: str):
    undisturbed = place.run("one")
    place.run("two", stop_at=5)
    newest = checkpoint_folder(place.folder / "two", 5)
    file = newest / "state.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage == "gone":
        file.unlink()
    else:
        (newest / "SHA256SUMS").write_text("")
    resumed = place.run("two", resume=True)
    assert "000005 is damaged" in place.told_with("checkpoint skipped")
    assert "resume: from step 4 of 6" in place.told
    assert same(adapter_of(undisturbed), adapter_of(resumed))
    assert without_times(resumed.history) == without_times(undisturbed.history)


def test_a_resume_hashes_a_checkpoint_s_arrays_once(place: Place, monkeypatch: pytest.MonkeyPatch):
    run = place.run(stop_at=3)
    read: list[Path] = []
    digest = hashlib.file_digest

    def noted(file: Any, kind: Any) -> Any:
        read.append(Path(file.name))
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    main(["-c", str(run.folder / "run.yaml"), "--resume", "--iters", "3"])  # nothing is left to do
    folder = checkpoint_folder(run.folder, 3)
    arrays = [path.name for path in read if path.parent == folder and path.suffix == ".safetensors"]
    assert sorted(arrays) == ["adapters.safetensors", "state.safetensors", "trained.safetensors"]


@pytest.mark.parametrize(
    ("file", "words", "other"),
    [
        ("state.json", '"window": []', '"window": [{}]'),
        ("history.jsonl", f'"schema": {SCHEMA}', '"schema": 7'),
        ("history.jsonl", '"step": 5', '"step": "5"'),
    ],
)
def test_a_strangers_checkpoint_with_sums_that_are_right_is_skipped(
    place: Place, file: str, words: str, other: str
):
    place.run(stop_at=5)
    folder = checkpoint_folder(place.folder / "run", 5)
    path, sums = folder / file, folder / "SHA256SUMS"
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()]
    path.write_text(path.read_text().replace(words, other))
    digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    sums.write_text(sums.read_text().replace(*digests))
    assert digests[0] != digests[1]
    place.run(resume=True)
    assert "000005 is damaged" in place.told_with("checkpoint skipped")


def test_kill_9_inside_a_save_loses_no_more_than_that_save(place: Place):
    undisturbed = place.run("one")
    settings = settings_of(undisturbed.config) | {"adapter_path": str(place.folder / "two")}
    (place.folder / "two.yaml").write_text(yaml.safe_dump(settings))
    for syncs in (40, 60, 41):  # past the first save; then as soon as one is at work
        code = f"""
import os, signal
from pathlib import Path
left, fsync = {syncs}, os.fsync
def sync(descriptor):
    global left
    left -= 1
    if left < 1 and any(Path({str(place.folder / "two" / "checkpoints")!r}).glob(".[0-9]*")):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = sync
from mlx_loraplus.train import main
main(["-c", {str(place.folder / "two.yaml")!r}, *{["--resume"] if (place.folder / "two").exists() else []!r}])
"""
        killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list((place.folder / "two" / "checkpoints").glob(".[0-9]*")), (
        "the last was inside a save"
    )
    resumed = place.run("two", resume=True)
    assert "was cut off: killed, or out of memory" in place.told_with("the previous session")
    assert same(adapter_of(resumed), adapter_of(undisturbed))
    assert without_times(resumed.history) == without_times(undisturbed.history)
    assert not list((place.folder / "two" / "checkpoints").glob(".*"))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start(place: Place):
    run = place.run(stop_at=3)
    for file in run.folder.glob("checkpoints/*/state.json"):
        file.write_text("{}")
    with pytest.raises(
        ml.AdapterError, match=r"all checkpoints in .* are damaged: train from the start"
    ):
        place.run(resume=True)
    assert place.run(overwrite=True, iters=2).finished
