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

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..failures import reason_text
from .messages import BadRowError
from .template_check import ANSWER, QUESTION, TEMPLATE_ERRORS
from .template_forms import ChatForm
from .thoughts import (
    THOUGHT_KEYS,
    Message,
    ThoughtBlock,
    answer_of,
    fill_empty_block,
    find_open_tags,
    put_before,
    thoughts_of,
)
from .turn_start import (
    after_last_message,
    before_thoughts,
    close_block,
    common_length,
    find_seam,
    fit_to_prompt,
    opens_later,
    shows_later,
    without_second_opening,
)

DAY = datetime(2024, 7, 26)  # noqa: DTZ001
"""The date in training rows, which is the default date of Llama 3's template."""

_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

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


_CALL: dict[str, Any] = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"word": ANSWER}},
}


class RefusedError(BadRowError):
    """The chat template raised an error."""


class UnsupervisableError(BadRowError):
    """The prompt of a turn can't be found in the rendered chat."""


@dataclass(frozen=True)
class Turn:
    """One assistant turn: the prompt that asks for it, and what the model has to generate."""

    prompt: str
    answer: str  # including the token that ends the turn
    rest: str = ""  # the text that the template renders after that token

    @property
    def text(self) -> str:
        """The prompt and the answer."""
        return self.prompt + self.answer


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: A tokenizer that has a chat template.
        day: The date that the template renders as today's date, or None for the real one.
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
        except TEMPLATE_ERRORS as error:
            raise RefusedError(f"the chat template refuses it ({reason_text(error)})") from error

    # --- properties of the template -------------------------------------------------------------

    @cached_property
    def takes_parts(self) -> bool:
        """Whether each content must be a list of parts, as in the templates of vision models."""
        question = {"role": "user", "content": QUESTION}
        return not self._shows(question) and self._shows(_in_parts(question))

    def _shows(self, question: Message) -> bool:
        """Return whether the rendered text contains the question's content."""
        try:
            return QUESTION in self.tokenizer.apply_chat_template([question], tokenize=False)
        except TEMPLATE_ERRORS:
            return False

    @cached_property
    def with_thoughts(self) -> dict[str, Any]:
        """The options that let the generation prompt open a block of thoughts."""
        # Without the variable, mlx-lm turns thoughts off for a tokenizer without tokens for them.
        options: dict[str, Any] = {"enable_thinking": True}
        if self._opens_thoughts(options):
            return options
        for other in ({"thinking": True}, {"reasoning_effort": "high"}):
            if self._opens_thoughts(options | other):
                return options | other
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
        question = {"role": "user", "content": QUESTION}
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
    def thought_block(self) -> ThoughtBlock:
        """How the template renders thoughts."""
        return ThoughtBlock.of(str(self.tokenizer.chat_template))

    # --- turns ----------------------------------------------------------------------------------

    def render_turn(self, chat: ChatForm, turn: int, tools: Sequence[Any] | None) -> Turn:
        """Return an assistant turn together with the prompt that asks for it.

        Args:
            chat: The messages in the form that the template expects.
            turn: The index of the assistant message.
            tools: The tools that the model may call.

        Raises:
            BadRowError: The template refuses the chat, or the turn's prompt can't be found.
        """
        # Render the chat with the turn, and the prompt that asks for it.
        messages = chat.messages[: turn + 1]
        thoughts = chat.thoughts.get(turn, "")
        message = {**messages[turn], THOUGHT_KEYS[0]: thoughts} if thoughts else messages[turn]
        thinking = bool(thoughts_of(message))
        whole = self.render(messages, ask=False, thinking=thinking, tools=tools)
        prompt = self._prompt_before(messages, whole, thinking=thinking, tools=tools)
        if not prompt:
            raise BadRowError(
                "the chat begins with an assistant turn, and this chat template renders nothing"
                " before it that could serve as a prompt"
            )

        # If the prompt opens a block of thoughts, they belong in it; another form puts them there.
        if thoughts and find_open_tags(prompt) is not None:
            raise UnsupervisableError("the prompt opens a block of thoughts")

        # With most templates, the chat begins with the prompt. Take the answer with its end token,
        # then correct its block of thoughts.
        if whole.startswith(prompt):
            answer, rest = self._divide_turn(whole[len(prompt) :], message)
            answer = fill_empty_block(without_second_opening(answer, prompt), prompt, message)
            answer = close_block(answer, prompt, message)
            return Turn(prompt, put_before(answer, prompt, thoughts, self.thought_block), rest)

        # With other templates, the turn begins after the header that the prompt adds.
        history = self.render(messages[:turn], ask=False, thinking=thinking, tools=tools)
        start = _find_start(messages, whole, prompt, history)
        answer, _ = self._divide_turn(whole[start:], message)
        answer = fit_to_prompt(fill_empty_block(answer, prompt, message), prompt, message)
        return Turn(prompt, put_before(answer, prompt, thoughts, self.thought_block))

    def _prompt_before(
        self,
        messages: Sequence[Message],
        whole: str,
        *,
        thinking: bool,
        tools: Sequence[Any] | None,
    ) -> str:
        """Return the prompt that asks for the last message; ``whole`` is the rendered chat."""
        *history, message = messages
        if not history:
            return self._first_header(message, whole, tools)
        prompt = self.render(history, ask=True, thinking=thinking, tools=tools)

        # After another assistant turn, some templates render no header in the prompt.
        header = self._header(thinking) if history[-1]["role"] == "assistant" else ""
        return prompt + header if whole.startswith(prompt + header) else prompt

    def _first_header(self, message: Message, whole: str, tools: Sequence[Any] | None) -> str:
        """Return the text before the content, for a chat that begins with an assistant message."""
        one, other = (
            self.render([{**message, "content": content}], ask=False, tools=tools)
            for content in ("ONE", "TWO")
        )
        header = one[: common_length(one, other)]
        if not whole.startswith(header) or "ONE" not in one:
            raise BadRowError(
                "the chat begins with an assistant turn, which this chat template does not show"
            )
        return header

    def _divide_turn(self, text: str, message: Message) -> tuple[str, str]:
        """Divide the text after a prompt into the turn with its end token, and the rest.

        Args:
            text: The text after the prompt.
            message: The message of the turn.
        """
        # Some templates end thoughts with the same token, as a message of their own.
        start = _start_of_answer(text, message) if thoughts_of(message) else 0
        stops: list[int] = []
        for end in self.ends:
            place = text.find(end, start)
            if place >= 0:
                stops.append(place + len(end))
        if stops:
            return text[: min(stops)], text[min(stops) :]

        answer = text.rstrip()
        follower = "tool" if message.get("tool_calls") else "user"
        if follower in self._ends_before:
            return answer + self._ends_before[follower], ""
        return answer, text[len(answer) :]

    def _header(self, thinking: bool) -> str:
        """Return the text that a prompt adds after an ordinary question."""
        question = {"role": "user", "content": QUESTION}
        try:
            asked = self.render([question], ask=False, thinking=thinking)
            return self.render([question], ask=True, thinking=thinking).removeprefix(asked)
        except BadRowError:
            return ""

    @cached_property
    def _ends_before(self) -> dict[str, str]:
        """Role → the end token that is rendered only before a turn of that role.

        In GLM's templates, a turn has no end token of its own: the model ends it with the token of
        the role that follows.
        """
        question = {"role": "user", "content": QUESTION}
        answer = {"role": "assistant", "content": ANSWER}
        call = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        result = {"role": "tool", "content": QUESTION, "tool_call_id": _CALL["id"]}
        found: dict[str, str] = {}
        for turn, follower in ((answer, question), (call, result)):
            try:
                alone = self._apply([question, turn], False, {}).rstrip()
                text = self._apply([question, turn, follower], False, {})
            except BadRowError:
                continue

            after = text.removeprefix(alone) if text.startswith(alone) else ""
            space = after[: len(after) - len(after.lstrip())]
            ends = [end for end in self.ends if after.lstrip().startswith(end)]
            if ends:
                found[follower["role"]] = space + max(ends, key=len)
        return found


def _find_start(messages: Sequence[Message], whole: str, prompt: str, history: str) -> int:
    """Return where the last turn begins in a chat that does not begin with the turn's prompt.

    Args:
        messages: The messages; the last one is the turn.
        whole: The messages, rendered.
        prompt: The prompt that asks for the turn.
        history: The messages before the turn, rendered.

    Raises:
        UnsupervisableError: The text before the turn differs from its prompt.
    """
    header = prompt.removeprefix(history) if prompt.startswith(history) else ""
    header = header or after_last_message(prompt, messages[-2])
    seam = find_seam(prompt, whole, header)
    if seam is not None:
        seam = before_thoughts(messages, whole, seam, header)
    if seam is None or shows_later(messages[:-1], whole, seam) or opens_later(whole[seam:], prompt):
        raise UnsupervisableError(
            "this chat template can't be supervised by turn: the text before"
            f" messages[{len(messages) - 1}] differs from the prompt that asks for it"
        )
    return seam


def _start_of_answer(text: str, message: Message) -> int:
    """Return where a message's content begins in a text; without content, its first tool call."""
    value = answer_of(message).strip()
    calls = message.get("tool_calls")
    if not value and calls:
        value = str(calls[0].get("function", calls[0]).get("name", ""))
    return max(0, text.rfind(value))


def dated(tokenizer: TokenizerWrapper, format_date: Callable[[str], str]) -> dict[str, str]:
    """Return the options for ``apply_chat_template`` that replace today's date.

    Args:
        tokenizer: A tokenizer that may have a chat template.
        format_date: Returns the date in a given strftime format.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" not in template:
        return {}
    return {"chat_template": _NOW.sub(lambda call: repr(format_date(call[2])), template)}


def _in_parts(message: Message) -> dict[str, Any]:
    """Return a message with its content as a list of one text part."""
    content = message.get("content")
    if not isinstance(content, str):
        return dict(message)
    return {**message, "content": [{"type": "text", "text": content}]}
