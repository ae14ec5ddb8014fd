"""Read the settings that a command is given in flags, in a YAML file and in other programs' names.

``arguments.py`` makes the command's config of them.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Collection, Generator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError
from .foreign_names import find_foreign
from .migration import translate
from .models.moved_run_paths import read_run_settings
from .settings import Config, setting_names, settings_of
from .settings_file import check_settings_file, read_settings
from .spelling import FLAG
from .userpaths import path_of

_SWITCHES = ("test",)
"""Settings of other programs that are options of commands here."""

# File of settings that a run or a sweep wrote → a file beside it, the command that wrote it, and a
# setting that only this command has.
_OWN_FILES = {
    "run.yaml": ("history.jsonl", "train", "epochs"),
    "sweep.yaml": ("trials.jsonl", "sweep", "learning_rates"),
}


@dataclasses.dataclass(frozen=True)
class Given:
    """What a command was given.

    Attributes:
        words: The words for tyro, without the flags of other programs.
        native: The settings whose flags are among these words.
        translated: The settings that the flags of other programs stand for.
        in_file: The settings in the YAML file.
        file: The YAML file, or None.
    """

    words: list[str]
    native: dict[str, Any]
    translated: dict[str, Any]
    in_file: dict[str, Any]
    file: Path | None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in the YAML file and in the flags of other programs, which override it."""
        return self.in_file | self.translated


@contextlib.contextmanager
def naming_file(file: Path | None) -> Generator[None]:
    """Put the name of a YAML file before the problems of its settings."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def read_given(kind: type[Config], arguments: Sequence[str], *, quiet: bool = False) -> Given:
    """Read the YAML file, and translate the settings of other programs in it and in flags.

    Args:
        kind: The config of the command.
        arguments: The words after the command's name.
        quiet: Do not report what was translated.

    Raises:
        ConfigError: The file can't be read, a flag lacks its value or is given twice, or a setting
            of another program has no counterpart here.
    """
    words, native, foreign = _sort_flags(kind, arguments)
    file = _settings_file(words)
    stored = _read_yaml(file, setting_names(kind))

    # Flags override the file.
    if foreign:
        flags = native | foreign
        found = translate(kind, flags, native, stored, quiet=quiet, as_flags=True)
        foreign = {name: value for name, value in found.items() if name not in native}
    with naming_file(file):
        in_file = translate(kind, stored, native | foreign, quiet=quiet)

    # A length as a flag replaces the one in the file, whether in steps or in epochs.
    lengths = {"iters", "epochs"}
    if lengths & (native.keys() | foreign.keys()):
        in_file = {name: value for name, value in in_file.items() if name not in lengths}
    return Given(words, native, foreign, in_file, file)


def _sort_flags(
    kind: type[Config], arguments: Sequence[str]
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Return the words without the flags of other programs, the settings, and those of others.

    Raises:
        ConfigError: A flag lacks its value, or is given twice.
    """
    # A flag has the words up to the next flag as its values. Only those of other programs are
    # taken out of the words that tyro reads.
    known = setting_names(kind)
    lists = _list_settings(kind)
    words: list[str] = []
    foreign: dict[str, Any] = {}
    native: dict[str, Any] = {}
    flags = [number for number, word in enumerate(arguments) if FLAG.match(word)]
    for start, stop in pairwise([0, *flags, len(arguments)]):
        first, *values = arguments[start:stop] or [""]
        name = name_of_flag(first) if first.startswith("--") else ""
        if "=" in first:
            values = [first.partition("=")[2], *values]

        is_foreign = name not in known and name not in _SWITCHES and find_foreign(name)
        if is_foreign:
            foreign[name] = _flag_value(values)
            continue
        words += arguments[start:stop]
        if name in known:
            if name in lists and not values:
                raise ConfigError(f"{first} needs at least one value after it")
            # If a flag with one value is repeated, the last value counts. A list would lose values.
            if name in lists and name in native:
                flag = first.partition("=")[0]
                raise ConfigError(f"{flag} is given twice: write all its values after one {flag}")
            native[name] = _flag_value(values)
    return words, native, foreign


def _list_settings(kind: type[Config]) -> set[str]:
    """Return the settings whose flag takes one or more values."""
    defaults = settings_of(kind())
    lists = {name for name, value in defaults.items() if isinstance(value, list)}
    return lists - {"report_to"}  # it also takes the word none, which leaves no value


def name_of_flag(flag: str) -> str:
    """Return the name of the setting of a flag, such as ``--batch-size=8``."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_")


def _flag_value(values: Sequence[str]) -> Any:
    """Return the value of a flag as YAML would read it; a flag without a value is True."""
    if not values:
        return True
    read: list[Any] = []
    for value in values:
        try:
            read.append(yaml.safe_load(value))
        except yaml.YAMLError:
            read.append(value)
    return read[0] if len(read) == 1 else read


def _settings_file(arguments: Sequence[str]) -> Path | None:
    """Return the file after -c or --config, or None.

    Raises:
        ConfigError: There are several, or the name is not a path.
    """
    # Only this flag is read here; all others are left to tyro.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", nargs="?", action="append")
    paths = [path for path in parser.parse_known_args(arguments)[0].config or () if path]
    if not paths:
        return None
    if len(paths) > 1:
        raise ConfigError(f"-c is given twice ({', '.join(paths)}): give one file of settings")

    return path_of(paths[0], "--config", ConfigError)


def _read_yaml(file: Path | None, known: Collection[str]) -> dict[str, Any]:
    """Return the settings in a YAML file, which tyro needs as defaults.

    Args:
        file: The file, or None.
        known: The command's settings.

    Raises:
        ConfigError: The file can't be read, or holds settings of another command.
    """
    if file is None:
        return {}
    check_settings_file(file)

    # The paths in a file that a run or a sweep wrote still work if its folder was moved.
    beside, command_name, setting = _OWN_FILES.get(file.name, ("", "", ""))
    if beside and (file.parent / beside).is_file():
        if setting not in known:
            raise ConfigError(
                f"{file} holds settings of mlx_loraplus.{command_name}: give the settings of this"
                " command as flags, or in a file of its own"
            )
        return read_run_settings(file)
    return read_settings(file)
