"""Convert tyro's errors, which it prints in a box, to one line."""

import re
from collections.abc import Callable, Mapping
from itertools import dropwhile, takewhile

from .errors import nearest
from .value_hints import example_of, number_hint, numbers_hint

# tyro's words for types → ours
_TYPE_WORDS = {
    "{None}|": "",
    "{auto}": "auto",
    "|": " or ",
    "INT": "a whole number",
    "FLOAT": "a number",
}
_BAD_VALUE = re.compile(
    r"Error parsing (--[\w-]+): no type matching (\S+) could be instantiated from \[(.*?)\]\."
)
_NO_NUMBER = re.compile(
    r"Error parsing (--[\w-]+): (invalid literal for int|could not convert string to float).*: (.*)"
)
_BAD_VALUES = re.compile(
    r"Error parsing (--[\w-]+): Could not find valid parse for arguments: \[(.*?)\]"
)
_BAD_CHOICE = re.compile(
    r"invalid choice (.*) for argument '(--[\w-]+)'\. Expected one of \((.*)\)\."
)
_NO_VALUE = re.compile(r"Missing value for argument '(\S+)'(?:\. Expected (\d+) values)?")


# Programs that read an export → its format, and words that mean on or off
_OTHER_VALUES = {
    **dict.fromkeys(("true", "yes", "1"), "on"),
    **dict.fromkeys(("false", "no", "0"), "off"),
    **dict.fromkeys(("ollama", "llama.cpp", "llamacpp", "lmstudio", "lm-studio"), "gguf"),
    **dict.fromkeys(("vllm", "transformers"), "peft"),
    **dict.fromkeys(("hf", "huggingface"), "hub"),
}


def unboxed(printed: str) -> str:
    """Return tyro's error as one line, without its frame, title and advice."""
    # A title, a rule in terminals without Unicode, the message, and advice after another rule.
    lines = [line.strip("│ ") for line in printed.splitlines()[1:]]
    after_rule = dropwhile(_is_rule, lines)
    before_rule = takewhile(lambda line: not _is_rule(line), after_rule)
    message = " ".join(line for line in before_rule if line).replace(") .", ").")

    message = re.sub(r"(?<![\w-])-\w/(?=--)", "", message)  # the short form of a flag

    # Replace the types, lists and names of arguments in Python's notation.
    for pattern, rewrite in _REWRITES.items():
        found = pattern.match(message)
        if found:
            return rewrite(*found.groups())
    return message.replace(" .", ".").replace("('None', ", "(") or printed.strip()


def _bad_value(flag: str, types: str, value: str) -> str:
    """Return the message for a value of a wrong type."""
    hint = number_hint(_name_of(flag), value.strip("'"), whole="INT" in types)
    if "auto" in types and value.strip("'").lower() == "auto":
        hint = " (did you mean 'auto'?)"
    for theirs, ours in _TYPE_WORDS.items():
        types = types.replace(theirs, ours)
    return f"{flag} takes {types}, not {value}{hint}"


def _no_number(flag: str, conversion: str, value: str) -> str:
    """Return the message for a value that is not a number."""
    whole = "int" in conversion
    hint = number_hint(_name_of(flag), value.strip("'"), whole=whole)
    return f"{flag} takes a {'whole ' * whole}number, not {value}{hint}"


def _bad_choice(value: str, flag: str, choices: str) -> str:
    """Return the message for a word that is not among those that are allowed."""
    words = sorted(set(re.findall(r"'([^']+)'", choices)) - {"None"})
    word = value.strip("'")
    hint = "" if word.isdigit() else nearest(word, words)
    if (meant := _OTHER_VALUES.get(word.lower())) in words:
        hint = f" (did you mean {meant!r}?)"
    return f"{flag} must be one of {', '.join(words)}, not {value}{hint}"


def _no_value(argument: str, count: str | None) -> str:
    """Return the message for a flag without its value, or with too few of them."""
    flag = argument.rpartition("/")[2]
    if count in (None, "1"):
        return f"{flag} needs a value after it"
    example = example_of(_name_of(flag), whole=False)
    return (
        f"{flag} needs {count} values, with a space between them, after it, as in {flag} {example}"
    )


def _bad_values(flag: str, values: str) -> str:
    """Return the message for values that can't be parsed."""
    hint = numbers_hint(_name_of(flag), values)
    return f"{flag} takes numbers with spaces between them, not {values}{hint}"


_REWRITES: Mapping[re.Pattern[str], Callable[..., str]] = {
    _BAD_VALUE: _bad_value,
    _NO_NUMBER: _no_number,
    _BAD_CHOICE: _bad_choice,
    _NO_VALUE: _no_value,
    _BAD_VALUES: _bad_values,
}
"""Pattern of a message of tyro → the function that makes ours of the pattern's groups."""


def _name_of(flag: str) -> str:
    """Return the name of the setting of a flag."""
    return flag.removeprefix("--").replace("-", "_")


def _is_rule(line: str) -> bool:
    """Return whether a line of tyro's box is a rule or the lower edge."""
    return bool(line) and set(line) <= set("─-╰╯")
