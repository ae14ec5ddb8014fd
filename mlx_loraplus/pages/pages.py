"""HTML pages and their parts. ``page.html.jinja`` defines the layout and escapes all content."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .charts import Chart
from .transcript import ChangeKind, PartKind, ShownTurn

_FOLDER = Path(__file__).parent
TEMPLATE, SCRIPT = "page.html.jinja", "page.js"
GENERATOR = "mlx_loraplus"  # names the program in the head of a page


@dataclass(frozen=True)
class HTMLTable:
    """Cells to show as text; ``title`` labels the table where it is folded away."""

    rows: Sequence[Sequence[Any]]
    head: Sequence[str] = ()
    title: str = ""
    marked: frozenset[str] = frozenset()  # first cells of the rows to emphasize
    best: frozenset[tuple[str, int]] = frozenset()  # (first cell of the row, column) of best values


@dataclass(frozen=True)
class ShownAnswer:
    """An answer to a prompt: its thoughts, text and calls.

    Each part is in pieces that are marked by how they differ from the expected answer.
    """

    label: str
    parts: Sequence[tuple[PartKind, Sequence[tuple[ChangeKind, str]]]]
    likeness: str = ""  # shown if it is as good as the expected one


@dataclass(frozen=True)
class AnswerCard:
    """A prompt as a chat, and answers to it."""

    turns: Sequence[ShownTurn]
    answers: Sequence[ShownAnswer]


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, and then what it has, in the order of the fields.

    A question is folded away until the reader opens it.
    """

    heading: str = ""
    text: str = ""
    table: HTMLTable | None = None
    commands: Sequence[tuple[str, str]] = ()  # (label, command)
    cards: Sequence[AnswerCard] = ()
    charts: Sequence[Chart] = ()
    folded: Sequence[HTMLTable] = ()
    is_question: bool = False


@dataclass(frozen=True)
class Tile:
    """A number that the reader should see first."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Headline:
    """The beginning of a page: what it is about, and the result.

    Attributes:
        title: What the page is about.
        state: A few words in a frame, whose colour the style sheet knows; none: no frame.
        text: How far it is, or what it is about in numbers.
        lead: The result, in one or two sentences.
        next_step: What to do next.
        commands: (label, command) of what can be done next; on a live page, they appear if nothing
            is heard for an hour.
        date: When it began.
        tiles: The most important results.
        progress: The fraction of the steps that are done, while a run lasts.
        is_live: Whether the page loads itself again.
    """

    title: str
    state: str
    text: str = ""
    lead: str = ""
    next_step: str = ""
    commands: Sequence[tuple[str, str]] = ()
    date: str = ""
    tiles: Sequence[Tile] = ()
    progress: float | None = None
    is_live: bool = False


@dataclass(frozen=True)
class PageLink:
    """A page in a list of pages: its name, its address and what it says first."""

    name: str
    address: str
    head: Headline


def render_page(
    title: str,
    head: Headline,
    sections: Iterable[Section],
    *,
    refresh: int | None = None,
    wall_time: float | None = None,
) -> bytes:
    """Return a whole HTML page.

    Args:
        title: The name of the browser's tab.
        head: The beginning of the page.
        sections: The parts of the page.
        refresh: Seconds after which the page loads itself again. Default: never.
        wall_time: Time of writing, in seconds since 1970.
    """
    body = _template().render_body(head, list(sections))
    return _whole_page(title, body, refresh, wall_time)


def render_index(title: str, links: Sequence[PageLink], refresh: int) -> bytes:
    """Return a page that lists pages; it loads itself again after ``refresh`` seconds."""
    body = _template().render_index(title, links)
    return _whole_page(title, body, refresh, None)


def render_notebook(sections: Iterable[Section], head: Headline | None = None) -> str:
    """Return sections, below a headline if there is one, as HTML for a notebook."""
    return str(_template().render_notebook(list(sections), head))


def render_card(line: str, chart: Chart | None, table: HTMLTable) -> str:
    """Return a line, a chart and a table as HTML for a notebook."""
    return str(_template().render_card(line, chart, table))


def present_date() -> str:
    """Return the date and the time, for a page that describes this moment."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def content_policy() -> str:
    """Return what a browser may do with a page: show it, and run the pages' own script."""
    _, digest = _script()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
        f" script-src '{digest}'; base-uri 'none'; form-action 'none'"
    )


def _whole_page(title: str, body: Any, refresh: int | None, wall_time: float | None) -> bytes:
    """Return a page around its body."""
    script, _ = _script()
    return str(
        _template().render_page(
            title, body, script, content_policy(), GENERATOR, refresh, wall_time
        )
    ).encode()


def _script() -> tuple[str, str]:
    """Return the pages' script, and its digest, without which browsers refuse to run it."""
    script = (_FOLDER / SCRIPT).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return script, f"sha256-{digest}"


@cache
def _template() -> Any:
    """Return the template's macros."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).module
