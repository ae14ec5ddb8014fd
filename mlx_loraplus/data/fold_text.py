"""Fold texts to compare them: what looks alike becomes equal, and markup between turns is left out.

A conversation may be given as messages, as a prompt and its completion, or as a text that a
template has rendered. ``plain_turns`` leaves out what a template adds, so that all three have the
same lines.
"""

import re
import unicodedata
from collections.abc import Iterator

from .thoughts import THOUGHT_TAGS

# Characters that are not shown (the ones that Unicode calls default ignorable)
_INVISIBLE = (
    "ad 34f 61c 17b4-17b5 180b-180f 200b-200f 202a-202e 2060-206f fe00-fe0f feff fff0-fffb"
    " 1bca0-1bca3 1d173-1d17a e0000-e0fff"
)
# Characters that are shown as a blank, but that Unicode does not call white space
_BLANKS = "115f-1160 2800 3164 ffa0"

_SINGLE_QUOTES = "\u2018\u2019\u201a\u201b\u2039\u203a\u00b4`"
_DOUBLE_QUOTES = "\u201c\u201d\u201e\u201f\u00ab\u00bb"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_TURKISH_I = "\u0130\u0131"


def _characters_of(ranges: str) -> Iterator[int]:
    """Yield the codes of ranges such as "ad 200b-200f"."""
    for each in ranges.split():
        first, _, last = each.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


_PLAIN: dict[int, str | None] = {
    **dict.fromkeys(_characters_of(_INVISIBLE)),
    **dict.fromkeys(_characters_of(_BLANKS), " "),
    **dict.fromkeys(map(ord, _SINGLE_QUOTES), "'"),
    **dict.fromkeys(map(ord, _DOUBLE_QUOTES), '"'),
    **dict.fromkeys(map(ord, _DASHES), "-"),
    **dict.fromkeys(map(ord, _TURKISH_I), "i"),
}

_ROLES = (
    "system|developer|user|human|customer|client|prompter|assistant|model|bot|chatbot|gpt|chatgpt"
    "|ai|agent|falcon|tool|function|instruction|input|response|output|question|answer|prompt"
    "|completion|gpt4 correct user|gpt4 correct assistant"
)
# Tags of templates, as ``fold_text`` returns them: <|im_start|>, <start_of_turn>, [inst], [|user|]
_TAGS = re.compile(
    r"<\|channel\|>[a-z]+|<\|[a-z_\u2581 ]{1,32}\|?>|<[a-z_]{1,32}\|>|\[\|[a-z_]{1,32}\|\]"
    r"|</?s>|<(?:bos|eos|pad)(?:_token)?>|</?(?:start|end)_of_turn>|\[/?(?:inst|system_prompt)\]"
    rf"|<</?sys>>|\[gmask\]|<sop>|<br ?/?>|</?(?:{_ROLES})>|\[(?:{_ROLES})\]:?"
)
# A role on a line of its own or before a colon, perhaps as a heading; a heading may follow a text
_LABELS = re.compile(
    rf"(?m)^[ \t\r]*(?:\d+[.)][ \t]*)?(?:[#*]+[ \t]*)?(?:{_ROLES})[ \t\r]*(?:\*+[ \t]*)?"
    r"(?:[:>]\**|$)"
    rf"|^[ \t]*[qa][ \t]*:|###[ \t]*(?:{_ROLES})[ \t]*:"
)
_LABELS_INSIDE = re.compile(r"(?<=\s)(?:user|human|assistant):")
# The end of what opens the user's first turn: a tag or a label, and Llama 2's system message
_USER = re.compile(
    r"(?s)\[inst\]\s*(?:<<sys>>.*?<</sys>>)?"
    r"|<[^<>\n]{1,32}>(?:user|human)\b|<\|?(?:im_)?(?:user|human|prompter)(?:_token)?\|?>"
    r"|\[\|?(?:user|human)\|?\]:?|(?:(?<=\s)|^)\**(?:user|human|gpt4 correct user)\**\s*[:>]\**"
    r"|(?:(?<=\n)|^)###\s*(?:user|human|instruction)\s*:?"
)
_THOUGHT_TAGS = [tuple(map(str.casefold, tags)) for tags in THOUGHT_TAGS]

# Any word before a colon at the start of a line, which is a role if a text has several
_NAMES = re.compile(r"(?m)^[ \t]*(?:\d+[.)][ \t]*)?[^\W\d_][\w'-]{0,19}[ \t]*:(?=\s)")

# Punctuation, quotation marks and emphasis at the end and at the start of a word
_SENTENCE_END = re.compile(r"(?<=[^\s.!?\"'*_,;])[\"'*_,;]*[.!?][.!?\"'*_,;]*(?!\S)")
_WORD_EDGES = re.compile(r"(?<=[^\s\"'*_,;])[\"'*_,;]+(?!\S)|(?<!\S)[\"'*_]+(?=\S)")


def fold_text(text: str) -> str:
    """Return a text in lower case and one Unicode form.

    It does not matter whether a character is composed, of full or half width, or a quotation mark
    or dash of another shape, nor how Turkish writes an i. Invisible characters are left out.
    """
    # NFKC turns an acute accent into a space and a mark, but a small dash into one of _PLAIN
    plain = unicodedata.normalize("NFKC", text.translate(_PLAIN)).translate(_PLAIN)
    folded = unicodedata.normalize("NFKC", plain).casefold()
    return folded if folded.isascii() else folded.replace("i\u0307", "i")


def start_of_turns(folded: str) -> int:
    """Return where the turns of a folded text begin: after the tag or label of the user's first.

    What comes before is a system message. The result is 0 if no such tag or label is found.
    """
    found = _USER.search(folded)
    return found.end() if found else 0


def plain_turns(folded: str) -> str:
    """Return a folded text with line ends in the place of tags, roles and thoughts.

    Punctuation around words is left out; a line ends where a sentence does.
    """
    plain = folded
    if "<" in folded or "[" in folded:
        plain = _TAGS.sub("\n", _without_thoughts(folded))
    plain = _LABELS.sub("\n", plain)
    if ":" in plain:
        plain = _LABELS_INSIDE.sub("\n", plain)
        if len(_NAMES.findall(plain)) > 1:
            plain = _NAMES.sub("\n", plain)
    return _WORD_EDGES.sub("", _SENTENCE_END.sub("\n", plain))


def _without_thoughts(folded: str) -> str:
    """Return a folded text with line ends in the place of blocks of thoughts."""
    for opening, closing in _THOUGHT_TAGS:
        first, *others = folded.split(opening)
        if not others:
            continue

        # A block that is not closed stays
        pieces = [first]
        for piece in others:
            inside, found, after = piece.partition(closing)
            pieces.append(f"\n{after}" if found else f"{opening}{inside}")
        folded = "".join(pieces)
    return folded
