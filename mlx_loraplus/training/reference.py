"""The log-probabilities of a reference model, computed once before training.

DPO, IPO and KTO compare with a model that does not change. Its log-probabilities are constants, so
they are stored in the cache, keyed by the model, its adapters and the rows, and no second model is
in memory while training runs. They are computed before a run times the ways to compute its step.
So they take the smallest slices of the vocabulary that a run can choose, on every device, which
always fit and give the same bits in a run and when it is resumed.
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..adapters.base_layers import fingerprint
from ..adapters.storage import load_adapter
from ..adapters.trainable import adapter_arrays, find_adapters, find_fully_trained
from ..config import TrainConfig
from ..data.pairs import ComparedExamples
from ..errors import ConfigError, counted
from ..files import cache_folder, cached_folder, read_bounded, remove_unused
from ..kernels.choices import SMALLEST_SLICE, default_choices
from ..kernels.trunk_and_head import find_trunk_and_head
from ..models.loading import shared_copy
from .distributed import World
from .preferences import answer_log_probs
from .session import Session

_FOLDER = "reference"  # in the cache
_FILE = "log_probs"  # float32, two values for each example


def add_reference(model: nn.Module, session: Session, base: str) -> str | None:
    """Add the reference's log-probabilities to the examples of a run, if its objective needs them.

    Args:
        model: The model before the run's adapters are attached.
        session: The run's session.
        base: The fingerprint of the base model.

    Returns:
        A digest of the reference, for the history.

    Raises:
        ConfigError: The base can't be restored, or a resumed run had another reference.
    """
    config, world = session.config, session.world
    if not config.objective.has_reference:
        return None

    # Identify the reference; that of a resumed run must be the same.
    with world.sync_errors():
        reference = reference_model(model, config)
        adapters = fingerprint(adapter_arrays(reference))
        digest = hashlib.blake2b(f"{base} {adapters}".encode(), digest_size=16).hexdigest()
        checkpoint = session.checkpoint
        if checkpoint is not None and checkpoint.history[0].get("reference") != digest:
            raise ConfigError(
                "reference: the run to resume was started with another reference model: load the"
                " model as it was then; with --reference start, this includes the adapter that the"
                " run started from"
            )

    # Compute or read the log-probabilities of each split.
    kind = "the model without adapters"
    if config.objective.reference == "start":
        kind = f"the model with {config.resume_adapter_file or 'its adapters'}"
    for name, examples in session.examples.items():
        if isinstance(examples, ComparedExamples) and len(examples):
            count = counted(len(examples), config.objective.unit)
            session.log(f"{name}: log-probabilities of the reference, {kind}, for {count}")
            examples.reference = _log_probs_of(reference, examples, digest, config, world)
    return digest


def reference_model(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Return the model that answers are compared with; it shares the arrays of ``model``.

    Raises:
        ConfigError: The base can't be restored.
        AdapterError: ``resume_adapter_file`` holds no adapter.
    """
    reference = shared_copy(model)
    if config.objective.reference == "start":
        if config.resume_adapter_file is not None:
            load_adapter(reference, config.resume_adapter_file)
        return reference

    # Remove the adapters.
    adapters = find_adapters(reference)
    changed = any(adapter.owns_base for adapter in adapters.values())
    if changed or find_fully_trained(reference):
        raise ConfigError(
            "reference base needs the base's own weights, and this model's adapters have changed"
            " them: use --reference start, or load the model without its adapters and give"
            " --resume-adapter-file"
        )
    bases = [(path, adapter.base) for path, adapter in adapters.items()]
    reference.update_modules(tree_unflatten(bases))
    return reference


def _log_probs_of(
    model: nn.Module, examples: ComparedExamples, digest: str, config: TrainConfig, world: World
) -> np.ndarray:
    """Return log pi_ref of both answers of all examples, (examples, 2) float32, cached if possible.

    Each process computes its part, unless the main process has them in its cache.
    """
    # Look them up in the main process's cache.
    parts = f"{digest} {examples.fingerprint()}"
    key = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
    stored = _read(key, len(examples)) if world.is_main else None
    (is_stored,) = world.any_rank([stored is not None])

    # Compute them. The sum joins the parts, because the other processes' values are 0.
    found = np.zeros((len(examples), 2), np.float32) if stored is None else stored
    if not is_stored:
        choices = replace(default_choices(), slice_bytes=SMALLEST_SLICE)
        with world.sync_errors(), world.computing():
            trunk_and_head, size = find_trunk_and_head(model), config.data.batch_size
            for column, answers in enumerate(examples.both):
                found[:, column] = answer_log_probs(
                    model, trunk_and_head, answers, size, world, choices
                )
    if world.size > 1:
        found = np.array(world.sum_shards(mx.array(found)))

    # Store them.
    if world.is_main and not is_stored:
        remove_unused(_FOLDER)
        cached_folder(_FOLDER, key, lambda folder: _write(folder / _FILE, found))
    return found


def _read(key: str, count: int) -> np.ndarray | None:
    """Return what the cache holds for a key, or None if it holds nothing that can be used."""
    folder = cache_folder() / _FOLDER / key
    try:
        content = read_bounded(folder / _FILE, 8 * count)
        os.utime(folder)
    except OSError:
        return None

    if len(content) != 8 * count:
        return None
    return np.frombuffer(content, np.float32).reshape(-1, 2)


def _write(path: Path, found: np.ndarray) -> None:
    path.write_bytes(found.astype(np.float32).tobytes())
