"""Rows as text with the characters to train on, and chats before and after rendering."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .template_forms import ChatForm
from .thoughts import Message


@dataclass(frozen=True)
class WrittenRow:
    """A row as text, and the characters to train on."""

    text: str
    spans: list[tuple[int, int]]  # start and stop of the characters to train on
    add_special_tokens: bool = False  # whether BOS and EOS have to be added
    thinking: bool = False  # whether the last prompt of the user allows thoughts


@dataclass(frozen=True)
class SupervisedChat:
    """A chat, and which of its turns to train on."""

    messages: Sequence[Message]
    turns: Sequence[int]  # indices of the assistant messages to train on
    tools: Sequence[Any] | None


@dataclass(frozen=True)
class WrittenChat:
    """A chat as text: one row, or several if the template rewrites earlier turns."""

    form: ChatForm  # the messages in the form that was passed to the template
    rows: list[WrittenRow]
    notes: list[str]  # notes on content of supervised turns that the template leaves out
