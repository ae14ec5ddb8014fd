"""Rows as text with the characters to train on, and chats before and after rendering."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .template_forms import ChatForm
from .thoughts import Message

CharRange = tuple[int, int]
"""Start and stop of some characters of a text."""


@dataclass(frozen=True)
class RenderedText:
    """One text of a row, and the characters to train on."""

    text: str
    learned: list[CharRange]  # the characters to train on
    add_special_tokens: bool = False  # whether BOS and EOS have to be added
    thinking: bool = False  # whether the last prompt of the user allows thoughts


@dataclass
class RenderedRow:
    """A row as text, or the problem with it.

    It is one text; several if the template rewrites earlier turns, or if the row has two answers.
    """

    texts: list[RenderedText] = field(default_factory=list)  # empty with a problem
    problem: str | None = None
    notes: list[str] = field(default_factory=list)  # for the report


@dataclass(frozen=True)
class SupervisedChat:
    """A chat, and which of its turns to train on."""

    messages: Sequence[Message]
    turns: Sequence[int]  # indices of the assistant messages to train on
    tools: Sequence[Any] | None


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text: one text, or several if the template rewrites earlier turns."""

    form: ChatForm  # the messages in the form that was passed to the template
    texts: list[RenderedText]
    notes: list[str]  # notes on content of supervised turns that the template leaves out
