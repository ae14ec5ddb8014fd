"""The folder of a sweep: its settings, its trials, and what it found."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from ..command_config import SweepConfig
from ..errors import ConfigError, OutputError
from ..files import (
    check_apart,
    check_contents,
    check_writable,
    read_bounded,
    write_atomically,
)
from ..models.moved_run_paths import stored_settings
from ..runs.matplotlib_plots import write_picture
from ..settings import settings_of
from .sweep_page import sweep_page
from .sweep_result import BEST, SETTINGS, Sweep
from .trial import Trial, run_config_of

TRIALS, PAGE, PICTURE = "trials.jsonl", "sweep.html", "heatmap.png"
FILES = (TRIALS, SETTINGS, PAGE, PICTURE, BEST)


def check_sweep_folder(config: SweepConfig) -> None:
    """Check that the sweep's folder can be used, before any slow work starts.

    Raises:
        OutputError: ``adapter_path`` is a file; it holds a model, a run, an adapter or data, or is
            read by the sweep; it holds files with names that a sweep uses, and neither
            ``overwrite`` nor ``resume`` is on; or it holds no sweep, and ``resume`` is on.
    """
    folder = Path(config.adapter_path)
    check_writable(folder, "--adapter-path")
    check_contents(folder, ("a model", "a run", "an adapter", "data"), "--adapter-path")
    read = [config.model, *config.data.data, config.resume_adapter_file or config.model]
    check_apart(folder, read, "--adapter-path")

    # Names that a sweep writes.
    held = [name for name in FILES if os.path.lexists(folder / name)]
    for name in held:
        if (folder / name).is_dir():
            raise OutputError(
                f"{folder / name} is a folder, where a sweep writes a file: give another"
                " --adapter-path"
            )

    # The content of the folder must agree with --resume and --overwrite.
    if config.resume and TRIALS not in held:
        raise OutputError(
            f"{folder} holds no sweep to resume: give a sweep's --adapter-path, or omit --resume"
        )
    if config.resume and not (folder / TRIALS).stat().st_size:
        raise OutputError(f"{folder / TRIALS} is empty: start again with --overwrite")
    if held and not (config.resume or config.overwrite):
        another = "--overwrite replaces it, or give another --adapter-path"
        if TRIALS in held:
            raise OutputError(f"{folder} already holds a sweep: --resume continues it, {another}")
        raise OutputError(
            f"{folder} holds {', '.join(held)} without the trials of a sweep: {another}"
        )


def start_sweep_folder(config: SweepConfig, identity: Mapping[str, Any]) -> list[Trial]:
    """Write the settings, and return the trials that have already ended.

    Raises:
        ConfigError: The trials are of another model or other data, or used other settings.
        OutputError: The trials can't be read.
    """
    folder = Path(config.adapter_path)
    trials: list[Trial] = []
    if config.resume:
        trials = _read_trials(folder, identity)
    else:
        for name in (PAGE, PICTURE, BEST):
            (folder / name).unlink(missing_ok=True)

    # Without these two, sweep.yaml can be given to a new sweep or with --resume.
    settings = stored_settings(config)
    for name in ("resume", "overwrite"):
        del settings[name]
    write_atomically(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False).encode())
    write_trials(folder, identity, trials)
    return trials


def _read_trials(folder: Path, identity: Mapping[str, Any]) -> list[Trial]:
    """Read the trials of a sweep of the same identity; raises as ``start_sweep_folder`` does."""
    path = folder / TRIALS
    try:
        first, *lines = map(json.loads, read_bounded(path, 1 << 30).splitlines())
        for line in lines:
            if line["loss"] is None:  # JSON has no infinity
                line["loss"] = math.inf
        trials = TypeAdapter(list[Trial]).validate_python(lines)

        # The first line is the identity. Settings that it lacks are newer, and had their defaults.
        before, now = settings_of(SweepConfig()) | first["settings"], identity["settings"]
        different = [name for name in now if before[name] != now[name]]
        others = [name for name in identity if name != "settings"]
        different += [name for name in others if first.get(name, "") != identity[name]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OutputError(
            f"{path} can't be read ({reason}): start again with --overwrite"
        ) from None

    if different:
        raise ConfigError(
            f"can't resume {folder}: {', '.join(different)} differ; use the settings in its"
            " sweep.yaml with the same files, or start a new sweep in another --adapter-path"
        )
    return trials


def write_trials(folder: Path, identity: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """Write the identity, then the trials, one JSON object per line."""
    lines = [dict(identity)]
    for trial in trials:
        loss = trial.loss if math.isfinite(trial.loss) else None
        lines.append(asdict(trial) | {"loss": loss})

    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(folder / TRIALS, text.encode())


def write_live_page(sweep: Sweep) -> None:
    """Write the page of a sweep that is still running."""
    page = sweep_page(sweep, live=True)
    write_atomically(Path(sweep.config.adapter_path) / PAGE, page, durable=False)


def write_findings(sweep: Sweep) -> None:
    """Write the page, the heat maps and, after a finished sweep, the settings to train with."""
    folder = Path(sweep.config.adapter_path)
    if sweep.trials:
        write_picture(sweep.plot(), folder / PICTURE)
        write_atomically(folder / PAGE, sweep_page(sweep))

    if sweep.outcome == "finished":
        run = run_config_of(
            sweep.config,
            **sweep.settings,
            adapter_path="adapters",
            resume=False,
            overwrite=False,
            max_minutes=None,
        )
        settings = stored_settings(run) | {"adapter_path": run.adapter_path}
        text = yaml.safe_dump(settings, sort_keys=False)
        write_atomically(folder / BEST, text.encode())
