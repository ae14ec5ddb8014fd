"""Messages for Python, which name keywords instead of flags.

Messages are written once, with flags. The public functions pass them through ``in_keywords``, so
that ``--on-bad drop`` becomes ``on_bad="drop"`` in a notebook.
"""

import dataclasses
import functools
import json
import re
import shlex
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from .call_checks import check_call
from .command_config import ChatConfig, CompareConfig, SweepConfig
from .config import TrainConfig
from .errors import LoRAPlusError
from .failures import failures_in_one_line

_FLAG = re.compile(r"--([a-z][a-z-]*[a-z])\b(?: (\S+))?")
_END = re.compile(r"[;:,.)]+$")
_RUN_FILE = re.compile(r"\(-c (\S[^()]*run\.yaml)\)")

# Pairs as a shell takes them; an apostrophe in quotes is written '"'"'.
_PAIRS = re.compile(r"""--fields((?: (?='?\w+=)(?:'[^']*'|"[^"]*"|[^\s;,)'"])+)+)""")
_NEIGHBOURS = re.compile(r'(=(?:"[^"]*"|[\d.]+|True)) (?=[a-z_]+=)')
_OR_VALUES = re.compile(r'(="\w+")((?:, \w+)* or )(\w+)')

# Where a command starts in a message; the rest of the message keeps its flags.
_COMMAND = "mlx_loraplus."

# Settings whose value may be any word, so a word after the flag is the value.
_NAMES = ("model", "resume_adapter_file")
_NO_VALUES = ("and", "if", "is", "or", "out")


def speak_keywords(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose errors and log lines name keywords instead of flags.

    The types of its arguments are checked first. If the device fails, the error is one line.
    """

    @functools.wraps(function)
    def speaking(*arguments: Any, **keywords: Any) -> Any:
        check_call(function, arguments, keywords)
        log = keywords.get("log")
        if log is not None:
            keywords["log"] = lambda line: log(in_keywords(line))

        try:
            with failures_in_one_line():
                return function(*arguments, **keywords)
        except LoRAPlusError as error:
            if len(error.args) == 1:
                error.args = (in_keywords(str(error)),)
            raise

    return speaking


def in_keywords(message: str) -> str:
    """Return a message with keywords instead of flags, e.g. ``lr_ratio=16`` for ``--lr-ratio 16``.

    Names that are not keywords of the public functions are kept.
    """
    before, command, rest = message.partition(_COMMAND)
    before = _PAIRS.sub(_write_fields, before)
    before = _RUN_FILE.sub(r"(see \1)", before)
    before = _FLAG.sub(_write_keyword, before)
    before = _OR_VALUES.sub(_quote_others, before)
    return _NEIGHBOURS.sub(r"\1, ", before) + command + rest


def _write_fields(match: re.Match[str]) -> str:
    """Return the setting ``fields`` as a dict."""
    pairs = [pair.partition("=") for pair in shlex.split(match[1])]
    columns = {name: column for name, _, column in pairs}
    return f"fields={json.dumps(columns, ensure_ascii=False)}"


def _write_keyword(match: re.Match[str]) -> str:
    """Return a flag as a keyword, with the value that may follow it."""
    name, following = match[1].replace("-", "_"), match[2] or ""
    known = _keywords()
    if name not in known:
        return match[0]

    # The value, without the punctuation after it.
    value = _END.sub("", following)
    rest = following[len(value) :]
    is_after_colon = match.string[: match.start()].endswith("instead: ")
    is_value = bool(value) and value not in _NO_VALUES
    is_named = is_value and (name in _NAMES or (name == "data" and is_after_colon))

    values = known[name]
    if is_named or value in values:
        return f'{name}="{value}"{rest}'
    if re.fullmatch(r"[\d.,]*\d", value):
        return f"{name}={value.replace(',', '')}{rest}"
    space = " " if following else ""
    if True in values and following != "off":
        return f"{name}=True{space}{following}"
    return f"{name}{space}{following}"


def _quote_others(match: re.Match[str]) -> str:
    """Quote the other values of ``on_long="truncate", drop or split``."""
    others = re.sub(r"\b(?!or\b)(\w+)", r'"\1"', match[2])
    return f'{match[1]}{others}"{match[3]}"'


@functools.cache
def _keywords() -> dict[str, tuple[Any, ...]]:
    """Return the words, or True and False, that each keyword may be set to."""
    found: dict[str, tuple[Any, ...]] = {"memory": ()}  # of plan_memory
    for kind in (TrainConfig, SweepConfig, ChatConfig, CompareConfig):
        for part in (kind, *_parts(kind)):
            for name, hint in get_type_hints(part).items():
                found[name] = (True, False) if hint is bool else _words(hint)
    return found


def _parts(kind: type) -> list[type]:
    fields = dataclasses.fields(kind)
    return [each.default_factory for each in fields if isinstance(each.default_factory, type)]


def _words(hint: Any) -> tuple[str, ...]:
    """Return the literal words in a type."""
    words = [part for part in get_args(hint) if isinstance(part, str)]
    for part in get_args(hint):
        words += _words(part)
    return tuple(words)
