"""Experiment trackers: TensorBoard, Weights & Biases, MLflow and Trackio.

Each tracker logs through its own library, to the destination that is configured for the library. By
default, all trackers log locally.

A resumed run continues its run in the tracker, whose id is kept in ``trackers.json``. W&B offline
can't append to a run, so the resumed session writes the whole history under the same id. In both
cases there is one complete curve.
"""

# The libraries are optional, and their types are incomplete.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import importlib
import io
import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from typing import Any

from ..config import TrainConfig
from ..errors import ConfigError
from ..files import read_bounded, write_atomically
from ..settings import settings_of
from .history import TRACKERS, Run, metrics
from .progress import Callback, Log
from .report import plain
from .state import Event

PROJECT = "mlx_loraplus"
_EVENTS = ".mlx_loraplus"  # suffix of the files that we write for TensorBoard
LogValues = Callable[..., Any]  # called with the metrics by name, and step
_ENVIRONMENT = {  # the libraries read these variables when they are imported
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"},
}


def check_trackers(config: TrainConfig) -> None:
    """Check that the library of every tracker is installed.

    Raises:
        ConfigError: A library can't be imported.
    """
    for name in config.report_to:
        for variable, value in _ENVIRONMENT.get(name, {}).items():
            os.environ.setdefault(variable, value)

        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"--report-to {name} needs its library ({error}): pip install"
                f" 'mlx_loraplus[{name}]'"
            ) from None


@contextmanager
def tracking(run: Run, log: Log) -> Generator[list[Callback]]:
    """Yield one callback for every tracker of the run.

    If a tracker fails, the error is reported once, and the tracker receives no further events.
    """
    trackers = [_Tracker(name, log) for name in run.config.report_to]

    try:
        yield [*trackers]
    finally:
        for tracker in trackers:
            tracker.close()


class _Tracker:
    """Opens a tracker at the first event and logs the metrics of each event."""

    def __init__(self, name: str, log: Log):
        self.name = name
        self.log = log
        self.failed = False
        self.opened = ExitStack()
        self.log_values: LogValues | None = None

    def __call__(self, run: Run, event: Event) -> None:
        if not self.failed:
            self._try(lambda: self._log(run, event))

    def close(self) -> None:
        self._try(self.opened.close)

    def _log(self, run: Run, event: Event) -> None:
        # At the first event of this session, also log the earlier events of a resumed run.
        events = [event]
        if self.log_values is None:
            self.log_values = self.opened.enter_context(_OPENERS[self.name](run, self.log))
            events = run.history

        for each in events:
            if "schema" in each or "outcome" in each:
                continue
            split = "valid" if "valid_loss" in each else "train"
            values = {f"{split}/{name}": value for name, value in metrics(each).items()}
            self.log_values(values, step=each["step"])

    def _try(self, action: Callable[[], Any]) -> None:
        """Run an action; an error disables the tracker, because it must not end the run."""
        try:
            action()
        except Exception as error:  # noqa: BLE001
            if not self.failed:
                reason = " ".join(str(error).split())[:200]
                self.log(f"warning: {self.name} fails and is disabled for this run: {reason}")
            self.failed = True


@contextmanager
def _tensorboard(run: Run, log: Log) -> Generator[LogValues]:
    """Log to RUN/tensorboard, with the settings as hyperparameters."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    # Remove the files that this run wrote before: they would appear as a second curve. The user's
    # own files have other names.
    folder = run.folder / "tensorboard"
    for file in folder.glob(f"events.out.tfevents.*{_EVENTS}"):
        file.unlink()

    # Numbers stay numbers; all other settings become text.
    settings: dict[str, Any] = {}
    for name, value in settings_of(run.config).items():
        settings[name] = value if isinstance(value, int | float) else plain(value)

    writer = EventFileWriter(str(folder), filename_suffix=_EVENTS)
    event = event_pb2.Event(summary=hparams_pb(settings))
    writer.add_event(event)

    def log_values(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            summary = scalar_pb(name, value)
            stored = event_pb2.Event(wall_time=time.time(), step=step, summary=summary)
            writer.add_event(stored)
        writer.flush()

    log(f"tensorboard: in {folder}")
    yield log_values
    writer.close()


@contextmanager
def _wandb(run: Run, _: Log) -> Generator[LogValues]:
    """Log to Weights & Biases, which prints its own address.

    With WANDB_MODE=offline the data stays in RUN/wandb, in a folder for each session. The newest
    one has the whole history.
    """
    import wandb

    # quiet, because silent would hide the prompt for an API key
    is_offline = wandb.setup().settings.mode == "offline"
    opened = wandb.init(
        project=PROJECT,
        name=run.name,
        dir=run.folder,
        config=settings_of(run.config),
        settings=wandb.Settings(quiet=True),
        id=_stored_id(run, "wandb"),
        resume=None if is_offline else "allow",
        allow_val_change=True,  # such as --iters of a resumed run
    )
    _store_id(run, "wandb", opened.id)
    first = opened.step if opened.resumed else 0
    yield _without_known(opened.log, lambda _: first)

    if run.finished:
        code = 0
    elif run.outcome in ("not ended", "failed"):
        code = 1
    else:
        code = 255  # what wandb itself uses for Ctrl-C
    opened.finish(exit_code=code)


@contextmanager
def _mlflow(run: Run, log: Log) -> Generator[LogValues]:
    """Log to MLflow, at MLFLOW_TRACKING_URI."""
    import mlflow

    mlflow.set_experiment(PROJECT)
    stored = _stored_id(run, "mlflow")
    opened = _continue_mlflow(stored) if stored else None
    known: dict[str, int] = {}
    if opened is not None:
        # Find the first step of each metric to log, because MLflow would keep duplicates.
        client = mlflow.MlflowClient()
        for name in opened.data.metrics:
            points = client.get_metric_history(opened.info.run_id, name)
            known[name] = 1 + max(point.step for point in points)
    else:
        opened = mlflow.start_run(run_name=run.name)

    try:
        if not known:  # parameters can't change
            mlflow.log_params(settings_of(run.config))
        _store_id(run, "mlflow", opened.info.run_id)
        log(f"mlflow: in {mlflow.get_tracking_uri()}, experiment {PROJECT}")
        yield _without_known(mlflow.log_metrics, lambda name: known.get(name, 0))
    finally:
        # Without an end, the next run of a notebook could not start.
        if run.finished:
            status = "FINISHED"
        elif run.outcome in ("not ended", "failed"):
            status = "FAILED"
        else:
            status = "KILLED"
        mlflow.end_run(status)


def _continue_mlflow(run_id: str) -> Any:
    """Return a run of MLflow that is active again, or None if it was deleted."""
    import mlflow

    try:
        return mlflow.start_run(run_id=run_id)
    except mlflow.MlflowException:
        return None


@contextmanager
def _trackio(run: Run, log: Log) -> Generator[LogValues]:
    """Log to Trackio, in TRACKIO_DIR."""
    import trackio
    from trackio.utils import TRACKIO_DIR

    stored = _stored_id(run, "trackio")
    settings: dict[str, Any] = {
        "project": PROJECT,
        "name": run.name,
        "config": settings_of(run.config),
    }

    # Trackio prints a greeting, which would break JSON lines. It continues the newest run of a
    # name, which may be that of another folder.
    with redirect_stdout(io.StringIO()):
        opened = trackio.init(**settings, resume="allow" if stored else "never")
        is_other = stored is not None and opened.id != stored
        if is_other:
            trackio.finish()
            opened = trackio.init(**settings)

    _store_id(run, "trackio", opened.id)
    log(f"trackio: in {TRACKIO_DIR}; open it with: trackio show --project {PROJECT}")
    # The library has no public name for this.
    next_step = opened._next_step  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    first = 0 if stored is None or is_other else next_step
    yield _without_known(opened.log, lambda _: first)

    with redirect_stdout(io.StringIO()):
        trackio.finish()


def _without_known(log_values: LogValues, first_of: Callable[[str], int]) -> LogValues:
    """Return a function that logs only what a continued run does not have yet.

    Args:
        log_values: Logs the metrics of a step.
        first_of: Returns the first step to log of a name.
    """

    def log_new(values: dict[str, float], step: int) -> None:
        new = {name: value for name, value in values.items() if step >= first_of(name)}
        if new:
            log_values(new, step=step)

    return log_new


def _stored_id(run: Run, name: str) -> str | None:
    """Return the id of the run in a tracker, if an earlier session of the run had one."""
    return _read_ids(run).get(name)


def _store_id(run: Run, name: str, run_id: str) -> None:
    ids = _read_ids(run) | {name: run_id}
    write_atomically(run.folder / TRACKERS, json.dumps(ids, indent=1).encode())


def _read_ids(run: Run) -> dict[str, str]:
    """Return the stored ids; a file that is missing or damaged has none."""
    try:
        ids = json.loads(read_bounded(run.folder / TRACKERS))
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}


_OPENERS: dict[str, Callable[[Run, Log], AbstractContextManager[LogValues]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
