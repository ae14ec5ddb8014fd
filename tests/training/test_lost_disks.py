"""Disks that are full, and folders that vanish or can not be written, while a run goes on."""

import re
import resource
import shutil
from typing import Any

import pytest

import mlx_loraplus as ml
from mlx_loraplus.training.checkpoint import checkpoint_folder
from tests.conftest import same
from tests.training.tiny_runs import (
    Place,
    adapter_of,
    validate_on_what_is_unlearned,
)

# Disks and folders


def full_disk(most: int) -> None:
    """Let no file grow beyond ``most`` bytes, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_keeps_the_older_checkpoint(place: Place, policy: Any):
    undisturbed = place.run("one")
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    at = {3: lambda: full_disk(20_000), 5: lambda: full_disk(soft)}
    try:
        if policy == "stop":
            with pytest.raises(ml.OutputError, match="can't write"):
                place.run("two", at=at, on_save_error=policy)
        else:
            assert place.run("two", at=at).finished
            # On a slow machine, there may be a warning about the page as well.
            kept = "the previous checkpoint is kept"
            assert kept in place.told_with("warning: step 4 is not saved")
    finally:
        full_disk(soft)
    names = {path.name for path in (place.folder / "two" / "checkpoints").glob("0*")}
    assert names == ({"000002"} if policy == "stop" else {"000002", "000006"})
    assert same(adapter_of(place.run("two", resume=True)), adapter_of(undisturbed))


def test_a_best_adapter_that_met_a_full_disk_is_saved_when_there_is_room(place: Place):
    validate_on_what_is_unlearned(place)
    settings = {"learning_rate": 0.02, "schedule": "constant", "iters": 10}
    undisturbed = place.run("one", **settings)
    losses = dict(undisturbed.losses("valid_loss"))
    best = min((step for step in losses if step), key=losses.__getitem__)
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    try:
        run = place.run(
            "two",
            at={best - 1: lambda: full_disk(20_000), best + 3: lambda: full_disk(soft)},
            **settings,
        )
    finally:
        full_disk(soft)
    assert f"step {best} is not saved" in "".join(place.told)
    assert f"was at step {best}: its adapter is kept" in place.told_with("best validation")
    assert same(adapter_of(run), adapter_of(undisturbed))


@pytest.mark.parametrize("stop_at", [3, -1])
def test_a_disk_that_stays_full_ends_the_session_with_an_error(place: Place, stop_at: int):
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    full_disk(20_000)
    try:
        with pytest.raises(
            ml.OutputError,
            match=r"the last steps are not saved: can't write .* then repeat them with resume=True",
        ):
            place.run(stop_at=stop_at)
    finally:
        full_disk(soft)
    assert list((place.folder / "run" / "checkpoints").iterdir()) == []

    # The history says how it ended, and names no temporary folder.
    end = ml.Run.load(place.folder / "run").history[-1]
    assert end["outcome"] == "failed"
    assert re.search(r"can't write \S+/checkpoints/(best-)?00000\d/adapters", end["reason"])


def test_a_folder_that_vanishes_is_created_again(place: Place):
    undisturbed = place.run("one")
    run = place.run("two", at={3: lambda: shutil.rmtree(place.folder / "two")})
    assert "has vanished and is created again" in place.told_with("warning")
    assert same(adapter_of(run), adapter_of(undisturbed))
    assert (run.folder / "run.yaml").is_file()
    assert checkpoint_folder(run.folder, 6).is_dir()


def test_a_folder_that_cannot_be_written_is_reported_before_anything_slow(place: Place):
    with pytest.raises(ml.OutputError, match="/sys/run"):
        place.run("/sys/run")
    assert not any(line.startswith("step") for line in place.told)
