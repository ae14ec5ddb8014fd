"""The command that trains a run again, and the settings that it needs."""

import shlex
from typing import Any

from ..adapters.stored_files import UNKNOWN_MODEL
from ..config import TrainConfig
from ..settings import configure, fit_to_length, settings_of
from .history import Run

_DECIDING = ("adapter", "init", "lr_ratio")  # the defaults of other settings depend on them
_USES_OF_THE_FOLDER = ("resume", "overwrite")


def train_command(run: Run) -> str:
    """Return the command that trains a run again, in a folder of its own, ready to paste."""
    words = ["mlx_loraplus.train"]
    again = {"adapter_path": f"{run.config.adapter_path}-again"}
    for name, value in (changed_settings(run) | again).items():
        words += _flag(name, value)
    return shlex.join(words)


def changed_settings(run: Run) -> dict[str, Any]:
    """Return the settings of a run that differ from their defaults."""
    settings = settings_of(run.config)
    first = settings_of(configure(TrainConfig, {}))

    # The other defaults depend on these settings, and on the length of the run.
    deciding = {name: settings[name] for name in _DECIDING}
    config = configure(TrainConfig, deciding)
    defaults = settings_of(fit_to_length(config, run.planned))
    defaults |= {name: first[name] for name in _DECIDING}

    for name in _USES_OF_THE_FOLDER:
        del settings[name]
    return {name: value for name, value in settings.items() if value != defaults[name]}


def _flag(name: str, value: Any) -> list[str]:
    """Return the words of one setting."""
    flag = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [flag, *map(str, value)]

    # A model that was not loaded by a name has only a description.
    text = "MODEL" if name == "model" and value.endswith(UNKNOWN_MODEL) else str(value)
    # A text such as the folder "-run" would be read as a flag of its own.
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]
