"""What is kept of a run, and read again: ``run.yaml`` and ``history.jsonl``, an event a line.

Every event has ``update``, how many updates were made before it, and one of these sets of keys. Keys may be added; none
changes its meaning or goes without a new schema. Times are seconds, memory is 10^9 bytes, losses are nats per
supervised token.

============  ======================================================================================================
start, once   schema, updates (planned), model, versions; train and valid {examples, tokens, supervised}; adapter
              (the census, as text); memory {weights_gb, planned_gb (the peak), available_gb}, null without a plan;
              modules (paths, the order of the norms below); prompts [{prompt, wanted}]
report        loss (mean since the last report), grad_norm (the largest, before clipping), rate_a, rate_b and the rates
              of other groups, supervised_tokens, useful_tokens, padding (share), seconds, tokens_per_second (useful
              ones), peak_memory_gb, active_memory_gb, cache_memory_gb, shapes (traced so far);
              norm_a, norm_b, norm_change: of each module ‖A‖, ‖B‖ and ‖s B A‖ / ‖W‖
validation    valid_loss (null where it is not finite), valid_accuracy, valid_seconds; answers, one to each prompt
skipped       skipped (so far), reason
end, last     outcome, best_update, best_loss, seconds (in updates); missing where a session was killed
============  ======================================================================================================
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import RunConfig
from ..errors import ConfigError, OutputError
from ..places import read_bounded
from ..settings import configure, read_settings
from .loop import Event, Outcome, Progress

SCHEMA = 1
HISTORY, SETTINGS, RESIDUALS = "history.jsonl", "run.yaml", "residuals.json"
FUSED = "fuse.json"  # what fusing the adapter kept: export/fidelity.py
PLOT, REPORT = "loss.png", "report.html"
# What is computed with has to be of these kinds: a history may be a stranger's.
_COUNTS = dict.fromkeys(("examples", "tokens", "supervised"), int)
_START = {
    "adapter": str, "model": str, "updates": int, "train": _COUNTS, "valid": _COUNTS, "modules": list,
    "memory": {"weights_gb": int | float},
}  # fmt: skip
_REPORT: dict[str, Any] = dict.fromkeys(("loss", "useful_tokens", "seconds", "peak_memory_gb"), int | float)
_VALIDATION: dict[str, Any] = {"valid_loss": int | float | None}


@dataclass(repr=False)
class Run:
    """What a run was and how it went; a notebook shows it as a page."""

    config: RunConfig
    history: list[Event] = field(default_factory=list)  # see the top of this file
    progress: Progress = field(default_factory=Progress)
    planned: int = 0  # updates

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Read a run's folder, whether the run has ended or not.

        Raises:
            OutputError: It holds no run, or one that this version can't read.
        """
        history, path = read_history(Path(folder)), Path(folder) / SETTINGS
        try:
            config = configure(RunConfig, read_settings(path) | {"adapter_path": str(folder)})
        except ConfigError as error:
            raise OutputError(f"{path.parent} holds no whole run: {error}; give a run's folder") from None
        _check(history[0], _START, f"{path.parent / HISTORY}:1 is no start of a run")
        last = history[-1]
        progress = Progress(last["update"], best_update=last.get("best_update"), best_loss=last.get("best_loss"))
        return cls(config, history, progress, history[0]["updates"])

    @property
    def folder(self) -> Path:
        """Where the run keeps its adapter, settings, history and report."""
        return Path(self.config.adapter_path)

    @property
    def name(self) -> str:
        """What to call it: its folder's name."""
        return self.folder.absolute().name

    @property
    def start(self) -> Event:
        """The first event, or nothing before it."""
        return self.history[0] if self.history else {}

    @property
    def updates(self) -> int:
        """How many updates are planned, or were made where that is more."""
        return max(self.planned, self.progress.update)

    @property
    def outcome(self) -> Outcome | Literal["not ended"]:
        """How it ended: finished, stopped early (``patience``), out of time (``max_minutes``), interrupted; or not."""
        return self.history[-1].get("outcome", "not ended") if self.history else "not ended"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.outcome in ("finished", "stopped early")

    def losses(self, name: str = "loss") -> list[tuple[int, Any]]:
        """Return (update, value) for every event that has ``name``: "loss", "valid_loss" or another key."""
        return [(event["update"], event[name]) for event in self.history if name in event]

    def spent(self, updates: Sequence[int], name: str) -> np.ndarray:
        """Return how many "useful_tokens" or "seconds" were spent by each of ``updates``."""
        reports = self.losses("loss")
        spent = [event[name] for event in self.history if "loss" in event]
        return np.interp(updates, [0, *(update for update, _ in reports)], [0, *np.cumsum(spent)])

    def plot(self) -> Any:
        """Return a matplotlib figure of training and validation loss against updates."""
        from .plots import Plot, draw_losses

        figure = Plot(figsize=(7, 4), layout="constrained")
        draw_losses(figure.subplots(), self)
        return figure

    def to_dataframe(self) -> Any:
        """Return the history's numbers as a pandas table, a row an update.

        Raises:
            ConfigError: pandas is not installed.
        """
        rows: dict[int, Event] = {}
        for event in self.history:
            if not event.keys() & {"schema", "outcome"}:
                rows.setdefault(event["update"], {}).update(numbers(event))
        return _pandas().DataFrame.from_dict(rows, orient="index").rename_axis("update")

    def prompts(self) -> Any:
        """Return the fixed prompts as a pandas table: what is wanted, and the answer at each validation; 0 is the base.

        Raises:
            ConfigError: pandas is not installed.
        """
        columns = {f"update {update}": answers for update, answers in self.losses("answers")}
        return _pandas().DataFrame(self.start.get("prompts", [])).assign(**columns)

    def __repr__(self) -> str:
        """Return one line: where it stands and the losses."""
        found = [(label, self.losses(name)) for label, name in (("loss", "loss"), ("validation loss", "valid_loss"))]
        losses = "".join(f", {label} {series[0][1]:.4f} -> {series[-1][1]:.4f}" for label, series in found if series)
        return f"{self.folder}: {self.outcome}, update {self.progress.update} of {self.updates}{losses}"

    def _repr_html_(self) -> str:
        from .report import fragment

        return fragment(self)


def numbers(event: Event) -> dict[str, float]:
    """Return an event's numbers by name but for ``update``, and the means of its norms."""
    found: dict[str, float] = {
        name: value for name, value in event.items() if isinstance(value, int | float) and name != "update"
    }
    return found | {name: float(np.mean(event[name])) for name in event if name.startswith("norm_")}


def read_history(folder: Path) -> list[Event]:
    """Read a run's events.

    Raises:
        OutputError: There are none, a line is broken, or they follow another schema; the message says where.
    """
    path = folder / HISTORY
    try:
        lines = read_bounded(path, 1 << 30).splitlines()
    except OSError as error:
        raise OutputError(f"{path} can't be read: {error.strerror}; give the folder of a run that has begun") from None
    history: list[Event] = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not isinstance(event.get("update"), int):
                raise ValueError("an event is an object with an update")
        except (ValueError, RecursionError) as error:
            raise OutputError(f"{path}:{number} is no event: {str(error)[:100]}") from None
        if event.get("schema", SCHEMA if history else None) != SCHEMA:
            there = f"{event.get('schema', 'none')!r:.40}"
            raise OutputError(f"{path}:{number} has schema {there}, not {SCHEMA}: take the version that wrote it")
        for name, kind in (("loss", _REPORT), ("valid_loss", _VALIDATION)):
            if name in event:
                _check(event, kind, f"{path}:{number} is no event")
        history.append(event | {"valid_loss": math.nan} if event.get("valid_loss", 0.0) is None else event)
    if not history:
        raise OutputError(f"{path} is empty: the run has reported nothing yet")
    return history


def _check(event: Event, kinds: Mapping[str, Any], wrong: str) -> None:
    """Raise OutputError, beginning with ``wrong``, where a part of an event is missing or of another kind."""
    for name, kind in kinds.items():
        if name not in event:
            raise OutputError(f"{wrong}: it has no {name}")
        if isinstance(kind, dict) and isinstance(event[name], dict):
            _check(event[name], kind, wrong)
        elif isinstance(kind, dict) or not isinstance(event[name], kind):
            raise OutputError(f"{wrong}: its {name} is {event[name]!r:.40}")


def encode_history(history: Sequence[Event]) -> bytes:
    """Return events as JSON, one a line."""
    return "".join(f"{encode_event(event)}\n" for event in history).encode()


def encode_event(event: Event) -> str:
    """Return an event as JSON, which knows no loss that is not finite."""
    lost = not math.isfinite(event.get("valid_loss", 0.0))
    return json.dumps(event | {"valid_loss": None} if lost else event, ensure_ascii=False)


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise ConfigError("this table needs pandas: pip install 'mlx_loraplus[notebook]'") from None
    return pandas
