"""Checkpoints: everything that a run needs to resume, written so that a crash can't damage them.

::

    RUN/checkpoints/000123/
        adapters.safetensors, adapter_config.json   the adapter, as stock mlx-lm loads it; not
                                                    written with adapter full
        trained.safetensors                         the trained arrays, under their own names
        state.safetensors                           moments, steps and rates of every group
        state.json                                  Progress and RunFingerprint
        history.jsonl                               the run's events so far
        SHA256SUMS                                  checksums of these files, for ``sha256sum -c``
    RUN/checkpoints/best-000100/                    the adapter of a best validation, and its sums

A batch depends only on the seed and the batch's number. Dropout depends only on the seed, the step
and the shard of the data that a process trains on. The step's number therefore restores both, and a
run may be resumed with any number of processes. Checkpoints are written between steps, when no
gradients are accumulated. A checkpoint's folder is renamed to its final name only after all its
files are on the disk.
"""

import errno
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pydantic
from mlx.utils import tree_flatten

from ..adapters.damaged_files import CHECKPOINTS
from ..adapters.full import trains_weights
from ..adapters.storage import write_adapter
from ..adapters.stored_files import CONFIG, MODULES, WEIGHTS, is_model_folder, read_weights
from ..config import TrainConfig
from ..errors import AdapterError, OutputError, counted
from ..files import (
    check_unlocked,
    check_writable,
    read_bounded,
    remove_folder,
    replacing,
    replacing_folder,
    write_atomically,
)
from ..runs.history import HISTORY, current_keys, encode_history, read_history
from ..runs.progress import Log, no_log
from ..runs.run_folder import check_names, check_unused, is_run, no_run
from ..runs.state import Event, Progress
from .optimizer import LoRAPlus
from .run_fingerprint import RunFingerprint, compare_settings

TRAINED = "trained.safetensors"
STATE = "state.safetensors"
PROGRESS = "state.json"
SUMS = "SHA256SUMS"

# The files of a checkpoint. Other files in its folder belong to the user and are kept.
_WRITTEN = {WEIGHTS, CONFIG, MODULES, TRAINED, STATE, PROGRESS, HISTORY, SUMS}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files match their checksums."""

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
    """Write a checkpoint, then remove all but the ``keep`` newest checkpoints and best adapters.

    The best adapter must be saved first, because the checkpoint refers to it.

    Raises:
        OutputError: The checkpoint can't be written; the older ones are unchanged.
    """
    target = checkpoint_folder(run, progress.step)
    with replacing_folder(target, is_ours=_WRITTEN.__contains__) as folder:
        # The arrays.
        _save_adapter(model, folder)
        with replacing(folder / STATE) as file:
            mx.save_safetensors(file, optimizer.arrays(), metadata={"format": "mlx"})

        # The rest, then the checksums of all files.
        state = {"progress": asdict(progress), "identity": asdict(identity)}
        write_atomically(folder / PROGRESS, json.dumps(state, indent=1).encode())
        write_history(folder, history)
        _write_sums(folder)

    # Remove old ones. The checkpoints that are kept refer to at most ``keep`` best adapters.
    for folder_of in (checkpoint_folder, best_folder):
        steps = [step for step in _saved_steps(run) if step <= progress.step]
        folders = [folder_of(run, step) for step in steps]
        existing = [folder for folder in folders if folder.exists()]
        for folder in existing[:-keep]:
            remove_folder(folder, _WRITTEN.__contains__)


def write_history(folder: Path, history: Sequence[Event]) -> None:
    """Write a run's events so far."""
    write_atomically(folder / HISTORY, encode_history(history))


def save_best(run: Path, model: nn.Module, trained: Mapping[str, mx.array], step: int) -> None:
    """Write the best adapter, found at ``step``: the model with the arrays ``trained``.

    Raises:
        OutputError: The adapter can't be written.
    """
    # The model may have been trained further since then. Save the best values, then restore the
    # model's current values.
    current: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    try:
        model.load_weights(list(trained.items()), strict=False)
        with replacing_folder(best_folder(run, step), is_ours=_WRITTEN.__contains__) as folder:
            _save_adapter(model, folder)
            _write_sums(folder)
    finally:
        model.load_weights(list(current.items()), strict=False)


def load_best(run: Path, model: nn.Module, step: int) -> None:
    """Restore the best adapter, found at ``step``.

    Raises:
        AdapterError: The adapter is missing or damaged.
    """
    folder = best_folder(run, step)
    _check_sums(folder, {TRAINED})
    load_trained(folder, model)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / CHECKPOINTS / f"{step:06d}"


def best_folder(run: Path, step: int) -> Path:
    """Return the folder of the best adapter, found at ``step``."""
    return run / CHECKPOINTS / f"best-{step:06d}"


def check_folder(config: TrainConfig) -> None:
    """Check that a run's folder can be used, before any slow work starts.

    Raises:
        OutputError: Another run is training in the folder; the folder can't be written, is a broken
            link, or is named like a file; or as for ``find_run``.
        AdapterError, ConfigError: As for ``find_run``.
    """
    folder = Path(config.adapter_path)
    check_writable(folder, "--adapter-path")
    check_unlocked(folder)
    find_run(config, no_log, whole=False)


def find_run(config: TrainConfig, log: Log, *, whole: bool = True) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None if the run starts from the beginning.

    Args:
        config: The run's settings; allowed differences from the checkpoint's settings are logged.
        log: Called with each line to show.
        whole: Whether to check the arrays too. Before the folder is locked, another process may
            still change them, so the check would prove nothing.

    Raises:
        OutputError: ``adapter_path`` is a file; it holds a model, a sweep or data, or is read by
            the run; it holds a run, and neither ``overwrite`` nor ``resume`` is on; or it holds no
            run, and ``resume`` is on.
        AdapterError: All checkpoints are damaged, or a run that has trained has none.
        ConfigError: Settings that decide what is learned have changed.
    """
    folder = Path(config.adapter_path)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--adapter-path {folder} is a file: give a folder")
    check_names(folder)

    # A new run needs a folder without results, unless they may be overwritten.
    if not config.resume:
        check_unused(config)
        return None

    if not is_run(folder):
        raise no_run(folder)
    checkpoint = find_checkpoint(folder, log, whole=whole)
    if checkpoint is None and (is_model_folder(folder) or (folder / WEIGHTS).exists()):
        raise AdapterError(
            f"{folder} holds what a run has trained, but no checkpoint to resume from:"
            f" {_advise_continuing(folder)} with another --adapter-path trains it further, and"
            " --overwrite starts again"
        )
    if checkpoint is None:
        log("resume: the run has no checkpoint yet, so it starts from the beginning")
        return None

    for line in compare_settings(checkpoint.identity, config):
        log(f"resume: {line}")
    return checkpoint


def _advise_continuing(folder: Path) -> str:
    """Return the setting that starts a run from what another has trained."""
    return f"--{'model' if is_model_folder(folder) else 'resume-adapter-file'} {folder}"


def find_checkpoint(run: Path, log: Log, *, whole: bool = True) -> Checkpoint | None:
    """Return a run's newest undamaged checkpoint, or None if it has no checkpoint yet.

    Each damaged checkpoint is logged and skipped.

    Raises:
        AdapterError: All checkpoints are damaged.
    """
    folders: list[Path] = []
    for step in reversed(_saved_steps(run)):
        folder = checkpoint_folder(run, step)
        if folder.is_dir():
            folders.append(folder)

    for folder in folders:
        try:
            return read_checkpoint(folder, whole=whole)
        except AdapterError as problem:
            log(f"checkpoint skipped: {problem}")

    if folders:
        raise AdapterError(
            f"all checkpoints in {run / CHECKPOINTS} are damaged: train from the start with"
            " --overwrite"
        )
    return None


def read_checkpoint(folder: Path, *, whole: bool = True) -> Checkpoint:
    """Read a checkpoint without its arrays.

    Args:
        folder: The checkpoint's folder.
        whole: Whether to check all files against their checksums, or only the files read here.

    Raises:
        AdapterError: The checkpoint is damaged, or another program has written it.
    """
    required = {PROGRESS, HISTORY}
    if whole:
        required |= {TRAINED, STATE}
    _check_sums(folder, required, whole=whole)

    # Correct checksums do not prove correct content: the file may come from an untrusted source.
    try:
        state = json.loads(read_bounded(folder / PROGRESS))
        progress = pydantic.TypeAdapter(Progress).validate_python(current_keys(state["progress"]))
        stored = state["identity"]
        if "recompute" in stored:  # the key's name in 0.1.0
            stored["grad_checkpoint"] = stored.pop("recompute")
        identity = pydantic.TypeAdapter(RunFingerprint).validate_python(stored)
        history = read_history(folder)
        if progress.step != int(folder.name):
            raise ValueError("its step is not the step in its name")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(folder, error) from None
    return Checkpoint(folder, progress, identity, history)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: LoRAPlus) -> None:
    """Restore a checkpoint's adapter and optimizer state bit-exactly.

    Raises:
        AdapterError: The arrays can't be read, or belong to another model.
        ConfigError: The state belongs to another optimizer.
    """
    load_trained(checkpoint.folder, model)
    optimizer.restore(read_weights(checkpoint.folder / STATE))


def load_trained(folder: Path, model: nn.Module) -> None:
    """Restore the adapter in ``folder`` on a model that already has an adapter of the same kind.

    Raises:
        AdapterError: The names, shapes or types of the arrays differ.
    """
    saved = read_weights(folder / TRAINED)
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    expected = {name: (array.shape, array.dtype) for name, array in trained.items()}
    found = {name: (array.shape, array.dtype) for name, array in saved.items()}

    names = sorted(expected.keys() | found.keys())
    different = [name for name in names if expected.get(name) != found.get(name)]
    if different:
        raise AdapterError(
            f"{folder} belongs to another run: it differs in {counted(len(different), 'array')},"
            f" such as {different[0]!r:.80}"
        )

    model.load_weights(list(saved.items()), strict=False)
    mx.eval(model.trainable_parameters())


def remove_checkpoints(run: Path) -> None:
    """Remove a run's checkpoints and best adapters, and keep all other files."""
    for step in _saved_steps(run):
        for folder in (checkpoint_folder(run, step), best_folder(run, step)):
            if folder.is_dir():
                remove_folder(folder, _WRITTEN.__contains__)

    with suppress(OSError):  # it does not exist, or holds the user's files
        (run / CHECKPOINTS).rmdir()


def _save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter for other programs, and the trained arrays unchanged.

    The adapter's file may contain more arrays than these, or contain them in merged form. Weights
    that train without an adapter are the trained arrays.
    """
    if not trains_weights(model):
        write_adapter(model, folder)
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    with replacing(folder / TRAINED) as file:
        mx.save_safetensors(file, trained, metadata={"format": "mlx"})


def _saved_steps(run: Path) -> list[int]:
    """Return the steps that have a checkpoint or a best adapter, in order."""
    steps: set[int] = set()
    for path in (run / CHECKPOINTS).glob("*"):
        name = re.fullmatch(r"(?:best-)?([0-9]{6,12})", path.name)
        if name:
            steps.add(int(name[1]))
    return sorted(steps)


def _write_sums(folder: Path) -> None:
    sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    write_atomically(folder / SUMS, "".join(sums).encode())


def _check_sums(folder: Path, required: set[str], *, whole: bool = True) -> None:
    """Check the required files against their checksums; with ``whole``, check all listed files.

    Raises:
        AdapterError: A file is missing or does not match.
    """
    try:
        # Each line holds a digest, two spaces and a name.
        lines = read_bounded(folder / SUMS, 1 << 20).decode(errors="replace").splitlines()
        sums: dict[str, str] = {}
        for line in lines:
            digest, _, name = line.partition("  ")
            sums[name] = digest

        names = required | sums.keys() if whole else required
        for name in sorted(names):
            # An untrusted file must not make us read outside the folder.
            is_plain_name = Path(name).name == name
            if name not in sums or not is_plain_name or _sha256(folder / name) != sums[name]:
                raise ValueError(f"{name[:80]!r} does not match its checksum")
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from None


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"{path.name} is missing or not a regular file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(folder: Path, error: Exception) -> AdapterError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return AdapterError(f"{folder} is damaged: {reason}")
