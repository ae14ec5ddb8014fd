"""Trackers: each logs a run's numbers by its own library, where that library is set up to, which is locally by itself.

A tracker gets the whole history, so that a run that goes on has one curve there too, in a run of its own.
"""

import importlib
import io
import os
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from typing import Any

from ..config import RunConfig
from ..errors import ConfigError
from ..settings import settings_of
from .history import Run, numbers
from .loop import Event
from .progress import Tell, Watch
from .report import plain

PROJECT = "mlx_loraplus"
_EVENTS = ".mlx_loraplus"  # ends the names of what we write for TensorBoard
Log = Callable[..., Any]  # called with numbers by name and step, the update
_SETTINGS = {"mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}}  # read when imported


def check_trackers(config: RunConfig) -> None:
    """Raise ConfigError where the library of a tracker is not installed."""
    for name in config.report_to:
        for variable, value in _SETTINGS.get(name, {}).items():
            os.environ.setdefault(variable, value)
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"report_to {name} needs its library ({error}): pip install 'mlx_loraplus[{name}]'"
            ) from None


@contextmanager
def tracking(run: Run, tell: Tell) -> Generator[list[Watch]]:
    """Yield a watcher for every tracker of the run; one that fails is told of once and left out from then on."""
    trackers = [_Tracker(name, tell) for name in run.config.report_to]
    try:
        yield [*trackers]
    finally:
        for tracker in trackers:
            tracker.close()


class _Tracker:
    """Opens a tracker at the first event and logs the numbers of each."""

    def __init__(self, name: str, tell: Tell):
        self.name, self.tell, self.failed = name, tell, False
        self.opened = ExitStack()
        self.log: Log | None = None

    def __call__(self, run: Run, event: Event) -> None:
        if not self.failed:
            self._try(lambda: self._log(run, event))

    def close(self) -> None:
        self._try(self.opened.close)

    def _log(self, run: Run, event: Event) -> None:
        events = [event] if self.log else run.history
        if self.log is None:
            self.log = self.opened.enter_context(_OPENERS[self.name](run, self.tell))
        for each in events:
            part = "valid" if "valid_loss" in each else "train"
            if each.keys().isdisjoint({"schema", "outcome"}):
                self.log({f"{part}/{name}": value for name, value in numbers(each).items()}, step=each["update"])

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # a server or a disk that fails must not end a run  # noqa: BLE001
            if not self.failed:
                self.tell(f"warning: {self.name} fails, so it gets nothing more: {' '.join(str(error).split())[:200]}")
            self.failed = True


@contextmanager
def _tensorboard(run: Run, tell: Tell) -> Generator[Log]:
    """Log into RUN/tensorboard, the settings as its hyperparameters."""
    from tensorboard.compat.proto.event_pb2 import Event as Stored  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # pyright: ignore[reportMissingImports]
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb  # pyright: ignore[reportMissingImports]
    from tensorboard.summary.writer.event_file_writer import EventFileWriter  # pyright: ignore[reportMissingImports]

    # What this run wrote before would be a second curve; a person's own files have other names.
    folder = run.folder / "tensorboard"
    for file in folder.glob(f"events.out.tfevents.*{_EVENTS}"):
        file.unlink()

    writer = EventFileWriter(str(folder), filename_suffix=_EVENTS)
    settings = settings_of(run.config).items()
    summary = hparams_pb({name: each if isinstance(each, int | float) else plain(each) for name, each in settings})
    writer.add_event(Stored(summary=summary))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_event(Stored(wall_time=time.time(), step=step, summary=scalar_pb(name, value)))
        writer.flush()

    tell(f"tensorboard: in {folder}")
    yield log
    writer.close()


@contextmanager
def _wandb(run: Run, _: Tell) -> Generator[Log]:
    """Log to Weights & Biases, which tells its place itself; WANDB_MODE=offline keeps it in RUN/wandb."""
    import wandb  # pyright: ignore[reportMissingImports]

    settings = wandb.Settings(quiet=True)  # not silent, which would hide its question for a key
    config = settings_of(run.config)
    opened = wandb.init(project=PROJECT, name=run.name, dir=run.folder, config=config, settings=settings)
    yield opened.log
    opened.finish(exit_code=0 if run.finished else 1 if run.outcome == "not ended" else 255)  # 255: its Ctrl-C


@contextmanager
def _mlflow(run: Run, tell: Tell) -> Generator[Log]:
    """Log to MLflow, where MLFLOW_TRACKING_URI says."""
    import mlflow  # pyright: ignore[reportMissingImports]

    mlflow.set_experiment(PROJECT)
    mlflow.start_run(run_name=run.name)
    try:
        mlflow.log_params(settings_of(run.config))
        tell(f"mlflow: in {mlflow.get_tracking_uri()}, experiment {PROJECT}")
        yield mlflow.log_metrics
    finally:
        mlflow.end_run("FINISHED" if run.finished else "FAILED" if run.outcome == "not ended" else "KILLED")


@contextmanager
def _trackio(run: Run, tell: Tell) -> Generator[Log]:
    """Log to Trackio, in TRACKIO_DIR."""
    import trackio  # pyright: ignore[reportMissingImports]
    from trackio.utils import TRACKIO_DIR  # pyright: ignore[reportMissingImports]

    with redirect_stdout(io.StringIO()):  # its greeting would stand among JSON lines
        opened = trackio.init(project=PROJECT, name=run.name, config=settings_of(run.config))
    tell(f"trackio: in {TRACKIO_DIR}: trackio show --project {PROJECT}")
    yield opened.log
    with redirect_stdout(io.StringIO()):
        trackio.finish()


_OPENERS: dict[str, Callable[[Run, Tell], AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
