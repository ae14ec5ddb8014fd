"""Pages that were saved in files: whether this package wrote them, and what they say first."""

import re
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from ..files import read_bounded
from ..pages.pages import GENERATOR, Headline

_MOST = 1 << 26  # bytes
# What the template writes. Other text of a file is never interpreted.
_GENERATOR = f'<meta name="generator" content="{GENERATOR}">'
_TITLE = re.compile(r"<h1>(.*?)</h1>", re.DOTALL)
_STATE = re.compile(r'<span class="state [^"]*"[^>]*>(.*?)</span>', re.DOTALL)
_LEAD = re.compile(r'<p class="lead">(.*?)</p>', re.DOTALL)


@dataclass(frozen=True)
class SavedPage:
    """A page in a file.

    Attributes:
        content: The whole page.
        head: What it says first.
    """

    content: bytes
    head: Headline


def read_page(path: Path) -> SavedPage | None:
    """Read a page, or return None if the file was not written by this package.

    Args:
        path: An HTML file of unknown origin.

    Raises:
        OSError: The file can't be read, or is not a regular file.
    """
    content = read_bounded(path, _MOST)
    beginning = content.partition(b"</header>")[0].decode(errors="replace")
    if _GENERATOR not in beginning.partition("<body")[0]:
        return None

    head = Headline(
        title=_find(_TITLE, beginning),
        state=_find(_STATE, beginning),
        lead=_find(_LEAD, beginning),
        is_live="<body data-refresh" in beginning,
    )
    return SavedPage(content, head)


def _find(pattern: re.Pattern[str], text: str) -> str:
    """Return the text of the first element that a pattern finds; empty if there is none."""
    found = pattern.search(text)
    return unescape(found[1]) if found else ""
