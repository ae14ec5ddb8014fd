"""What identifies a run: it can be resumed only with the same model, data and settings."""

import json
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapters.base_layers import fingerprint, whole_lines
from ..adapters.trainable import find_adapters
from ..config import TrainConfig
from ..errors import ConfigError, join_problems
from ..kernels.choices import StepChoices
from ..memory.measured import MeasuredStep
from ..models.moved_run_paths import lasting_name, relocated, stored_settings
from ..settings import configure, current_names, settings_of
from .model_probes import ModelProbes

# The settings that may change when a run is resumed. Some are paths, which are compared by content.
# Some set how often something happens or when the run stops. Some change results only by rounding.
# Every other setting affects what is learned.
RESUME_MAY_CHANGE = {
    "model", "data", "adapter_path", "resume", "overwrite", "iters", "epochs", "steps_per_report",
    "steps_per_eval", "steps_per_save", "keep_checkpoints", "on_save_error", "patience",
    "max_minutes", "max_skipped_steps", "compile", "grad_checkpoint", "selfcheck", "report_to",
    "parallel", "distributed_timeout",
}  # fmt: skip
_FIT_LENGTH = ("warmup", "steps_per_report", "steps_per_eval")  # their defaults fit the length
_NOT_REPORTED = {"adapter_path", "resume", "overwrite"}

# Settings that may differ between the processes of a run: the content of files is compared by
# fingerprint, and only the main process writes.
_MAY_DIFFER_BETWEEN_PROCESSES = {
    "model", "data", "adapter_path", "resume_adapter_file", "report_to",
}  # fmt: skip


@dataclass(frozen=True)
class RunFingerprint:
    """What a checkpoint stores to identify its run.

    Attributes:
        settings: All settings; those in ``RESUME_MAY_CHANGE`` may change.
        model: The fingerprint of the base model's weights.
        rows: The fingerprints of the tokenized training and validation data, separated by a space.
        versions: The versions of the libraries; another version may round differently.
        grad_checkpoint: Whether blocks are checkpointed; a resumed run with ``auto`` keeps this.
        probes: The verdicts about the model, which a resumed run reuses; None in checkpoints of
            version 0.1.0.
        choices: How a step is computed; a resumed run keeps this. None in checkpoints of version
            0.1.0, like ``compiled``.
        compiled: Whether the step is compiled; a resumed run with ``auto`` keeps this.
        measured: What a step of the largest batch took; None if it was not measured.
        machine: The chip, the memory, the system and the kind of device that the last session
            computed on.
        base_config: The config of the base model, from ``model_config``; None in older checkpoints.
    """

    settings: dict[str, Any]
    model: str
    rows: str
    versions: dict[str, str]
    grad_checkpoint: bool = False
    probes: ModelProbes | None = None
    choices: StepChoices | None = None
    compiled: bool | None = None
    measured: MeasuredStep | None = None
    machine: dict[str, str] | None = None
    base_config: dict[str, Any] | None = None

    def comparable(self) -> dict[str, Any]:
        """Return what must be equal on all processes of a run, by name."""
        names = [name for name in self.settings if name not in _MAY_DIFFER_BETWEEN_PROCESSES]
        train, valid = self.rows.split()
        return {
            **self.versions,
            **{name: self.settings[name] for name in names},
            "the model": self.model[:12],
            "the training data": train[:12],
            "the validation data": valid[:12],
        }


def identifying_settings(model: nn.Module, config: TrainConfig) -> dict[str, Any]:
    """Return a run's settings with names and paths that work from any folder."""
    name = lasting_name(getattr(model, "exact_name", config.model))
    return stored_settings(config) | {"model": name}


def keep_first_choices(config: TrainConfig, stored: RunFingerprint) -> TrainConfig:
    """Return the settings of a resumed run, with what its first session chose.

    The defaults of the intervals depend on the number of steps, which may change.
    """
    settings = settings_of(config)
    then = current_names(stored.settings)
    unset = [name for name in _FIT_LENGTH if settings[name] is None]
    kept = {name: then[name] for name in unset if name in then}

    # The rate that the search found when the run started is kept.
    if settings["learning_rate"] == "auto":
        kept["learning_rate"] = then["learning_rate"]
    return configure(TrainConfig, settings | kept)


def model_fingerprint(model: nn.Module) -> str:
    """Return a digest of the base model's arrays, without those of adapters."""
    own: set[int] = set()
    for adapter in find_adapters(model).values():
        own.update(id(array) for array in adapter.values())

    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    arrays = (array for array in parameters.values() if id(array) not in own)
    described = whole_lines(module for _, module in model.named_modules())
    return fingerprint(arrays, described)


def model_config(model: nn.Module) -> dict[str, Any] | None:
    """Return the settings of a model that are not weights, such as RoPE's base.

    Returns:
        The arguments of mlx-lm's model as JSON values, or None if they are unknown.
    """
    arguments: Any = getattr(model, "args", None)
    if not is_dataclass(arguments) or isinstance(arguments, type):
        return None
    return json.loads(json.dumps(asdict(arguments), default=str))


def compare_settings(stored: RunFingerprint, config: TrainConfig) -> list[str]:
    """Compare a run's settings with those that its checkpoint stored.

    Returns:
        One line per setting that has changed and may change.

    Raises:
        ConfigError: Settings that decide what is learned have changed; the message lists them all.
    """
    # A setting that an older version did not have is assumed to have its default value.
    then = settings_of(configure(TrainConfig, {})) | current_names(stored.settings)
    then = relocated(then, Path(config.adapter_path).absolute())
    now = json.loads(json.dumps(stored_settings(config)))

    # Sort the changes by whether they are allowed.
    allowed: list[str] = []
    refused: list[str] = []
    for name, value in now.items():
        if then[name] == value or (name in _FIT_LENGTH and value is None):
            continue
        if name == "learning_rate" and value == "auto":  # it was found when the run started
            continue
        line = f"{name} {then[name]} -> {value}"
        if name == "data" and not value:
            refused.append(f"data {then[name]} -> the demo set, because no data is given")
        elif name not in RESUME_MAY_CHANGE:
            refused.append(line)
        elif name not in _NOT_REPORTED:
            allowed.append(line)

    if refused:
        raise ConfigError(
            f"can't resume with other settings: {join_problems(refused)}; for a new run, leave out"
            " --resume and give another --adapter-path; to continue this run, give only its own"
            f" settings (-c {config.adapter_path}/run.yaml)"
        )
    return allowed


def compare_content(stored: RunFingerprint, present: RunFingerprint, place: str) -> list[str]:
    """Compare a run's model and data with those that its checkpoint was trained on.

    Args:
        stored: The fingerprint in the checkpoint.
        present: The fingerprint of the run that resumes from it.
        place: The checkpoint, for the message.

    Returns:
        One line per library whose version has changed.

    Raises:
        ConfigError: The model or the data is not the same.
    """
    # The model and the data must be the same.
    problems: list[str] = []
    if stored.model != present.model:
        problems.append(
            f"the weights of --model {present.settings['model']} are not those it was trained on"
        )
    elif changed := _changed_config(stored, present):
        problems.append(
            f"the config of --model {present.settings['model']} is not the one it was trained with"
            f" ({', '.join(changed):.300})"
        )
    if stored.rows != present.rows:
        problems.append("the rows of --data, or their tokens, are not those it was trained on")
    if problems:
        names = ("model", "data")
        are_other = any(stored.settings.get(name) != present.settings[name] for name in names)
        own = f"take both from the run (-c {Path(place).parents[1]}/run.yaml), or "
        raise ConfigError(
            f"can't resume from {place}: {join_problems(problems)}; {own if are_other else ''}leave"
            " out --resume and train from the start in another --adapter-path"
        )

    # Other versions of the libraries are reported, but allowed.
    changed: list[str] = []
    for library, now in present.versions.items():
        then = stored.versions.get(library)
        if then != now:
            changed.append(f"{library} {then} -> {now} (may round differently)")
    return changed


def _changed_config(stored: RunFingerprint, present: RunFingerprint) -> list[str]:
    """Return the differences between the configs of two base models.

    An entry that only one of them has, such as one that a new version of mlx-lm adds, is ignored.
    """
    then, now = stored.base_config or {}, present.base_config or {}
    names = [name for name in then if name in now and then[name] != now[name]]
    return [f"{name} {then[name]!s:.80} -> {now[name]!s:.80}" for name in names]
