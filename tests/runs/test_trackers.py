"""Every tracker by its own library, locally, gets the numbers of the history; one that fails ends no run."""

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlx_loraplus as ml
from mlx_loraplus.runs import trackers
from scripts.tiny_model import write_tiny_model
from tests.training.tiny_runs import Place, write_pairs

SETTINGS = {"iters": 2, "steps_per_eval": 2, "sample_rows": 0}


def test_tensorboard(place: Place):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = place.run("tensorboard", report_to=["tensorboard"], stop_at=1, **SETTINGS)
    run = place.run("tensorboard", report_to=["tensorboard"], resume=True, **SETTINGS)
    read = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    found = [(item.step, item.tensor_proto.float_val[0]) for item in read.Tensors("train/loss")]
    assert found == [(step, pytest.approx(loss)) for step, loss in run.losses()], (
        "in one curve after a resume"
    )
    assert len(read.Tensors("valid/valid_loss")) == 2
    (kept,) = read.PluginTagToContent("hparams").values()
    settings = HParamsPluginData.FromString(kept).session_start_info.hparams
    assert settings["lr_ratio"].number_value == 4.0
    assert settings["report_to"].string_value == "tensorboard"


def test_tensorboard_shows_what_tells_whether_preferences_work(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_tiny_model(tmp_path / "model")
    write_pairs(tmp_path / "data")
    settings = SETTINGS | {"objective": "dpo", "report_to": ["tensorboard"]}
    run = Place(tmp_path).run("dpo", **settings)
    read = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    for name in (
        "rewards_chosen",
        "rewards_rejected",
        "reward_margin",
        "reward_accuracy",
        "logp_chosen",
        "logp_rejected",
        "preferred",
    ):
        for tag, key in ((f"train/{name}", name), (f"valid/valid_{name}", f"valid_{name}")):
            found = [(item.step, item.tensor_proto.float_val[0]) for item in read.Tensors(tag)]
            wanted = [(step, pytest.approx(value)) for step, value in run.losses(key)]
            assert found == wanted, tag
            assert len(found) == 2


def test_tensorboard_leaves_what_it_did_not_write(place: Place):
    pytest.importorskip("tensorboard")
    folder = place.folder / "mine" / "tensorboard"
    (folder / "other").mkdir(parents=True)
    mine = [
        folder / "events.out.tfevents.1700000000.host.1.0",
        folder / "notes.txt",
        folder / "other" / "events.out",
    ]
    for file in mine:
        file.write_text("mine")
    place.run("mine", report_to=["tensorboard"], **SETTINGS)
    place.run("mine", report_to=["tensorboard"], overwrite=True, **SETTINGS)
    assert [file.read_text() for file in mine] == ["mine"] * 3
    assert len(list(folder.glob("events.out.tfevents.*.mlx_loraplus"))) == 1, (
        "the earlier run's is replaced"
    )


def test_wandb(place: Place, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = place.run("wandb", report_to=["wandb"], stop_at=1, **SETTINGS)
    check_wandb_file(run, sessions=1, exit_code=255)
    stored = (run.folder / "trackers.json").read_text()

    # The resumed session has the whole curve and the same id, in a folder of its own.
    run = place.run("wandb", report_to=["wandb"], resume=True, **SETTINGS)
    assert not [line for line in place.told if "fails" in line]
    assert (run.folder / "trackers.json").read_text() == stored
    check_wandb_file(run, sessions=2, exit_code=0)


def check_wandb_file(run: ml.Run, sessions: int, exit_code: int) -> None:
    """Check that the newest session's file has the run's id, its whole history and its end."""
    import wandb

    wandb.teardown()  # its other process may still be writing
    logs = sorted(
        (run.folder / "wandb").glob("offline-run-*/run-*.wandb"),
        key=lambda log: log.stat().st_mtime,
    )
    assert len(logs) == sessions
    records = list(wandb_records(logs[-1].read_bytes()))
    ids = {record.run.run_id for record in records if record.HasField("run")}
    assert ids == {json.loads((run.folder / "trackers.json").read_text())["wandb"]}
    assert [each.exit.exit_code for each in records if each.HasField("exit")] == [exit_code]
    items = [item for record in records for item in record.history.item]
    for name, wanted in (
        ("train/loss", run.losses()),
        ("valid/valid_loss", run.losses("valid_loss")),
    ):
        written = [
            json.loads(item.value_json)
            for item in items
            if [item.key, *item.nested_key][-1] == name
        ]
        assert written == [pytest.approx(loss) for _, loss in wanted]


def wandb_records(content: bytes) -> Iterator[Any]:
    """Read wandb's file, which has no public reader: LevelDB's log of blocks, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = 7, b""
    while len(content) - at >= 7:
        if (room := 32768 - at % 32768) < 7:  # too little for a header: the next block
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record: Any = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy, in MLflow
def test_mlflow(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = place.run("mlflow", report_to=["mlflow"], **SETTINGS)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(trackers.PROJECT)
    (logged,) = client.search_runs([experiment.experiment_id])
    found = [
        (metric.step, metric.value)
        for metric in client.get_metric_history(logged.info.run_id, "train/loss")
    ]
    assert sorted(found) == [(step, pytest.approx(loss)) for step, loss in run.losses()]
    assert logged.data.params["lr_ratio"] == "4.0"
    assert logged.info.status == "FINISHED"
    with pytest.raises(ZeroDivisionError):
        place.run(
            "mlflow", report_to=["mlflow"], at={1: lambda: 1 // 0}, overwrite=True, **SETTINGS
        )
    assert mlflow.active_run() is None, "the next run of a notebook can begin its own"
    place.run("mlflow", report_to=["mlflow"], stop_at=1, overwrite=True, **SETTINGS)
    states = [each.info.status for each in client.search_runs([experiment.experiment_id])]
    assert states == ["KILLED", "FAILED", "FINISHED"], "the newest first"

    # A resumed run continues its run there, even with another length, and no point is there twice.
    longer = SETTINGS | {"iters": 3}
    run = place.run("mlflow", report_to=["mlflow"], resume=True, **longer)
    assert not [line for line in place.told if "fails" in line]
    newest, *others = client.search_runs([experiment.experiment_id])
    assert newest.info.status == "FINISHED"
    assert len(others) == 2
    for name, wanted in (
        ("train/loss", run.losses()),
        ("valid/valid_loss", run.losses("valid_loss")),
    ):
        points = client.get_metric_history(newest.info.run_id, name)
        assert [(point.step, point.value) for point in points] == [
            (step, pytest.approx(loss)) for step, loss in wanted
        ]

    # A run that was deleted there begins again.
    client.delete_run(newest.info.run_id)
    place.run("mlflow", report_to=["mlflow"], resume=True, **SETTINGS | {"iters": 4})
    assert not [line for line in place.told if "fails" in line]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_trackio(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    run = place.run("trackio", report_to=["trackio"], **SETTINGS)
    assert capsys.readouterr().out == "", "JSON lines stay whole"
    assert place.told_with("trackio: in ").endswith("trackio show --project mlx_loraplus")
    from trackio.sqlite_storage import SQLiteStorage

    found = SQLiteStorage.get_logs(trackers.PROJECT, "trackio")
    assert [entry["train/loss"] for entry in found if "train/loss" in entry] == pytest.approx(
        [x for _, x in run.losses()]
    )


def test_trackio_continues_the_run_of_its_folder(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run = place.run("again", report_to=["trackio"], stop_at=1, **SETTINGS)
    stored = json.loads((run.folder / "trackers.json").read_text())
    run = place.run("again", report_to=["trackio"], resume=True, **SETTINGS)
    assert json.loads((run.folder / "trackers.json").read_text()) == stored
    found = [
        entry
        for entry in SQLiteStorage.get_logs(trackers.PROJECT, "again", run_id=stored["trackio"])
        if "train/loss" in entry
    ]
    assert [(entry["step"], entry["train/loss"]) for entry in found] == [
        (step, pytest.approx(loss)) for step, loss in run.losses()
    ]

    # A run of the same name in another folder is another run.
    other = place.run("other/again", report_to=["trackio"], **SETTINGS)
    assert json.loads((other.folder / "trackers.json").read_text()) != stored
    place.run("again", report_to=["trackio"], resume=True, **SETTINGS | {"iters": 3})
    assert not [line for line in place.told if "fails" in line]


def test_wandb_online_continues_its_run(place: Place, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    asked, logged = [], []

    class Opened:
        """Stands in for a run on the server, which has steps 0 and 1."""

        id, step, resumed = "abc123", 2, True

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, *values))

        def finish(self, exit_code: int) -> None:
            logged.append(exit_code)

    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options) or Opened())
    monkeypatch.setattr(
        wandb, "setup", lambda: type("Setup", (), {"settings": wandb.Settings(mode="online")})
    )
    place.run("online", report_to=["wandb"], stop_at=1, **SETTINGS)
    assert (asked[0]["id"], asked[0]["resume"]) == (None, "allow")
    logged.clear()
    place.run("online", report_to=["wandb"], resume=True, **SETTINGS)
    assert (asked[1]["id"], asked[1]["resume"]) == ("abc123", "allow")
    assert {entry[0] for entry in logged[:-1]} == {2}
    place.run("online", report_to=["wandb"], overwrite=True, **SETTINGS)
    assert asked[2]["id"] is None, "a new run"


def test_a_tracker_without_its_library_names_the_extra(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ml.ConfigError,
        match=r"report_to=\"wandb\" needs its library .*pip install 'mlx_loraplus\[wandb\]'",
    ):
        place.run("missing", report_to=["wandb"])
    assert not (place.folder / "missing").exists()
    with pytest.raises(ml.ConfigError, match="report_to"):
        place.run("missing", report_to=["excel"])


def test_a_tracker_that_fails_is_told_of_once(place: Place, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object):
        raise OSError("no route to the server")

    monkeypatch.setitem(trackers._OPENERS, "tensorboard", broken)
    monkeypatch.setattr(trackers, "check_trackers", lambda config: None)
    pytest.importorskip("tensorboard")
    run = place.run("broken", report_to=["tensorboard"], **SETTINGS)
    assert run.finished
    assert "no route to the server" in place.told_with("warning: tensorboard fails")
    assert len(run.losses()) == 2


def test_a_tracker_that_fails_half_way_is_closed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for step in ("log_params", "log_metrics"):
        with monkeypatch.context() as patched:
            patched.setattr(mlflow, step, lambda *_, **__: 1 // 0)
            place.run("half", report_to=["mlflow"], overwrite=True, **SETTINGS)
        assert place.told_with("warning: mlflow fails")
        assert mlflow.active_run() is None, "the next run of a notebook can begin its own"
