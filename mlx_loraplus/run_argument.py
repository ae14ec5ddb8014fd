"""The folder of a run or an adapter, which some commands take as a word without a flag."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro

from .arguments import Switches, given_names
from .command_config import ExportConfig, FuseConfig
from .config import TrainConfig
from .errors import ConfigError
from .settings import Config, configure, settings_of
from .userpaths import check_not_divided

DEFAULT_RUN = TrainConfig.adapter_path


@dataclasses.dataclass(frozen=True)
class AdapterSwitches(Switches):
    """Options of the commands that use one adapter, and that are not settings."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """Folder of the run or adapter; the same as --adapter-path."""


@dataclasses.dataclass(frozen=True)
class FuseSwitches(Switches):
    """Options of ``fuse`` that are not settings."""

    run: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Folders of the runs or adapters; the same as --adapter-path."""


def with_run(config: Config, switches: Any, words: Sequence[str]) -> Config:
    """Return the config with the folder that was given without ``--adapter-path``, if any.

    Raises:
        ConfigError: The folder is given in both ways, or in none and the default does not exist.
    """
    is_given = "adapter_path" in given_names(type(config), words)
    if not switches.run and not is_given:
        _check_default_run(config)
    if not switches.run:
        return config
    if isinstance(switches.run, tuple):
        check_not_divided(switches.run)
    if is_given:
        raise ConfigError("the adapter is given twice: leave out --adapter-path")
    return configure(type(config), settings_of(config) | {"adapter_path": switches.run})


def _check_default_run(config: Any) -> None:
    """Check that a command that needs an adapter, and was given none, finds one.

    Raises:
        ConfigError: The folder that it would use does not exist.
    """
    examples = {FuseConfig: "fuse my_run", ExportConfig: "export my_run --to gguf"}
    example = examples.get(type(config))
    if example and not Path(DEFAULT_RUN).exists():
        raise ConfigError(
            f"there is no folder {DEFAULT_RUN}: give the folder of a run or an adapter, as in"
            f" mlx_loraplus.{example}"
        )


def spell_out_adapters(arguments: Sequence[str]) -> list[str]:
    """Replace ``--adapter a:0.7 --adapter b:0.3`` by ``--adapter-path a:0.7 b:0.3``."""
    # The word after each --adapter is a folder.
    folders: list[str] = []
    rest: list[str] = []
    for before, word in pairwise(["", *arguments]):
        if before == "--adapter":
            folders.append(word)
        elif word != "--adapter":
            rest.append(word)
    return [*rest, "--adapter-path", *folders] if folders else list(arguments)
