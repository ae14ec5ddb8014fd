"""What to do about the arguments that a command does not know."""

import dataclasses
import re
import shlex
from collections.abc import Container, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from .command_config import (
    CONFIGS,
    SHORT_FLAGS,
    positional_words,
)
from .errors import ConfigError, LoRAPlusError, join_problems, nearest_names
from .foreign_names import foreign_hint, meant_setting
from .models.known_models import MODELS
from .settings import TRAIN_FLAGS, in_rows, setting_names
from .spelling import FLAG, flag_of
from .userpaths import divided_path, similar_paths
from .value_hints import listed_numbers, sweep_advice

_DASHES = "\u2013\u2014\u2212"  # en dash, em dash and minus sign
_WITH_DASH = re.compile(rf"-*[{_DASHES}][-{_DASHES}]*(?=[A-Za-z])")

# Words for the rows to validate or to test on, which are files and have no flag
_SPLIT = re.compile(r"(valid|validation|val|eval|dev|test)(_(data|dataset|file|files|path|set))?")

# The least similarity of a flag that may be meant, and if another command has this very flag
_SIMILAR, _ALMOST_EQUAL = 0.6, 0.8

# The flags of ``plan`` that no other command has
_PLAN_FLAGS = ("memory",)

_PROMPT = "a prompt follows --prompt, as in --prompt"
_OTHER_COMMAND = "a flag of mlx_loraplus.{}, and not of this command"

# Short flags → their settings
_LONG_NAMES = {short: name for name, short in SHORT_FLAGS.items()}


def argument_names(kind: type, switches: type) -> list[str]:
    """Return the names of a command's settings and other options."""
    return [*setting_names(kind), *(field.name for field in dataclasses.fields(switches))]


def make_argument_error(
    unknown: Sequence[str], arguments: Sequence[str], kind: type, switches: type
) -> ConfigError:
    """Return the error for arguments that a command does not know.

    Args:
        unknown: These arguments.
        arguments: All words after the command's name.
        kind: The config of the command.
        switches: The command's other options.
    """
    for word in arguments:  # such as --pack=yes
        flag, equals, value = word.partition("=")
        if equals and value == unknown[0] and flag.startswith("--"):
            off = flag.replace("--", "--no-", 1)
            return ConfigError(f"{flag} takes no value, not {value!r}: write {flag}, or {off}")

    names = [*argument_names(kind, switches), "help", "help_all", "version"]
    without_flag = positional_words(kind, switches)
    # A text editor turns two hyphens into one dash.
    flags = [word for word in unknown if word.startswith(("-", *_DASHES))]
    problems = [_about_flag(word, names, without_flag) for word in flags]
    if not problems:
        problems = [f"unexpected argument {unknown[0]!r}: {_advice(unknown, arguments, names)}"]
    return ConfigError(join_problems(problems))


def find_dashed(arguments: Sequence[str], known: Container[str]) -> list[str]:
    """Return the words that are flags, but for a dash that a text editor has put for a hyphen."""
    found: list[str] = []
    for word in arguments:
        name, dashes = _WITH_DASH.subn("", word.split("=")[0], count=1)
        is_start = dashes and word.lstrip(f"-{_DASHES}").startswith(name)
        if is_start and name.replace("-", "_") in known:
            found.append(word)
    return found


def _about_flag(word: str, names: Sequence[str], without_flag: Container[str]) -> str:
    """Return what is wrong with a flag, and which one may be meant.

    Args:
        word: The flag as it was written.
        names: The settings and options of the command.
        without_flag: Those of them that are written without a flag.
    """
    flag = _WITH_DASH.sub("--", word.split("=")[0], count=1)
    name = flag.lstrip("-").replace("-", "_")
    if name in without_flag:
        return f"{word!r} is not a flag: leave it out, and write its value alone"
    names = [each for each in names if each not in without_flag]
    if meant := meant_setting(name, names):
        return f"{word!r} is not a flag (did you mean '{flag_of(meant)}'?)"
    if not word.startswith("--") and len(word) == 2:
        is_prompt = word == SHORT_FLAGS["prompt"]
        other = _OTHER_COMMAND.format("generate")
        return f"{word!r} is {other if is_prompt else 'not a flag (--help lists the flags)'}"
    hint = _rows_hint(name, names) or ("" if name in TRAIN_FLAGS else foreign_hint(flag))
    if hint:
        return f"{word!r} is not a flag{hint}"

    # Flags of other commands, and similar ones of this command
    owners = flag_owners(flag)
    problem = f"{word!r} is not a flag"
    is_other = bool(owners) and name not in names
    if is_other:
        problem = f"{word!r} is {_OTHER_COMMAND.format(owners[0])}"
    if similar := nearest_names(name, names, _ALMOST_EQUAL if is_other else _SIMILAR):
        meant = " or ".join(repr(flag_of(other)) for other in similar)
        return f"{problem} (did you mean {meant}?)"
    return problem if is_other else f"{problem} (--help lists the flags)"


def _rows_hint(name: str, names: Sequence[str]) -> str:
    """Return where rows, or what they hold, are given that a flag asks for; "" otherwise."""
    if where := in_rows(name, names):
        return f": {where}"
    split = _SPLIT.fullmatch(name)
    if split is None or name in (*names, *TRAIN_FLAGS) or "data" not in names:
        return ""
    file = "test.jsonl" if split[1] == "test" else "valid.jsonl"
    return f": name the file {file}, put it beside train.jsonl, and give their folder as --data"


def flag_owners(flag: str) -> list[str]:
    """Return the commands that have a flag, the most likely one first."""
    name = _name_of(flag)
    owners = [command for command, kind in CONFIGS.items() if name in _flag_names(kind)]
    if name in _PLAN_FLAGS:
        owners.append("plan")
    return owners or ["train"] * (name in TRAIN_FLAGS or flag == "-c")


def _name_of(flag: str) -> str:
    """Return the name of the setting of a flag, which may be short or have a value."""
    flag = flag.split("=")[0]
    return _LONG_NAMES.get(flag, flag.lstrip("-").replace("-", "_"))


def takes_value(word: str) -> bool:
    """Return whether a word is a flag of a command, and its value is the next word."""
    if not word.startswith("-") or "=" in word:
        return False
    owners = flag_owners(word)
    name = _name_of(word)
    if name in TRAIN_FLAGS:
        return name in ("launch", "log_format", "verbosity")
    return bool(owners) and not any(
        field.type in (bool, "bool") and field.name == name
        for owner in owners
        for field in _fields_of(CONFIGS[owner])
    )


def _fields_of(kind: Any) -> Iterator[dataclasses.Field[Any]]:
    """Yield the fields of a config and of its parts."""
    for field in dataclasses.fields(kind):
        yield field
        if dataclasses.is_dataclass(field.default_factory):
            yield from dataclasses.fields(field.default_factory)


def _flag_names(kind: type) -> list[str]:
    """Return the settings of a command that have a flag."""
    return [name for name in setting_names(kind) if name not in positional_words(kind)]


def _advice(words: Sequence[str], arguments: Sequence[str], names: Sequence[str]) -> str:
    """Return what to do about words that are not values of flags."""
    word = words[0]
    advice = (
        _several_values(word, arguments)
        or _after_switch(word, arguments)
        or _divided_path(words, arguments)
    )
    if advice:
        return advice

    if word.endswith((".yaml", ".yml")):
        return f"a file of settings follows -c, as in -c {word}"
    text = _meant_prompt(words, arguments)
    if "prompt" in names and not {"--prompt", SHORT_FLAGS["prompt"]} & set(arguments):
        return f"{_PROMPT} {text}"
    if "max_tokens" in names and "prompt" not in names and not Path(word).exists():  # chat
        example = f"mlx_loraplus.generate … --prompt {text}"
        return f"chat reads messages once it runs; for one answer, {example}"
    return _advice_on_path(Path(word), names)


def _after_switch(word: str, arguments: Sequence[str]) -> str:
    """Return what to do about a word after a flag that takes no value; "" otherwise."""
    before = arguments[arguments.index(word) - 1] if word in arguments[1:] else ""
    if word.lower() in ("true", "false", "yes", "no", "on", "off"):
        return "a flag that is on or off has no value, as in --pack or --no-pack"
    if before == "--resume":
        run = Path(word) / "run.yaml"
        own = f"-c {run} --resume continues this run"
        other = "it continues the run or sweep in --adapter-path"
        return f"--resume takes no value: {own if run.is_file() else other}"
    return f"{before} takes no value" if before.startswith("--") else ""


def _divided_path(words: Sequence[str], arguments: Sequence[str]) -> str:
    """Return what to do if the first words are one path, divided by the shell; "" otherwise."""
    first = arguments[0]
    parts = list(words) if first in words or first.startswith("-") else [first, *words]
    count = divided_path(parts)
    if not count:
        return ""
    quotes, rest = f"put quotes around {' '.join(parts[:count])!r}", " ".join(parts[count:])
    return f"{quotes}, and {_PROMPT} {shlex.quote(rest)}" if rest else quotes


def _meant_prompt(words: Sequence[str], arguments: Sequence[str]) -> str:
    """Return the words of a prompt without quotes, in quotes."""
    first = Path(arguments[0])
    is_taken = arguments[0] not in words and not arguments[0].startswith("-")
    if is_taken and not first.exists() and not similar_paths(first):  # it is no run
        words = [arguments[0], *words]
    return shlex.quote(" ".join(words))


def _several_values(word: str, arguments: Sequence[str]) -> str:
    """Return what to do about a word after the one value of a flag; "" otherwise."""
    # The last flag before the word, and the words up to the next flag.
    place = arguments.index(word) if word in arguments else 0
    flags = [number for number in range(place) if arguments[number].startswith("-")]
    if not flags:
        return ""
    flag = arguments[flags[-1]]
    values = takewhile(lambda each: not FLAG.match(each), arguments[flags[-1] + 1 :])
    written = " ".join(values)

    if numbers := listed_numbers(written):
        return f"{flag} takes {sweep_advice(_name_of(flag), numbers)}"
    is_text = _name_of(flag) in ("prompt", "system") or Path(written).exists()
    if is_text and takes_value(flag):
        return f"put quotes around text with spaces, as in {flag} {shlex.quote(written)}"
    return ""


def _advice_on_path(path: Path, names: Sequence[str]) -> str:
    """Return what to do about a word that may be a path."""
    follow = "values follow their flags"
    if path.is_dir() and {"run", "folder"} & set(names):
        return "this command takes one folder"
    meant = [] if path.exists() else nearest_names(str(path), MODELS, _SIMILAR)
    if "model" in names and (meant or (path / "config.json").is_file()):
        return f"{follow}, as in --model {meant[0] if meant else path}"
    is_run = (path / "run.yaml").is_file() or (path / "adapter_config.json").is_file()
    if "model" in names and is_run:
        return _advice_on_adapter(path, names)
    if "data" in names and path.exists():
        return f"{follow}, as in --data {path}"
    return f"{follow} (--help lists them), and text with spaces needs quotes"


def _advice_on_adapter(path: Path, names: Sequence[str]) -> str:
    """Return what to do about the folder of a run or an adapter."""
    from .adapters.stored_files import recorded_model

    if "epochs" in names and (path / "run.yaml").is_file():
        return (
            f"values follow their flags: -c {path / 'run.yaml'} --resume continues a run,"
            f" and --resume-adapter-file {path} starts from its adapter"
        )
    if "resume_adapter_file" in names:
        return f"to start from its adapter, give --resume-adapter-file {path}"
    try:
        model = recorded_model(path)
    except LoRAPlusError:
        model = None
    return f"this command takes a model: give the one of the adapter, --model {model or 'MODEL'}"
