"""From the command line and YAML to a config, and from an error to one line and exit code 2."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from .config import OLD_NAMES
from .errors import ConfigError, LoRAPlusError, join_problems, nearest
from .settings import Config, configure, read_settings, setting_names, settings_of
from .userpaths import user_path

INTERRUPTED = 130  # the exit code after Ctrl-C, so that `train … && fuse …` does not go on
_KINDS = {
    "{None}|": "",
    "{auto}": "auto",
    "|": " or ",
    "INT": "a whole number",
    "FLOAT": "a number",
}
_UNPARSED = re.compile(
    r"Error parsing (--[\w-]+): no type matching (\S+) could be instantiated from \[(.*?)\]\."
)
_UNPARSED_LIST = re.compile(
    r"Error parsing (--[\w-]+): Could not find valid parse for arguments: \[(.*?)\]"
)


@dataclasses.dataclass(frozen=True)
class Switches:
    """What a command does besides its settings."""

    config: Annotated[str | None, tyro.conf.arg(aliases=["-c"], metavar="FILE")] = None
    """YAML file of settings, named as the flags are, with _ for -; flags win over it."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved settings as YAML, and stop."""


def parse(
    kind: type[Config], switches: type[Switches], arguments: Sequence[str], prog: str
) -> tuple[Config, Any]:
    """Read the arguments of the command ``prog``: flag > YAML file > default.

    Raises:
        ConfigError: Unknown flags or YAML keys, told with the nearest known ones, or values that
            are not allowed.
        SystemExit: After ``--help``.
    """
    arguments = _spell_out(arguments)
    parts = dataclasses.make_dataclass(
        "Command",
        [
            (
                "switches",
                tyro.conf.OmitArgPrefixes[switches],
                dataclasses.field(default_factory=switches),
            ),
            (
                "settings",
                tyro.conf.OmitArgPrefixes[kind],
                configure(kind, _read_yaml(arguments), whole=False),
            ),
        ],
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(
                parts, prog=prog, description=kind.__doc__, args=arguments, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(_unboxed(said.getvalue())) from None
        raise
    if unknown:
        names = [*setting_names(kind), *(field.name for field in dataclasses.fields(switches))]
        flags = [f"--{name.replace('_', '-')}" for name in names]
        words = [
            f"{word!r} is no flag{nearest(word.split('=')[0], flags)}"
            for word in unknown
            if word.startswith("-")
        ]
        raise ConfigError(join_problems(words or [f"unexpected argument {unknown[0]!r}"]))
    return configure(kind, settings_of(parsed.settings)), parsed.switches


def given_names(kind: type[Config], arguments: Sequence[str]) -> set[str]:
    """Return the settings that a command's arguments, or the YAML file among them, give themselves."""
    words = {
        word.partition("=")[0].lstrip("-").replace("-", "_")
        for word in arguments
        if word.startswith("--")
    }
    words |= {word.removeprefix("no_") for word in words}
    given = dict.fromkeys(words | _read_yaml(arguments).keys())
    return {OLD_NAMES.get(name, name) for name in given} & set(setting_names(kind))


def _spell_out(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the present names of flags, and ``--grad-checkpoint`` alone as ``on``."""
    words: list[str] = []
    for word, following in pairwise([*arguments, ""]):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in OLD_NAMES:
            flag = "--" + OLD_NAMES[name].replace("_", "-")
        words.append(flag + equals + value)
        if word == "--grad-checkpoint" and following not in ("auto", "on", "off"):
            words.append("on")
    return words


@contextlib.contextmanager
def command(
    name: str,
    kind: type[Config],
    arguments: Sequence[str] | None,
    switches: type[Switches] = Switches,
) -> Generator[tuple[Config, Any]]:
    """Yield the config and switches in a command's arguments, which are by default those of the process.

    What a person can mend becomes one line and exit code 2, in the block too.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows a question mark
    try:
        config, chosen = parse(
            kind, switches, sys.argv[1:] if arguments is None else arguments, name
        )
        if chosen.print_config:
            print(yaml.safe_dump(settings_of(config), sort_keys=False), end="")
            raise SystemExit(0)
        yield config, chosen
    except LoRAPlusError as error:
        if not error.told:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader has gone: say nothing more
        raise SystemExit(1) from None
    # Of a path; those that a person is likely to meet are told better where they happen
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename!s:.200}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


class Output:
    """Standard output that says nothing any more once nobody reads it: a closed terminal or pipe."""

    def write(self, text: str) -> int:
        """Write."""
        return self._try(lambda: sys.stdout.write(text)) or 0

    def flush(self) -> None:
        """Flush."""
        self._try(sys.stdout.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log(line: str) -> None:
    """Print one line at once, as long as somebody reads."""
    print(line, file=Output(), flush=True)


def _read_yaml(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings in the file after -c or --config; tyro needs them before it reads the flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", nargs="?")
    path = parser.parse_known_args(arguments)[0].config
    if path is None:
        return {}
    try:
        return read_settings(Path(user_path(path)))
    except ValueError as problem:
        if isinstance(problem, ConfigError):
            raise
        raise ConfigError(f"--config {problem}, not {path!r:.80}") from None


def _unboxed(said: str) -> str:
    """Return tyro's boxed complaint as one line, without its frame, title and advice to read the help."""
    lines = [line.strip("│ ") for line in said.splitlines() if line.startswith("│")]
    body = " ".join(
        line
        for line in lines[
            : next((i for i, line in enumerate(lines) if line.startswith("──")), None)
        ]
    )
    if found := _UNPARSED.match(body):
        flag, kinds, value = found.groups()
        for kind, words in _KINDS.items():
            kinds = kinds.replace(kind, words)
        return f"{flag} takes {kinds}, not {value}"
    if found := _UNPARSED_LIST.match(body):
        return "{} can't take {}".format(*found.groups())
    return body.replace(" .", ".").replace("('None', ", "(") or said.strip()
