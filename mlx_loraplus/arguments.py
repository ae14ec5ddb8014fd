"""Convert the command line and YAML to a config, and errors to one line and exit code 2."""

import contextlib
import dataclasses
import io
import os
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import tyro
import yaml

from . import __version__
from ._runtime import check_backend
from .command_config import positional_words
from .config import OLD_NAMES
from .errors import BackendError, ConfigError, LoRAPlusError
from .failures import failures_in_one_line
from .foreign_names import FOREIGN_NAMES
from .given_settings import name_of_flag, naming_file, read_given
from .help_text import help_text
from .interrupted_imports import INTERRUPTED, LAUNCHED, expect_interrupts, report_interrupt
from .rich_display import wrap_words
from .settings import Config, configure, setting_names, settings_of
from .spelling import FLAG
from .tyro_errors import unboxed
from .unknown_arguments import argument_names, find_dashed, make_argument_error


@dataclasses.dataclass(frozen=True)
class Switches:
    """Options that are not settings."""

    purpose: ClassVar[str] = ""  # what ``--help`` says first, if not what the config says

    config: Annotated[str | None, tyro.conf.arg(aliases=["-c"], metavar="FILE")] = None
    """YAML file of settings, named like the flags with _ for -; flags override it."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved settings as YAML, and exit."""


def parse(
    kind: type[Config], switches: type[Switches], arguments: Sequence[str], prog: str
) -> tuple[Config, Any]:
    """Parse the arguments of a command. Precedence: flag > YAML file > default.

    Args:
        kind: The config of the command.
        switches: The command's other options.
        arguments: The words after the command's name.
        prog: The command's name, for ``--help``.

    Returns:
        The config and the switches.

    Raises:
        ConfigError: Flags or YAML keys are unknown, or values are not allowed.
        SystemExit: After ``--help`` or ``--version``.
    """
    if {"-h", "--help", "--help-all"} & set(arguments):
        everything = "--help-all" in arguments
        log(help_text(kind, switches, prog.replace(".", " "), everything=everything))
        raise SystemExit(0)
    if "--version" in arguments:
        log(f"mlx_loraplus {__version__}")
        raise SystemExit(0)

    # The YAML file's settings, and flags of other programs, are tyro's defaults, which flags
    # override. If one command started several processes, only one reports the translation.
    if dashed := find_dashed(arguments, argument_names(kind, switches)):
        raise make_argument_error(dashed, arguments, kind, switches)
    quiet = LAUNCHED in os.environ or os.environ.get("MLX_RANK", "0") != "0"
    given = read_given(kind, _spell_out(arguments), quiet=quiet)
    with naming_file(given.file):
        configure(kind, given.in_file, whole=False)
    flags = {*setting_names(kind), *FOREIGN_NAMES}.difference(positional_words(kind))
    configure(kind, given.translated, whole=False, flags=flags)
    defaults = configure(kind, given.settings, whole=False)
    parts = [
        _part("switches", switches, dataclasses.field(default_factory=switches)),
        _part("settings", kind, defaults),
    ]
    command_type = dataclasses.make_dataclass("Command", parts)

    # tyro prints its errors in a box and exits. Convert the box to one line.
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed, unknown = tyro.cli(
                command_type,
                prog=prog,
                description=kind.__doc__,
                args=given.words,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(unboxed(printed.getvalue())) from None
        raise

    if unknown:
        raise make_argument_error(unknown, arguments, kind, switches)

    # Messages name a setting as the user wrote it: in the file, or as a flag.
    if given.file is not None:
        flags &= {*given.native, *given.translated, *FOREIGN_NAMES}
    return configure(kind, settings_of(parsed.settings), flags=flags), parsed.switches


def _part(name: str, kind: type, default: Any) -> tuple[str, Any, Any]:
    """Return a field of tyro's dataclass whose flags have no prefix."""
    return (name, tyro.conf.OmitArgPrefixes[kind], default)


def given_names(kind: type[Config], arguments: Sequence[str]) -> set[str]:
    """Return the names of the settings in a command's flags and its YAML file."""
    given = read_given(kind, arguments, quiet=True)
    names = set(given.settings)

    # A flag may be written --name, --name=value or --no-name.
    for word in given.words:
        if word.startswith("--"):
            name = name_of_flag(word)
            names |= {name, name.removeprefix("no_")}

    current = {OLD_NAMES.get(name, name) for name in names}
    return current.intersection(setting_names(kind))


def _spell_out(arguments: Sequence[str]) -> list[str]:
    """Replace old flag names, and write values as tyro reads them.

    ``--grad-checkpoint`` without a value becomes ``on``, and trackers may be separated by commas.
    """
    words: list[str] = []
    setting = ""
    for word, following in pairwise([*arguments, ""]):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in OLD_NAMES:
            flag = "--" + OLD_NAMES[name].replace("_", "-")
        setting = name if FLAG.match(word) else setting
        if setting == "report_to":
            words += _spell_out_trackers(word)
            continue
        words.append(flag + equals + value)

        if word == "--grad-checkpoint" and (not following or FLAG.match(following)):
            words.append("on")
    return words


def _spell_out_trackers(word: str) -> list[str]:
    """Return ``--report-to=a,b`` or ``a,b`` as separate words, without the word none."""
    flag, _, values = word.partition("=") if FLAG.match(word) else ("", "", word)
    trackers = [name for name in values.split(",") if name not in ("", "none")]
    return [flag, *trackers] if flag else trackers


@contextlib.contextmanager
def command(
    name: str,
    kind: type[Config],
    arguments: Sequence[str] | None,
    switches: type[Switches] = Switches,
) -> Generator[tuple[Config, Any]]:
    """Yield a command's config and switches, and handle the errors of the block.

    Errors that the user can fix become one line on standard error and exit code 2.

    Args:
        name: The command's name, for ``--help``.
        kind: The config of the command.
        arguments: The words after the command's name. Default: the arguments of the process.
        switches: The command's other options.
    """
    expect_interrupts()

    # A terminal without Unicode shows question marks instead of raising.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")

    try:
        words = sys.argv[1:] if arguments is None else arguments
        config, chosen = parse(kind, switches, words, name)
        if chosen.print_config:
            print(yaml.safe_dump(settings_of(config), sort_keys=False), end="")
            raise SystemExit(0)
        with failures_in_one_line():
            yield config, chosen
    except LoRAPlusError as error:
        if not error.reported:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ImportError:
        _report_backend()
        raise
    except KeyboardInterrupt:
        report_interrupt()
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of the output has closed, so nothing is reported
        _discard_output()
        raise SystemExit(1) from None
    # Errors about a path. The likely ones are caught earlier and reported with advice.
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename!s:.200}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


def _report_backend() -> None:
    """Exit with one line if MLX can't start on this machine."""
    try:
        check_backend()
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


class Output:
    """Standard output that discards text after its reader, a terminal or a pipe, has closed."""

    def write(self, text: str) -> int:
        """Write text, and return the number of characters written."""
        return self._try(lambda: sys.stdout.write(text)) or 0

    def flush(self) -> None:
        """Flush what was written."""
        self._try(sys.stdout.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError:
            _discard_output()


def _discard_output() -> None:
    """Connect standard output to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log(line: str) -> None:
    """Print one line immediately; do nothing if the reader has closed."""
    if sys.stdout.isatty():
        line = wrap_words(line, shutil.get_terminal_size().columns)
    print(line, file=Output(), flush=True)
