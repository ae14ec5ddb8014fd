"""Everything a run needs to go on, written so that a crash at any moment leaves whole checkpoints only.

::

    RUN/checkpoints/000123/
        adapters.safetensors, adapter_config.json   the adapter, as stock mlx-lm loads it
        trained.safetensors                         the arrays that train, under their own names
        state.safetensors                           moments, steps and rates of every group
        state.json                                  Progress and Identity
        history.jsonl                               the run's events so far
        SHA256SUMS                                  of the files above; ``sha256sum -c`` reads it
    RUN/checkpoints/best-000100/                    the adapter of a best validation, and its sums

A batch is a pure function of the seed and its number, and dropout one of the seed, the step and
the part of the rows that a process has: so the step's number is the cursor of both, and a run may
go on with any number of processes. Checkpoints are made between steps, where no gradients are
accumulated. A folder appears under its name only when all of it is on the disk.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pydantic
from mlx.utils import tree_flatten

from ..adapters.attach import find_adapters
from ..adapters.layers import fingerprint, whole_lines
from ..adapters.storage import CONFIG, MODULES, WEIGHTS, read_weights, save_adapter
from ..config import RunConfig
from ..errors import AdapterError, ConfigError, OutputError, join_problems
from ..files import (
    check_unlocked,
    read_bounded,
    remove_folder,
    replacing,
    replacing_folder,
    write_atomically,
)
from ..runs.history import HISTORY, current_keys, encode_history, read_history
from ..runs.ownership import CHECKPOINTS, check_names, held_names, is_run, occupied
from ..runs.progress import Log, quiet
from ..runs.state import Event, Progress
from ..settings import configure, current_names, settings_of
from .optimizer import LoRAPlus

TRAINED, STATE, PROGRESS, SUMS = (
    "trained.safetensors",
    "state.safetensors",
    "state.json",
    "SHA256SUMS",
)
# In a checkpoint; everything else there is a person's.
_WRITTEN = {WEIGHTS, CONFIG, MODULES, TRAINED, STATE, PROGRESS, HISTORY, SUMS}

# What may change between sessions: names of places, which fingerprints stand for, cadences, ends,
# and manners that change no more than rounding. All other settings decide what is learned.
RESUME_MAY_CHANGE = {
    "model", "data", "adapter_path", "resume", "overwrite", "iters", "epochs", "steps_per_report", "steps_per_eval",
    "steps_per_save", "keep_checkpoints", "on_save_error", "patience", "max_minutes", "max_skipped_steps", "compile",
    "grad_checkpoint", "report_to", "parallel", "distributed_timeout",
}  # fmt: skip
_SILENT = {"adapter_path", "resume", "overwrite"}


@dataclass(frozen=True)
class RunFingerprint:
    """What a run is: a run goes on from a checkpoint only if these are the same.

    Attributes:
        settings: Every setting; those in ``RESUME_MAY_CHANGE`` may differ.
        model: Fingerprint of the base's weights.
        rows: Fingerprint of the training and validation rows, as tokens.
        versions: Of the libraries; others may round otherwise.
        grad_checkpoint: Whether blocks are checkpointed; ``auto`` keeps to it.
    """

    settings: dict[str, Any]
    model: str
    rows: str
    versions: dict[str, str]
    grad_checkpoint: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    folder: Path
    progress: Progress
    identity: RunFingerprint
    history: list[Event]


def save_checkpoint(
    run: Path,
    model: nn.Module,
    optimizer: LoRAPlus,
    progress: Progress,
    identity: RunFingerprint,
    history: Sequence[Event],
    keep: int,
) -> None:
    """Write a checkpoint, then remove those, and the best adapters, that are not among the ``keep`` newest.

    So many bests are all that the checkpoints that are left can name. The best adapter must be
    saved before.

    Raises:
        OutputError: It can't be written; the older ones are as they were.
    """
    with replacing_folder(
        checkpoint_folder(run, progress.step), is_ours=_WRITTEN.__contains__
    ) as folder:
        _save_adapter(model, folder)
        with replacing(folder / STATE) as file:
            mx.save_safetensors(file, optimizer.arrays(), metadata={"format": "mlx"})
        state = {"progress": asdict(progress), "identity": asdict(identity)}
        write_atomically(folder / PROGRESS, json.dumps(state, indent=1).encode())
        write_history(folder, history)
        _write_sums(folder)
    for folder_of in (checkpoint_folder, best_folder):
        there = [
            folder_of(run, number)
            for number in _numbers(run / CHECKPOINTS)
            if number <= progress.step
        ]
        for folder in [folder for folder in there if folder.exists()][:-keep]:
            remove_folder(folder, _WRITTEN.__contains__)


def write_history(folder: Path, history: Sequence[Event]) -> None:
    """Write a run's events so far."""
    write_atomically(folder / HISTORY, encode_history(history))


def save_best(run: Path, model: nn.Module, trained: Mapping[str, mx.array], step: int) -> None:
    """Write the adapter that was the best at ``step``: the model with the arrays ``trained``.

    Raises:
        OutputError: It can't be written.
    """
    now: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    try:
        model.load_weights(list(trained.items()), strict=False)
        with replacing_folder(best_folder(run, step), is_ours=_WRITTEN.__contains__) as folder:
            _save_adapter(model, folder)
            _write_sums(folder)
    finally:
        model.load_weights(list(now.items()), strict=False)


def load_best(run: Path, model: nn.Module, step: int) -> None:
    """Put the adapter that was the best at ``step`` back on the model.

    Raises:
        AdapterError: It is not there or not whole.
    """
    folder = best_folder(run, step)
    _check_sums(folder, {WEIGHTS, CONFIG, TRAINED})
    load_trained(folder, model)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where a run keeps its checkpoint of a step."""
    return run / CHECKPOINTS / f"{step:06d}"


def best_folder(run: Path, step: int) -> Path:
    """Return where a run keeps the adapter of a best validation."""
    return run / CHECKPOINTS / f"best-{step:06d}"


def check_folder(config: RunConfig) -> None:
    """Refuse a folder that can't be used, before anything slow has happened.

    Raises:
        OutputError: Another run is at work in it, it can't be written, or as ``find_run``.
        ConfigError: As ``find_run``.
    """
    folder = Path(config.adapter_path)
    check_unlocked(folder)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(
            f"adapter_path {folder} can't be written ({there} is read-only): give another folder"
        )
    find_run(config, quiet, whole=False)


def find_run(config: RunConfig, log: Log, *, whole: bool = True) -> Checkpoint | None:
    """Return the checkpoint to go on from, or None where the run starts; tell what differs from it.

    Only the holder of the folder's lock can be sure that it stays whole: before, ``whole`` off
    leaves out its arrays.

    Raises:
        OutputError: ``adapter_path`` is a file; it holds a run, and neither ``overwrite`` nor
            ``resume`` is on; or it holds none, and ``resume`` is on.
        AdapterError: No checkpoint is whole.
        ConfigError: Settings differ that decide what is learned.
    """
    folder = Path(config.adapter_path)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"adapter_path {folder} is a file: give a folder")
    check_names(folder)
    if not config.resume:
        if (held := held_names(folder)) and not config.overwrite:
            raise occupied(folder, held)
        return None
    if not is_run(folder):
        raise OutputError(
            f"{folder} holds no run to go on with: give the run's --adapter-path, or leave"
            " --resume off"
        )
    checkpoint = find_checkpoint(folder, log, whole=whole)
    if checkpoint is None:
        log("resume: there is no checkpoint yet, so the run starts anew")
        return None
    for line in check_settings(checkpoint, config):
        log(f"resume: {line}")
    return checkpoint


def find_checkpoint(run: Path, log: Log, *, whole: bool = True) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run, or None if it has none yet; tell of the broken ones.

    Raises:
        AdapterError: There are checkpoints, but none is whole.
    """
    folders = [checkpoint_folder(run, number) for number in reversed(_numbers(run / CHECKPOINTS))]
    folders = [folder for folder in folders if folder.is_dir()]
    for folder in folders:
        try:
            return read_checkpoint(folder, whole=whole)
        except AdapterError as problem:
            log(f"checkpoint skipped: {problem}")
    if folders:
        raise AdapterError(
            f"no checkpoint in {run / CHECKPOINTS} is whole: --overwrite starts anew"
        )
    return None


def read_checkpoint(folder: Path, *, whole: bool = True) -> Checkpoint:
    """Check a checkpoint's sums, without ``whole`` only those of what is read here, and read all but its arrays.

    Raises:
        AdapterError: It is not whole, or not one of ours.
    """
    _check_sums(
        folder,
        {PROGRESS, HISTORY} | ({WEIGHTS, CONFIG, TRAINED, STATE} if whole else set()),
        whole=whole,
    )
    try:  # a stranger's, with sums that are right
        state = json.loads(read_bounded(folder / PROGRESS))
        progress = pydantic.TypeAdapter(Progress).validate_python(current_keys(state["progress"]))
        stored = state["identity"]
        if "recompute" in stored:  # its name in 0.1.0
            stored["grad_checkpoint"] = stored.pop("recompute")
        identity = pydantic.TypeAdapter(RunFingerprint).validate_python(stored)
        history = read_history(folder)
        if progress.step != int(folder.name):
            raise ValueError("its step is not that of its name")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _broken(folder, error) from None
    return Checkpoint(folder, progress, identity, history)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: LoRAPlus) -> None:
    """Put a checkpoint's adapter and optimizer state back, to the bit.

    Raises:
        AdapterError: Its arrays can't be read, or are not those of this model.
        ConfigError: They are not those of this optimizer.
    """
    load_trained(checkpoint.folder, model)
    optimizer.restore(read_weights(checkpoint.folder / STATE))


def load_trained(folder: Path, model: nn.Module) -> None:
    """Put the adapter in ``folder`` on a model that has one of the same kind already.

    Raises:
        AdapterError: It is another adapter.
    """
    saved = read_weights(folder / TRAINED)
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    kinds = [
        {name: (a.shape, a.dtype) for name, a in arrays.items()} for arrays in (trained, saved)
    ]
    if odd := sorted(
        name
        for name in kinds[0].keys() | kinds[1].keys()
        if kinds[0].get(name) != kinds[1].get(name)
    ):
        raise AdapterError(
            f"{folder} belongs to another run: {len(odd)} arrays differ, {odd[0]!r:.80} first"
        )
    model.load_weights(list(saved.items()), strict=False)
    mx.eval(model.trainable_parameters())


def check_settings(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """Compare a run's settings with a checkpoint's, and return the differences that are allowed, a line each.

    Raises:
        ConfigError: Settings differ that decide what is learned; all are told.
    """
    before, now = configure(RunConfig, {}), json.loads(json.dumps(settings_of(config)))
    then = settings_of(before) | current_names(checkpoint.identity.settings)
    changed = {
        name: f"{name} {then[name]} -> {value}"
        for name, value in now.items()
        if then[name] != value
    }
    if refused := [line for name, line in changed.items() if name not in RESUME_MAY_CHANGE]:
        raise ConfigError(
            f"can't go on with other settings: {join_problems(refused)}; take them from the run (-c"
            f" {config.adapter_path}/run.yaml), or train anew in another --adapter-path"
        )
    return [line for name, line in changed.items() if name not in _SILENT]


def check_fingerprint(checkpoint: Checkpoint, identity: RunFingerprint) -> list[str]:
    """Compare a run's model and rows with a checkpoint's, and return the versions that differ, a line each.

    Raises:
        ConfigError: They are others.
    """
    then, problems = checkpoint.identity, []
    if then.model != identity.model:
        problems.append(
            f"the weights of --model {identity.settings['model']} are not those it was trained on"
        )
    if then.rows != identity.rows:
        problems.append("the rows of --data, or their tokens, are not those it was trained on")
    if problems:
        raise ConfigError(
            f"can't go on from {checkpoint.folder}: {join_problems(problems)}; train anew in"
            " another --adapter-path"
        )
    return [
        f"{library} {then.versions.get(library)} -> {now} (may round otherwise)"
        for library, now in identity.versions.items()
        if then.versions.get(library) != now
    ]


def model_fingerprint(model: nn.Module) -> str:
    """Return a digest of the base's arrays; adapters are left out."""
    own = {id(array) for adapter in find_adapters(model).values() for array in adapter.values()}
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    described = whole_lines(module for _, module in model.named_modules())
    return fingerprint((array for array in parameters.values() if id(array) not in own), described)


def _save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter for everybody, and what trains as it is: an adapter's file may hold more, or it merged."""
    save_adapter(model, folder)
    with replacing(folder / TRAINED) as file:
        mx.save_safetensors(
            file, dict(tree_flatten(model.trainable_parameters())), metadata={"format": "mlx"}
        )


def remove_checkpoints(run: Path) -> None:
    """Remove a run's checkpoints and best adapters, and nothing else that is beside them."""
    home = run / CHECKPOINTS
    for number in _numbers(home):
        for folder in (checkpoint_folder(run, number), best_folder(run, number)):
            if folder.is_dir():
                remove_folder(folder, _WRITTEN.__contains__)
    with suppress(OSError):  # it is not there, or a person's files are
        home.rmdir()


def _numbers(home: Path) -> list[int]:
    """Return the steps that have a folder in ``home``, of either kind, in order."""
    names = [re.fullmatch(r"(?:best-)?([0-9]{6,12})", path.name) for path in home.glob("*")]
    return sorted({int(name[1]) for name in names if name})


def _write_sums(folder: Path) -> None:
    sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    write_atomically(folder / SUMS, "".join(sums).encode())


def _check_sums(folder: Path, wanted: set[str], *, whole: bool = True) -> None:
    """Raise AdapterError unless every wanted file, and with ``whole`` every other that has a sum, matches it."""
    try:
        lines = read_bounded(folder / SUMS, 1 << 20).decode(errors="replace").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name in sorted(wanted | sums.keys() if whole else wanted):
            if name not in sums or Path(name).name != name or _sha256(folder / name) != sums[name]:
                raise ValueError(f"{name[:80]!r} does not match its checksum")
    except (OSError, ValueError) as error:
        raise _broken(folder, error) from None


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"{path.name} is no ordinary file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broken(folder: Path, error: Exception) -> AdapterError:
    told = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return AdapterError(f"{folder} is broken: {told}")
