"""The run's folder: who may use it, what it holds, and whether a run in it goes on."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from ..adapters.storage import CONFIG, MODULES, WEIGHTS
from ..config import RunConfig
from ..errors import OutputError
from ..machine import this_machine
from ..places import check_unlocked, remove_folder, remove_leftovers, write_atomically
from ..settings import settings_of
from .checkpoint import CHECKPOINTS, Checkpoint, check_settings, find_checkpoint
from .faults import BAD_BATCH
from .history import FUSED, HISTORY, PLOT, REPORT, RESIDUALS, SETTINGS, encode_history
from .loop import Event
from .progress import Tell, quiet


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
        raise OutputError(f"adapter_path {folder} can't be written ({there} is read-only): give another folder")
    find_run(config, quiet)


def find_run(config: RunConfig, tell: Tell) -> Checkpoint | None:
    """Return the checkpoint to go on from, or None where the run starts; tell what differs from it.

    Raises:
        OutputError: ``adapter_path`` is a file; it holds a run, and neither ``overwrite`` nor ``resume`` is on; or it
            holds none, and ``resume`` is on.
        AdapterError: No checkpoint is whole.
        ConfigError: Settings differ that decide what is learned.
    """
    folder = Path(config.adapter_path)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"adapter_path {folder} is a file: give a folder")
    if not config.resume:
        held = [name for name in (WEIGHTS, CONFIG, HISTORY, CHECKPOINTS) if (folder / name).exists()]
        if held and not config.overwrite:
            raise OutputError(
                f"{folder} holds a run already ({held[0]}): --resume goes on with it, --overwrite replaces it, or give "
                "another --adapter-path"
            )
        return None
    if not (folder / SETTINGS).exists():
        raise OutputError(f"{folder} holds no run to go on with: give the run's --adapter-path, or leave --resume off")
    checkpoint = find_checkpoint(folder, tell)
    if checkpoint is None:
        tell("resume: there is no checkpoint yet, so the run starts anew")
        return None
    for line in check_settings(checkpoint, config):
        tell(f"resume: {line}")
    return checkpoint


def describe_cut(process: str, history: Sequence[Event]) -> str:
    """Say what is known of a session that ended without a word."""
    peak = max((event["peak_memory_gb"] for event in history if "peak_memory_gb" in event), default=0.0)
    return (
        f"the session before (process {process}) was cut off: killed, or out of memory (peak {peak:.2f} GB of "
        f"{this_machine().memory / 1e9:.0f} GB; --grad-checkpoint on takes less)"
    )


def start_folder(config: RunConfig, history: Sequence[Event], *, anew: bool) -> None:
    """Write the resolved settings, which ``-c run.yaml`` takes again, and the history so far.

    Args:
        config: The run's settings.
        history: Its events up to the checkpoint.
        anew: Clear away what an earlier run left.
    """
    folder = Path(config.adapter_path)
    for place in (folder, folder / CHECKPOINTS):
        remove_leftovers(place)
    (folder / FUSED).unlink(missing_ok=True)  # the adapter becomes another one
    if anew:
        remove_folder(folder / CHECKPOINTS)
        for name in (WEIGHTS, CONFIG, MODULES, HISTORY, PLOT, REPORT, RESIDUALS, BAD_BATCH):
            (folder / name).unlink(missing_ok=True)
    settings = settings_of(replace(config, resume=False, overwrite=False))  # these are about the folder
    write_atomically(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False).encode())
    if history:
        write_history(folder, history)


def write_history(folder: Path, history: Sequence[Event]) -> None:
    """Write ``history.jsonl``, one event a line."""
    write_atomically(folder / HISTORY, encode_history(history))
