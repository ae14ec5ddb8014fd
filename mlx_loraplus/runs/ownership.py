"""Whose a folder is: what a run writes in it, and whether a run of this program has written what is there."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..adapters.storage import CONFIG, MODULES, WEIGHTS
from ..config import RunConfig
from ..errors import ConfigError, OutputError
from ..settings import current_names, read_settings, setting_names
from .history import FUSED, HISTORY, PLOT, REPORT, RESIDUALS, SETTINGS, read_history
from .state import BAD_BATCH

CHECKPOINTS = "checkpoints"
FILES = (WEIGHTS, CONFIG, HISTORY, SETTINGS, MODULES, PLOT, REPORT, RESIDUALS, FUSED, BAD_BATCH)
FOLDERS = (CHECKPOINTS,)


def held_names(folder: Path) -> list[str]:
    """Return which of the names that a run writes are there."""
    return [name for name in (*FILES, *FOLDERS) if os.path.lexists(folder / name)]


def is_run(folder: Path) -> bool:
    """Tell whether a run of this program has written a folder: its history begins as a run's, or it has a checkpoint.

    A run that was cut off while it began may have left its settings alone, which are complete then.
    """
    if not (folder / SETTINGS).is_file():
        return False
    if any(
        re.fullmatch(r"[0-9]{6,12}", path.name) and path.is_dir()
        for path in (folder / CHECKPOINTS).glob("*")
    ):
        return True
    with suppress(OutputError, IndexError):
        return "schema" in read_history(folder)[0]
    with suppress(ConfigError):
        return held_names(folder) == [SETTINGS] and current_names(
            read_settings(folder / SETTINGS)
        ).keys() >= set(setting_names(RunConfig))
    return False


def check_names(folder: Path) -> None:
    """Raise OutputError where a file that a run writes can't be replaced, or a folder that it fills is none."""
    for name in FILES:
        if (folder / name).is_dir():
            raise OutputError(
                f"{folder / name} is a folder, where a run writes a file: give another"
                " --adapter-path"
            )
    for name in FOLDERS:
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise OutputError(
                f"{folder / name} is no folder, where a run fills one: give another --adapter-path"
            )


def occupied(folder: Path, held: Sequence[str]) -> OutputError:
    """Return the refusal to write where a run, an adapter, or something else is under names that a run writes."""
    another = "--overwrite replaces it, or give another --adapter-path"
    if is_run(folder):
        return OutputError(
            f"{folder} holds a run already ({held[0]}): --resume goes on with it, {another}"
        )
    if {WEIGHTS, CONFIG} <= set(held):
        return OutputError(
            f"{folder} holds an adapter already ({WEIGHTS}), and no run to go on with:"
            f" --resume-adapter-file {folder} with another --adapter-path starts from it,"
            " --overwrite replaces it"
        )
    return OutputError(
        f"{folder} holds {', '.join(held[:3])}, which no run there has written: {another}"
    )
