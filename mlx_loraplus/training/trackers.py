"""Trackers: each logs a run's numbers by its own library, where that library is set up to, which is locally by itself.

A tracker gets the whole history, so that a run that goes on has one curve there too, in a run of its own.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..config import RunConfig
from ..errors import ConfigError
from ..places import remove_folder
from ..settings import settings_of
from .history import Run, numbers
from .loop import Event
from .progress import Tell, Watch

PROJECT = "mlx_loraplus"
Log = Callable[[dict[str, float], int], Any]
Close = Callable[[], Any]


def check_trackers(config: RunConfig) -> None:
    """Raise ConfigError where the library of a tracker is not installed."""
    for name in config.report_to:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"report_to {name} needs its library ({error}): pip install 'mlx_loraplus[{name}]'"
            ) from None


@contextmanager
def tracking(run: Run, tell: Tell) -> Iterator[list[Watch]]:
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
        self.opened: tuple[Log, Close] | None = None

    def __call__(self, run: Run, event: Event) -> None:
        self._try(lambda: self._log(run, event))

    def close(self) -> None:
        self._try(lambda: self.opened and self.opened[1]())

    def _log(self, run: Run, event: Event) -> None:
        events = [event] if self.opened else run.history
        log, _ = self.opened = self.opened or _OPENERS[self.name](run)
        for each in events:
            part = "valid" if "valid_loss" in each else "train"
            if each.keys().isdisjoint({"schema", "outcome"}):
                log({f"{part}/{name}": value for name, value in numbers(each).items()}, each["update"])

    def _try(self, act: Callable[[], Any]) -> None:
        if self.failed:
            return
        try:
            act()
        except Exception as error:  # a server or a disk that fails must not end a run
            self.failed = True
            self.tell(f"warning: {self.name} fails, so it gets nothing more: {' '.join(str(error).split())[:200]}")


def _tensorboard(run: Run) -> tuple[Log, Close]:
    """Log into RUN/tensorboard."""
    from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]

    remove_folder(run.folder / "tensorboard")
    writer = Writer(str(run.folder / "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _wandb(run: Run) -> tuple[Log, Close]:
    """Log to Weights & Biases; WANDB_MODE=offline keeps it in RUN/wandb."""
    import wandb  # pyright: ignore[reportMissingImports]

    opened = wandb.init(project=PROJECT, name=run.folder.name, dir=run.folder, config=settings_of(run.config))
    return lambda values, step: opened.log(values, step=step), opened.finish


def _mlflow(run: Run) -> tuple[Log, Close]:
    """Log to MLflow, where MLFLOW_TRACKING_URI says."""
    import mlflow  # pyright: ignore[reportMissingImports]

    mlflow.set_experiment(PROJECT)
    mlflow.start_run(run_name=run.folder.name)
    mlflow.log_params(settings_of(run.config))
    return lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run


def _trackio(run: Run) -> tuple[Log, Close]:
    """Log to Trackio, in TRACKIO_DIR."""
    import trackio  # pyright: ignore[reportMissingImports]

    opened = trackio.init(project=PROJECT, name=run.folder.name, config=settings_of(run.config))
    return lambda values, step: opened.log(values, step=step), opened.finish


_OPENERS: dict[str, Callable[[Run], tuple[Log, Close]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
