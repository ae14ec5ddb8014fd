"""The paths in a run's settings, which work from any folder and after the run has moved.

A run stores absolute paths. If a path no longer exists, the place that it had relative to the run's
folder is tried, so that a run may be moved or copied together with its model and data.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..settings import settings_of
from ..settings_file import read_settings
from .known_models import MODELS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PATH_SETTINGS = ("model", "data", "resume_adapter_file")
"""The settings, besides ``adapter_path``, that hold a path, a list of paths, or other names."""


def lasting_name(name: str) -> str:
    """Return the absolute path of an existing file or folder, and any other name unchanged."""
    if name in MODELS or not Path(name).exists():
        return name
    return str(Path(name).absolute())


def stored_settings(config: "DataclassInstance") -> dict[str, Any]:
    """Return a config's settings with absolute paths, for a file in the folder of a run."""
    settings = settings_of(config)
    for name in PATH_SETTINGS:
        if name in settings:  # a sweep has fewer
            settings[name] = _each(settings[name], lasting_name)
    return settings | {"adapter_path": str(Path(settings["adapter_path"]).absolute())}


def read_run_settings(file: Path) -> dict[str, Any]:
    """Return the settings in a file that a run wrote into its folder, with paths that exist now.

    Raises:
        ConfigError: The file can't be read, or holds something other than settings.
    """
    return relocated(read_settings(file), file.parent)


def relocated(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings of a run whose folder is now ``folder``, with paths that exist now."""
    written_in = settings.get("adapter_path")
    if not isinstance(written_in, str):
        return {**settings, "adapter_path": str(folder)}

    def find(name: str) -> str:
        return present_path(name, written_in, folder)

    moved = {name: _each(settings[name], find) for name in PATH_SETTINGS if name in settings}
    return {**settings, **moved, "adapter_path": str(folder)}


def present_path(name: str, written_in: str, folder: Path) -> str:
    """Return the present place of a path that a run has stored.

    Args:
        name: The stored path, or another name, which is returned unchanged.
        written_in: The folder of the run when the path was stored.
        folder: The folder of the run now.
    """
    is_absolute = Path(name).is_absolute()
    if name in MODELS or is_absolute != Path(written_in).is_absolute():
        return name

    # A relative path was relative to an unknown folder, so its place beside the run comes first.
    beside = Path(os.path.normpath(folder.absolute() / os.path.relpath(name, written_in)))
    places = [Path(name), beside] if is_absolute else [beside, Path(name)]
    for place in places:
        if place.exists():
            return str(place.absolute())
    return name


def _each(value: Any, change: Any) -> Any:
    """Apply ``change`` to a name, or to each name in a list; other values stay unchanged."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_each(item, change) for item in value]
    return value
