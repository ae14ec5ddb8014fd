"""``run.yaml`` and ``history.jsonl``: the record of a run, and how to read it.

``history.jsonl`` holds one event per line. Every event has ``step``, the number of steps made
before it, and one of the sets of keys below. Keys may be added. A key is removed or changes its
meaning only with a new schema number. Times are in seconds, memory is in 10^9 bytes, and losses are
in nats per supervised token, or per pair or labeled answer.

============  ====================================================================================
start, once   schema, started (ISO 8601, UTC), steps (planned), batch_rows (of a full batch),
              model, versions; train and valid {examples, tokens, supervised, digest}; adapter (as
              text); memory {weights_gb, planned_gb (the peak, measured if steps were timed),
              available_gb}, null without a plan; modules (paths, in the order of the norms
              below); prompts [{prompt, expected}]; probes (what was found out about the model:
              gated_mlps {path: gate}, head, takes_caches, checkpoint_sound); choices (how a step is
              computed: choices {attention, cross_entropy, slice_bytes, delta_rule},
              grad_checkpoint, compiled);
              self_check (what it found, if it was made); found_rate (the search for the learning
              rate, if it was made: rate, default, method, critical, tried [{rate, change}], steps,
              seconds, reason); reference (a digest, with objective dpo, ipo and kto);
              answer_tokens (the maximum in an answer to a prompt); resumed (the steps from which
              the run was resumed)
report        loss (mean since the last report), grad_norm (the largest, before clipping), rate_a,
              rate_b and the rates of other groups, supervised_tokens, useful_tokens, padding
              (fraction), seconds, tokens_per_second (useful ones), peak_memory_gb,
              active_memory_gb, cache_memory_gb, shapes (traced so far); norm_a, norm_b,
              norm_change: ‖A‖, ‖B‖ and ‖s B A‖ / ‖W‖ of each module; with preferences also
              rewards_chosen, rewards_rejected, reward_margin, reward_accuracy (fraction of pairs
              with a positive margin; with kto, of desirable answers above the KL estimate and of
              undesirable ones below it), logp_chosen and logp_rejected (means), with kto kl (the
              estimate), and with pairs preferred (fraction of pairs whose chosen answer is more
              likely per token)
validation    valid_loss (null if it is not finite), valid_accuracy, valid_seconds; answers, one
              for each prompt (one that was cut ends with …), and answer_seconds; with
              preferences, those of a report instead of valid_accuracy, with valid_ before their
              names
skipped       skipped (so far), reason
end, last     outcome, best_step, best_loss, seconds (in steps); valid_before, valid_after (the
              best), trend (diverged, not better, overfitting, still falling, levelled off, or
              null), minutes (of steps and validations), mean_tokens_per_second; reason if an
              error ended the run, and checkpointing_helps if gradient checkpointing would save the
              memory that ran out; missing if a session was killed
============  ====================================================================================
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..call_checks import types_checked
from ..config import TrainConfig
from ..errors import ConfigError, OutputError
from ..files import describe_contents, read_bounded
from ..models.moved_run_paths import read_run_settings
from ..settings import configure
from ..userpaths import path_of, similar_paths
from .state import COMPLETE, Event, Outcome, Progress, progress_of
from .verdict import Verdict, verdict_of

SCHEMA = 2
# Keys of schema 1 → their present names
_RENAMED = {
    "update": "step",
    "updates": "steps",
    "best_update": "best_step",
    "wanted": "expected",
}
HISTORY, SETTINGS, RESIDUALS = "history.jsonl", "run.yaml", "residuals.json"
FUSED = "fuse.json"  # written by export/fuse_quality.py
PLOT, REPORT, TRACKERS = "loss.png", "report.html", "trackers.json"
# The types of the values that are used in computations. They are checked, because a history may
# come from an untrusted source.
_COUNTS = {"examples": int, "tokens": int, "supervised": int}
_START = {
    "adapter": str,
    "model": str,
    "steps": int,
    "train": _COUNTS,
    "valid": _COUNTS,
    "modules": list,
    "memory": {"weights_gb": int | float},
}
_REPORT: dict[str, Any] = {
    "loss": int | float,
    "useful_tokens": int | float,
    "seconds": int | float,
    "peak_memory_gb": int | float,
}
_VALIDATION: dict[str, Any] = {"valid_loss": int | float | None}


_RESTORE = "to write the file again from the last checkpoint, resume the run"


@dataclass(repr=False)
class Run:
    """A run's settings and history; a notebook shows it as a page."""

    config: TrainConfig
    history: list[Event] = field(default_factory=list)  # described at the top of this file
    progress: Progress = field(default_factory=Progress)
    planned: int = 0  # steps

    def __post_init__(self) -> None:
        if not isinstance(self.config, TrainConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError("Run takes the settings of a run; Run.load(folder) reads a folder")

    @classmethod
    @types_checked
    def load(cls, folder: str | PathLike[str]) -> "Run":
        """Read a run's folder, whether the run has ended or not.

        Args:
            folder: The run's folder; ~ is the home folder.

        Raises:
            OutputError: The folder holds no run, or a run that this version can't read.
        """
        path = path_of(folder, "folder", OutputError)
        history = read_history(path)

        # The folder may have moved, so the present paths are used.
        try:
            config = configure(TrainConfig, read_run_settings(path / SETTINGS))
        except ConfigError as error:
            problem = f"{error}; correct the file"
            if not (path / SETTINGS).is_file():
                problem = f"{SETTINGS} is missing; copy it"
            raise OutputError(
                f"{path} holds no complete run: {problem}, or resume the run with its settings,"
                f" which writes {SETTINGS} again"
            ) from None

        # The first event has the planned steps.
        start = history[0]
        _check(start, _START, f"{path / HISTORY}:1 is not the start of a run")
        return cls(config, history, progress_of(history), start["steps"])

    @property
    def folder(self) -> Path:
        """The folder with the adapter, settings, history and report."""
        return Path(self.config.adapter_path)

    def __fspath__(self) -> str:
        """Return the run's folder, so that ``load`` and other functions take a run as a path."""
        return str(self.folder)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.absolute().name

    @property
    def start(self) -> Event:
        """The first event; empty before there is one."""
        return self.history[0] if self.history else {}

    @property
    def steps(self) -> int:
        """The number of planned steps, or of steps made if that is larger."""
        return max(self.planned, self.progress.step)

    @property
    def outcome(self) -> Outcome | Literal["not ended"]:
        """How the run ended.

        "finished", "stopped early" (``patience``), "out of time" (``max_minutes``), "interrupted",
        "failed", or "not ended".
        """
        return self.history[-1].get("outcome", "not ended") if self.history else "not ended"

    @property
    def finished(self) -> bool:
        """Whether training is complete, so that there is nothing to resume."""
        return self.outcome in COMPLETE

    @property
    def verdict(self) -> Verdict:
        """What training changed, how long it took, and how the validation loss developed."""
        return verdict_of(self)

    def losses(self, name: str = "loss") -> list[tuple[int, Any]]:
        """Return (step, value) of every event that has ``name``.

        Args:
            name: "loss", "valid_loss" or any other key.
        """
        return [(event["step"], event[name]) for event in self.history if name in event]

    def spent(self, steps: Sequence[int], name: str) -> np.ndarray:
        """Return how many "useful_tokens" or "seconds" were spent up to each of ``steps``."""
        # Between two reports, the cost of a step is interpolated.
        reports = [event for event in self.history if "loss" in event]
        reported = [0, *(report["step"] for report in reports)]
        totals = [0, *np.cumsum([report[name] for report in reports])]
        return np.interp(steps, reported, totals)

    def plot(self) -> Any:
        """Return a matplotlib figure of training and validation loss over steps."""
        from .matplotlib_plots import plot_losses

        return plot_losses(self)

    def to_dataframe(self) -> Any:
        """Return the history's metrics as a pandas table, one row per step.

        Raises:
            ConfigError: pandas is not installed.
        """
        # A report and a validation of the same step share a row.
        rows: dict[int, Event] = {}
        for event in self.history:
            if "schema" in event or "outcome" in event:
                continue
            rows.setdefault(event["step"], {}).update(metrics(event))

        table = _pandas().DataFrame.from_dict(rows, orient="index")
        return table.rename_axis("step")

    def prompts(self) -> Any:
        """Return the fixed prompts as a pandas table.

        Its columns are the prompt, the expected answer, and the answer at each validation, where
        step 0 is the base model.

        Raises:
            ConfigError: pandas is not installed.
        """
        columns = {f"step {step}": answers for step, answers in self.losses("answers")}
        return _pandas().DataFrame(self.start.get("prompts", [])).assign(**columns)

    def __repr__(self) -> str:
        """Return one line: the folder, the outcome and the losses."""
        losses = ""
        for label, name in (("loss", "loss"), ("validation loss", "valid_loss")):
            if points := self.losses(name):
                losses += f", {label} {points[0][1]:.4f} -> {points[-1][1]:.4f}"

        position = f"step {self.progress.step} of {self.steps}"
        return f"{self.folder}: {self.outcome}, {position}{losses}"

    def _repr_html_(self) -> str:
        from .report import fragment

        return fragment(self)


def metrics(event: Event) -> dict[str, float]:
    """Return an event's metrics by name, without ``step``; norms are averaged over modules."""
    found: dict[str, float] = {}
    for name, value in event.items():
        if name.startswith("norm_"):
            found[name] = float(np.mean(value))
        elif isinstance(value, int | float):
            found[name] = value

    found.pop("step", None)
    return found


def read_history(folder: Path) -> list[Event]:
    """Read a run's events.

    Raises:
        OutputError: The file is missing or empty, a line is invalid, or the schema is unknown.
            The message names the line.
    """
    path = folder / HISTORY
    try:
        content = read_bounded(path, 1 << 30)
    except OSError as error:
        problem = f"{path} can't be read: {error.strerror}"
        if not folder.exists():
            problem = f"there is no folder {folder}{similar_paths(folder, suffixes=())}"
        elif folder.is_file():
            problem = f"{folder} is a file"
        elif contents := describe_contents(folder):
            problem = f"{folder} holds {contents}, and no history of a run"
        raise OutputError(f"{problem}; give the folder of a run that has started") from None

    lines = content.splitlines()
    # A run that was killed may have written only a part of its last line.
    if lines and not content.endswith(b"\n") and not _is_json(lines[-1]):
        lines.pop()
    history = [_read_event(line, path, number) for number, line in enumerate(lines, 1)]
    if not history:
        if content.strip():
            raise OutputError(f"{path} holds no events: {_RESTORE}")
        raise OutputError(f"{path} is empty: the run has reported nothing yet")
    return history


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_event(line: bytes, path: Path, number: int) -> Event:
    """Read and check one line of a history.

    Raises:
        OutputError: The line is invalid; the message names the file and the line.
    """
    place = f"{path}:{number}"
    try:
        event = json.loads(line)
        if not isinstance(event, dict):
            raise ValueError("an event is an object with a step")
        event = current_keys(event)
        if not isinstance(event.get("step"), int):
            raise ValueError("an event is an object with a step")
    except (ValueError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{place} is not an event ({str(error)[:100]}): remove this line, or {_RESTORE}"
        ) from None

    # Only the first event must contain the schema.
    if number == 1 and "schema" not in event:
        raise OutputError(f"{place} is not the start of a run, which is lost: {_RESTORE}")
    schema = event.get("schema", SCHEMA)
    if schema not in (1, SCHEMA):
        raise OutputError(
            f"{place} has schema {schema!r:.40}, not {SCHEMA}: use the version that wrote it"
        )

    # The keys that are used in computations must exist and hold numbers.
    for name, kinds in (("loss", _REPORT), ("valid_loss", _VALIDATION)):
        if name in event:
            _check(event, kinds, f"{place} is not an event")

    # JSON has no NaN, so a loss that is not finite is stored as null.
    if "valid_loss" in event and event["valid_loss"] is None:
        event["valid_loss"] = math.nan
    return event


def current_keys(event: Any) -> dict[str, Any]:
    """Return an event with the keys of schema 1 under their present names.

    Raises:
        TypeError: The event is not a mapping, or its prompts are not mappings.
    """
    if not isinstance(event, Mapping):
        raise TypeError("an event is an object")
    names: dict[str, Any] = {name: _RENAMED.get(name, name) for name in event}
    renamed: dict[str, Any] = {names[name]: event[name] for name in event}
    prompts = renamed.get("prompts")
    if isinstance(prompts, list):
        renamed["prompts"] = [current_keys(prompt) for prompt in prompts]
    return renamed


def _check(event: Event, kinds: Mapping[str, Any], problem: str) -> None:
    """Check that an event has all of ``kinds``, a mapping of keys to types or mappings.

    Raises:
        OutputError: A key is missing or has another type; the message begins with ``problem``.
    """
    for name, kind in kinds.items():
        if name not in event:
            raise OutputError(f"{problem}: it has no {name}")

        value = event[name]
        expected = dict if isinstance(kind, dict) else kind
        if not isinstance(value, expected):
            raise OutputError(f"{problem}: its {name} is {value!r:.40}")
        if isinstance(kind, dict):
            _check(value, kind, problem)


def encode_history(history: Sequence[Event]) -> bytes:
    """Return events as JSON, one per line."""
    return "".join(f"{encode_event(event)}\n" for event in history).encode()


def encode_event(event: Event) -> str:
    """Return an event as JSON, with null for a loss that is not finite."""
    if not math.isfinite(event.get("valid_loss", 0.0)):
        event = event | {"valid_loss": None}
    return json.dumps(event, ensure_ascii=False)


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise ConfigError("this table needs pandas: pip install 'mlx_loraplus[notebook]'") from None
    return pandas
