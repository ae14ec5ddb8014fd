"""Render chats with a tokenizer's chat template, and find the prompt that asks for each turn.

Some generation prompts open a block of thoughts. To ask for an answer without thoughts, the
template's own option is used, such as ``enable_thinking=False``. If the template has no such
option, the prompt stays unchanged and the answer begins by closing the block. Training and
generation use the same prompt.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .lost_content import find_lost
from .messages import BadRowError
from .thoughts import (
    THOUGHT_KEYS,
    THOUGHT_TAGS,
    Message,
    answer_of,
    fill_empty_block,
    find_open_tags,
    has_only_thought_tags,
    remove_thought_tags,
    thoughts_of,
)

DAY = datetime(2024, 7, 26)  # noqa: DTZ001
"""The date in training rows, which is the default date of Llama 3's template."""

_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

_TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""The errors that a template may raise. Templates are programs that run in a sandbox."""

_THOUGHT_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("enable_thinking", False),
    ("thinking", False),
    ("enable_reasoning", False),
    ("think", False),
    ("add_thoughts", False),
    ("reasoning", False),
    ("thinking_mode", "disabled"),
    ("thinking_mode", "off"),
    ("thinking_mode", "chat"),
    ("reasoning_effort", "none"),
    ("thinking_budget", 0),
)
"""Template variables that control thoughts, and the value of each that turns thoughts off."""

_QUESTION = "An ordinary question"


class UnsupervisableError(BadRowError):
    """The prompt of a turn can't be found in the rendered chat."""


@dataclass(frozen=True)
class Turn:
    """One assistant turn: the prompt that asks for it, and the text that the model has to write."""

    prompt: str
    answer: str  # including the token that ends the turn
    rest: str = ""  # the text that the template writes after that token

    @property
    def text(self) -> str:
        """The prompt and the answer."""
        return self.prompt + self.answer


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: A tokenizer that has a chat template.
        day: The date that the template writes as today's date, or None for the real one.
        ends: The tokens that end generation, as text.
    """

    tokenizer: TokenizerWrapper
    day: datetime | None = None
    ends: Sequence[str] = field(default=())

    def render(
        self,
        messages: Sequence[Message],
        *,
        ask: bool,
        thinking: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Return a chat as text.

        Args:
            messages: The messages in the form that the template expects.
            ask: Whether to add the generation prompt, which asks for the next assistant turn.
            thinking: Whether the generation prompt may open a block of thoughts.
            tools: The tools that the model may call.

        Raises:
            BadRowError: The template refuses the chat.
        """
        options: dict[str, Any] = {}
        if tools:
            options["tools"] = list(tools)
        if self.day is not None:
            options |= dated(self.tokenizer, self.day.strftime)
        options |= self.with_thoughts if thinking else self.without_thoughts
        return self._apply(messages, ask, options)

    def _apply(self, messages: Sequence[Message], ask: bool, options: Mapping[str, Any]) -> str:
        """Apply the template with these variables."""
        if self.takes_parts:
            messages = [_in_parts(message) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, **options
            )
        except _TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())
            raise BadRowError(f"the chat template refuses it ({reason})") from error

    # --- properties of the template -------------------------------------------------------------

    @cached_property
    def takes_parts(self) -> bool:
        """Whether each content must be a list of parts, as in the templates of vision models."""
        question = {"role": "user", "content": _QUESTION}
        return not self._shows(question) and self._shows(_in_parts(question))

    def _shows(self, question: Message) -> bool:
        """Return whether the rendered text contains the question's content."""
        try:
            return _QUESTION in self.tokenizer.apply_chat_template([question], tokenize=False)
        except _TEMPLATE_ERRORS:
            return False

    @cached_property
    def with_thoughts(self) -> dict[str, Any]:
        """The options that let the generation prompt open a block of thoughts."""
        # Without the variable, mlx-lm turns thoughts off for a tokenizer without tokens for them.
        options: dict[str, Any] = {"enable_thinking": True}
        other: dict[str, Any] = options | {"thinking": True}
        if not self._opens_thoughts(options) and self._opens_thoughts(other):
            return other
        return options

    @cached_property
    def without_thoughts(self) -> dict[str, Any]:
        """The option that prevents the generation prompt from opening a block of thoughts.

        It is empty if the prompt opens no block, or if the template has no such option.
        """
        if not self._opens_thoughts({}):
            return {}

        template = str(self.tokenizer.chat_template)
        for name, value in _THOUGHT_OPTIONS:
            is_known = re.search(rf"\b{name}\b", template)
            if is_known and self._opens_thoughts({name: value}) is False:
                return {name: value}
        return {}

    def _opens_thoughts(self, options: Mapping[str, Any]) -> bool | None:
        """Return whether the generation prompt opens a block, or None if the template fails."""
        question = {"role": "user", "content": _QUESTION}
        try:
            prompt = self._apply([question], True, options)
        except BadRowError:
            return None
        return find_open_tags(prompt) is not None

    @cached_property
    def thought_key(self) -> str | None:
        """The message key that the template reads thoughts from."""
        template = str(self.tokenizer.chat_template)
        for key in THOUGHT_KEYS:
            if re.search(rf"\.{key}\b|['\"]{key}['\"]", template):
                return key
        return None

    @cached_property
    def thought_tags(self) -> tuple[str, str] | None:
        """The tags that the template itself writes around thoughts, if it has any."""
        template = str(self.tokenizer.chat_template)
        return next((tags for tags in THOUGHT_TAGS if tags[1] in template), None)

    # --- turns ----------------------------------------------------------------------------------

    def write_turn(
        self, messages: Sequence[Message], turn: int, tools: Sequence[Any] | None
    ) -> Turn:
        """Return an assistant turn together with the prompt that asks for it.

        Args:
            messages: The messages in the form that the template expects.
            turn: The index of the assistant message.
            tools: The tools that the model may call.

        Raises:
            BadRowError: The template refuses the chat, or the turn's prompt can't be found.
        """
        # Render the chat with the turn, and the prompt that asks for it.
        thinking = bool(thoughts_of(messages[turn]))
        whole = self.render(messages[: turn + 1], ask=False, thinking=thinking, tools=tools)
        if turn == 0:
            prompt = self._first_header(messages[0], whole, tools)
        else:
            prompt = self.render(messages[:turn], ask=True, thinking=thinking, tools=tools)

        # With most templates, the chat begins with the prompt.
        if whole.startswith(prompt):
            stop = self._end_of_turn(whole, len(prompt))
            answer = fill_empty_block(whole[len(prompt) : stop], prompt, messages[turn])
            return Turn(prompt, answer, whole[stop:])

        # With other templates, the turn begins after the header that the prompt adds.
        history = self.render(messages[:turn], ask=False, thinking=thinking, tools=tools)
        seam = _find_seam(prompt, whole, prompt.removeprefix(history))
        if seam is None or _shows_later(messages[:turn], whole, seam):
            raise UnsupervisableError(
                "this chat template can't be supervised by turn: the text before"
                f" messages[{turn}] differs from the prompt that asks for it"
            )
        answer = whole[seam : self._end_of_turn(whole, seam)]
        answer = fill_empty_block(answer, prompt, messages[turn])
        return Turn(prompt, _fit_to_prompt(answer, prompt, messages[turn]))

    def _first_header(self, message: Message, whole: str, tools: Sequence[Any] | None) -> str:
        """Return the text before the content, for a chat that begins with an assistant message."""
        one, other = (
            self.render([{**message, "content": content}], ask=False, tools=tools)
            for content in ("ONE", "TWO")
        )
        header = one[: _common_length(one, other)]
        if not whole.startswith(header) or "ONE" not in one:
            raise BadRowError(
                "the chat begins with an assistant turn, which this chat template does not show;"
                " remove that turn"
            )
        return header

    def _end_of_turn(self, text: str, start: int) -> int:
        """Return the end of the first token after ``start`` that ends generation."""
        stops: list[int] = []
        for end in self.ends:
            place = text.find(end, start)
            if place >= 0:
                stops.append(place + len(end))
        return min(stops, default=len(text.rstrip()))


def dated(tokenizer: TokenizerWrapper, write: Callable[[str], str]) -> dict[str, str]:
    """Return the options for ``apply_chat_template`` that replace today's date.

    Args:
        tokenizer: A tokenizer that may have a chat template.
        write: Returns the date in a given strftime format.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" not in template:
        return {}
    return {"chat_template": _NOW.sub(lambda call: repr(write(call[2])), template)}


def _in_parts(message: Message) -> dict[str, Any]:
    """Return a message with its content as a list of one text part."""
    content = message.get("content")
    if not isinstance(content, str):
        return dict(message)
    return {**message, "content": [{"type": "text", "text": content}]}


def _find_seam(prompt: str, whole: str, header: str) -> int | None:
    """Return where a turn begins in a chat that does not begin with the turn's prompt.

    There are two reasons for this. The prompt may have a block of thoughts or white space that the
    chat does not have. The template may also rewrite earlier messages when it renders the turn.

    Args:
        prompt: The prompt that asks for the turn.
        whole: The chat up to and including the turn.
        header: The text that the prompt adds after the messages before the turn.
    """
    # The turn begins where the texts differ. If this is inside a tag, because two tags begin with
    # the same characters, the turn begins at the start of the tag.
    seam = _common_length(prompt, whole)
    for opening, _ in THOUGHT_TAGS:
        start = prompt.rfind(opening)
        if 0 <= start < seam < start + len(opening):
            seam = start
    if has_only_thought_tags(prompt[seam:]):
        return seam

    # Earlier messages were rewritten, so the turn begins after the last occurrence of the header.
    header = remove_thought_tags(header).strip()
    place = whole.rfind(header) if header else -1
    if place < 0:
        return None
    seam = place + len(header)
    return seam + 1 if whole[seam:].startswith("\n") else seam


def _shows_later(history: Sequence[Message], whole: str, seam: int) -> bool:
    """Return whether a chat shows a message of the history only after the place of the turn.

    The turn would then include this message, such as the result of a tool between two calls.
    """
    for message in history:
        is_before = "content" not in find_lost(message, whole[:seam])
        if not is_before and "content" not in find_lost(message, whole):
            return True
    return False


def _fit_to_prompt(answer: str, prompt: str, message: Message) -> str:
    """Return the answer as the continuation of a block of thoughts that the prompt writes."""
    # The prompt may have closed the block that the answer closes again.
    tags = find_open_tags(prompt)
    if tags is None:
        closings = [closing for _, closing in THOUGHT_TAGS if prompt.rstrip().endswith(closing)]
        for closing in closings:
            if answer.lstrip().startswith(closing):
                return answer.lstrip().removeprefix(closing)
        return answer

    # The prompt has opened a block: the answer has to continue with thoughts and close the block.
    opening, closing = tags
    answer = answer.lstrip()
    if answer.startswith(opening):
        return answer.removeprefix(opening).lstrip("\n")
    thoughts = thoughts_of(message).strip()
    if closing in answer and answer.startswith((closing, thoughts)):
        return answer
    return f"{thoughts}\n{closing}\n\n{answer_of({'content': answer})}"


def _common_length(one: str, other: str) -> int:
    """Return the length of the longest common prefix of two texts."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))
