"""Parse the setting ``fields``, which gives the column of each field of a row."""

import re
import shlex
from collections.abc import Sequence
from itertools import chain, pairwise

from ..errors import ConfigError, counted, join_problems, nearest
from .field_templates import is_template, parse_template
from .row_kinds import OPTIONAL, REQUIRED

# Fields that no template can build
_NOT_TEXT = ("messages", "conversations", "tools", "label")

# A shell divides a pair with spaces that has no quotes
_ADD_QUOTES = "; put quotes around a pair with spaces: 'prompt={first} {second}'"


def parse_names(pairs: Sequence[str]) -> dict[str, str]:
    """Parse the setting ``fields``: return {"prompt": "q"} for ("prompt=q",).

    A value with braces is a template over several columns; see ``field_templates``.

    Raises:
        ConfigError: A pair has the wrong form, names an unknown field, or has a wrong template.
    """
    # List a field of several kinds only once.
    known = list(dict.fromkeys(chain(*REQUIRED.values(), *OPTIONAL.values())))
    known += ["chosen", "rejected", "label"]

    names: dict[str, str] = {}
    problems: list[str] = []
    for before, pair in pairwise(["", *pairs]):
        name, _, column = pair.partition("=")
        if name in names:
            problems.append(
                f"--fields: {name} is given twice; to join columns, {name}='{{a}} {{b}}'"
            )
        names[name] = column
        if name not in known or not column:
            problems.append(_pair_problem(pair, before, known))
        elif is_template(column):
            problems += _template_problems(name, column)
        elif found := re.findall(rf"[\s,](?:{'|'.join(known)})=", column):
            problems.append(
                f"--fields: {pair!r:.80} is {counted(len(found) + 1, 'pair')} in one text: write"
                " them apart, as in --fields prompt=query completion=reply"
            )
    if problems:
        raise ConfigError(join_problems(problems))
    return names


def _pair_problem(pair: str, before: str, known: Sequence[str]) -> str:
    """Return what is wrong with a pair of ``--fields``, and what was probably meant.

    Args:
        pair: The pair.
        before: The pair before it, whose second word it may be.
        known: The names of fields.
    """
    name, equals, column = pair.partition("=")
    wrong = f"--fields: {pair:.80} is not of the form field=column"
    if column in known:
        return f"{wrong} (the field comes first: {column}={name})"
    if ":" in name and name.partition(":")[0] in known:
        return f"{wrong} (write {pair.replace(':', '=', 1)})"
    if not equals and "=" in before and not is_template(before):
        return f"{wrong}; put quotes around a pair with spaces: {shlex.quote(f'{before} {pair}')}"
    if not equals and name in known:
        return f"{wrong} (write {name}=COLUMN)"
    hint = "" if column else _ADD_QUOTES
    return f"{wrong}, where the field is one of {', '.join(known)}{nearest(name, known)}{hint}"


def _template_problems(name: str, template: str) -> list[str]:
    """Return what is wrong with the template of a field."""
    if name in _NOT_TEXT:
        return [
            f"--fields: {name} holds messages, tools or a label, so it is one column, not a"
            " template"
        ]
    try:
        parse_template(template)
    except ValueError as error:
        hint = _ADD_QUOTES if template.count("{") > template.count("}") else ""
        return [f"--fields: {name}={template!r:.80} is not a template: {error}{hint}"]
    return []
