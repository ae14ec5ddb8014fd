"""Convert the boxes in which tyro prints errors to one line."""

import re
from itertools import dropwhile, takewhile

from .errors import nearest
from .setting_types import number_hint

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


def unboxed(said: str) -> str:
    """Return tyro's error as one line, without its frame, title and advice."""
    # A title, a rule in terminals without Unicode, the message, and advice after another rule.
    lines = [line.strip("│ ") for line in said.splitlines()[1:]]
    after_rule = dropwhile(_is_rule, lines)
    before_rule = takewhile(lambda line: not _is_rule(line), after_rule)
    message = " ".join(line for line in before_rule if line)

    # tyro's two messages about values have types and lists in Python's notation.
    if found := _BAD_VALUE.match(message):
        flag, types, value = found.groups()
        whole = "INT" in types
        for theirs, ours in _TYPE_WORDS.items():
            types = types.replace(theirs, ours)
        hint = _hint(flag, value.strip("'"), whole=whole)
        if "auto" in types and value.strip("'").lower() == "auto":
            hint = " (did you mean 'auto'?)"
        return f"{flag} takes {types}, not {value}{hint}"

    if found := _NO_NUMBER.match(message):
        flag, conversion, value = found.groups()
        whole = "int" in conversion
        hint = _hint(flag, value.strip("'"), whole=whole)
        return f"{flag} takes a {'whole ' * whole}number, not {value}{hint}"

    if found := _BAD_CHOICE.match(message):
        value, flag, choices = found.groups()
        words = sorted(set(re.findall(r"'([^']+)'", choices)) - {"None"})
        hint = "" if value.strip("'").isdigit() else nearest(value.strip("'"), words)
        return f"{flag} must be one of {', '.join(words)}, not {value}{hint}"

    if found := _NO_VALUE.match(message):
        count = (
            "a value"
            if found[2] in (None, "1")
            else f"{found[2]} values, with a space between them,"
        )
        return f"{found[1].rpartition('/')[2]} needs {count} after it"

    if found := _BAD_VALUES.match(message):
        flag, values = found.groups()
        return f"{flag} takes numbers with spaces between them, not {values}"
    return message.replace(" .", ".").replace("('None', ", "(") or said.strip()


def _hint(flag: str, value: str, *, whole: bool) -> str:
    """Return how to write a number that was refused; "" if nothing is known."""
    if flag == "--warmup":
        return " (it counts steps; --warmup-ratio 0.1 is a share of them)"
    return number_hint(value, whole=whole)


def _is_rule(line: str) -> bool:
    """Return whether a line of tyro's box is only a line, or its lower edge."""
    return bool(line) and set(line) <= set("─-╰╯")
