"""What a run writes into its folder, and whether a folder holds a run."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..adapters.damaged_files import CHECKPOINTS
from ..adapters.stored_files import CONFIG, MODULES, WEIGHTS
from ..config import TrainConfig
from ..errors import ConfigError, OutputError
from ..files import Contents, check_apart, check_contents
from ..models.save_model_folder import MODEL_CONFIG, MODEL_WEIGHTS
from ..settings import current_names, setting_names
from ..settings_file import read_settings
from .history import FUSED, HISTORY, PLOT, REPORT, RESIDUALS, SETTINGS, TRACKERS, read_history
from .state import BAD_BATCH

FILES = (
    WEIGHTS,
    CONFIG,
    HISTORY,
    SETTINGS,
    MODULES,
    PLOT,
    REPORT,
    RESIDUALS,
    FUSED,
    BAD_BATCH,
    TRACKERS,
)
FOLDERS = (CHECKPOINTS,)
_RUN_SETTINGS = ("adapter_path", "iters", "seed")  # a run writes all settings, not only some
_CHECKPOINT_NAME = re.compile(r"[0-9]{6,12}")  # the step


def held_names(folder: Path, *, whole_model: bool = False) -> list[str]:
    """Return the names in a folder that runs use for their files and folders.

    Args:
        folder: The folder.
        whole_model: Whether the run writes a model instead of an adapter.
    """
    names = [*FILES, *FOLDERS]
    if whole_model or holds_full_run(folder):
        names += [MODEL_WEIGHTS, MODEL_CONFIG]
    return [name for name in names if os.path.lexists(folder / name)]


def holds_full_run(folder: Path) -> bool:
    """Return whether a folder holds a run with adapter full, which writes a model."""
    with suppress(ConfigError):
        settings = read_settings(folder / SETTINGS)
        return settings.get("adapter") == "full" and settings.keys() >= set(_RUN_SETTINGS)
    return False


def is_run(folder: Path) -> bool:
    """Return whether a folder was written by a run: it has settings and a checkpoint, or a history.

    A run that was killed while it started may have left complete settings and nothing else.
    """
    has_settings = (folder / SETTINGS).is_file()
    if has_settings and newest_step(folder) is not None:
        return True

    # Only the history of a run begins with a schema.
    with suppress(OutputError, IndexError):
        return "schema" in read_history(folder)[0]
    if not has_settings:
        return False

    if held_names(folder) == [SETTINGS]:
        with suppress(ConfigError):
            names = current_names(read_settings(folder / SETTINGS))
            return names.keys() >= set(setting_names(TrainConfig))
    return False


def newest_step(folder: Path) -> int | None:
    """Return the step of a run's newest checkpoint without reading it, or None if it has none."""
    names = [path.name for path in (folder / CHECKPOINTS).glob("*") if path.is_dir()]
    return max((int(name) for name in names if _CHECKPOINT_NAME.fullmatch(name)), default=None)


def check_names(folder: Path) -> None:
    """Check that a run can write its files and folders.

    Raises:
        OutputError: A folder has the name of a file that a run writes, or the other way round.
    """
    for name in FILES:
        if (folder / name).is_dir():
            raise OutputError(
                f"{folder / name} is a folder, where a run writes a file: give another"
                " --adapter-path"
            )

    for name in FOLDERS:
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise OutputError(
                f"{folder / name} is a file, where a run writes a folder: give another"
                " --adapter-path"
            )


def check_unused(config: TrainConfig) -> None:
    """Check that a new run may write into its folder.

    Raises:
        OutputError: The folder holds a model that no run has written, a sweep or data, or is read
            by the run; or it holds files of a run, and ``overwrite`` is off.
    """
    folder = Path(config.adapter_path)
    others: tuple[Contents, ...] = ("a sweep", "data")
    if not holds_full_run(folder):
        others = ("a model", *others)
    check_contents(folder, others, "--adapter-path")
    read = [config.model, *config.data.data, config.resume_adapter_file or config.model]
    check_apart(folder, read, "--adapter-path")

    held = held_names(folder, whole_model=config.adapter.adapter == "full")
    if held and not config.overwrite:
        raise occupied(folder, held)


def no_run(folder: Path) -> OutputError:
    """Return the error for a folder that ``resume`` should continue but that holds no run."""
    if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
        return OutputError(
            f"{folder} holds an adapter, but no run to resume: to start from it, give"
            f" --resume-adapter-file {folder} and another --adapter-path instead of --resume"
        )
    return OutputError(
        f"{folder} holds no run to resume: give the run's --adapter-path, or leave out --resume"
    )


def occupied(folder: Path, held: Sequence[str]) -> OutputError:
    """Return the error for a folder that must not be written, because names of a run exist in it.

    Args:
        folder: The run's folder.
        held: From ``held_names``; not empty.
    """
    advice = "--overwrite replaces it, or give another --adapter-path"
    if is_run(folder):
        return OutputError(
            f"{folder} already holds a run ({held[0]}): --resume continues it, {advice}"
        )
    if {WEIGHTS, CONFIG} <= set(held):
        return OutputError(
            f"{folder} already holds an adapter ({WEIGHTS}), but no run to resume:"
            f" --resume-adapter-file {folder} with another --adapter-path starts from it,"
            " --overwrite replaces it"
        )
    return OutputError(f"{folder} holds {', '.join(held[:3])}, which no run has written: {advice}")
