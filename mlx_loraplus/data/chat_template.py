"""A tokenizer's chat template: what it renders, and how it asks for an answer.

Templates differ in what they expect of a message: the content as a string or as a list of parts,
the arguments of a tool call as an object or as JSON, thoughts under a key or between ``<think>``
and ``</think>``. ``forms_of`` yields the same chat in each of these forms, and ``find_lost`` says
what a rendering does not hold, so that the first form that loses nothing can be taken.

Some generation prompts open a block of thoughts. An answer without thoughts is then asked for by
the template's own switch (``enable_thinking=False``); a template without one is asked as it is, and
the answer begins by closing the block. In training and in generation the prompt is the same.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import product
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .rows import BadRowError

DAY = datetime(2024, 7, 26)  # what Llama 3's template writes where it is not told the day  # noqa: DTZ001
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

# Templates are programs, run by transformers in jinja2's sandbox; they raise these.
_TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError,
)  # fmt: skip

THOUGHT_TAGS = (  # what opens and closes a block of thoughts
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thought>", "</thought>"), ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"), ("<|channel>thought", "<channel|>"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)  # fmt: skip
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thoughts")  # of a message
_SWITCHES: tuple[tuple[str, Any], ...] = (  # variables by which templates leave thoughts out
    ("enable_thinking", False), ("thinking", False), ("enable_reasoning", False), ("think", False),
    ("add_thoughts", False), ("reasoning", False), ("thinking_mode", "disabled"), ("thinking_mode", "off"),
    ("thinking_mode", "chat"), ("reasoning_effort", "none"), ("thinking_budget", 0),
)  # fmt: skip
_PROBE = "An ordinary question"

Message = Mapping[str, Any]


class UnsupervisableError(BadRowError):
    """A turn can't be told from what is before it."""


@dataclass(frozen=True)
class Turn:
    """One assistant turn as the model meets it: the prompt it is asked with, and what it is to write."""

    prompt: str
    answer: str  # up to the end of the token that ends the turn
    rest: str = ""  # what the template puts behind it

    @property
    def text(self) -> str:
        """The prompt and the answer."""
        return self.prompt + self.answer


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: It must have one.
        day: What stands for today, or None for today itself.
    """

    tokenizer: TokenizerWrapper
    day: datetime | None = None
    ends: Sequence[str] = field(default=())  # the tokens that end generation, as text

    def render(
        self,
        messages: Sequence[Message],
        *,
        ask: bool,
        thinking: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Return a chat as text, with the header of the next turn behind it if the template ``ask``s for one.

        Raises: BadRowError where the template refuses the chat.
        """
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        if self.day is not None:
            options |= dated(self.tokenizer, self.day.strftime)
        if not thinking:
            options |= self.without_thoughts
        return self._apply(messages, ask, options)

    def _apply(self, messages: Sequence[Message], ask: bool, options: Mapping[str, Any]) -> str:
        if self.takes_parts:
            messages = [_in_parts(message) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, **options
            )
        except _TEMPLATE_ERRORS as error:
            raise BadRowError(
                f"the chat template refuses it ({' '.join(str(error).split())})"
            ) from error

    @cached_property
    def takes_parts(self) -> bool:
        """Whether contents have to be lists of parts, as in templates of models that see pictures."""
        question = {"role": "user", "content": _PROBE}

        def shows(message: Message) -> bool:
            try:
                return _PROBE in self.tokenizer.apply_chat_template([message], tokenize=False)
            except _TEMPLATE_ERRORS:
                return False

        return not shows(question) and shows(_in_parts(question))

    @cached_property
    def without_thoughts(self) -> dict[str, Any]:
        """The options that make a generation prompt leave no block of thoughts open; none if that needs none."""
        question = [{"role": "user", "content": _PROBE}]
        try:
            if _open_thought(self._apply(question, True, {})) is None:
                return {}
        except BadRowError:
            return {}
        template = str(self.tokenizer.chat_template)
        for name, value in _SWITCHES:
            if not re.search(rf"\b{name}\b", template):
                continue
            try:
                if _open_thought(self._apply(question, True, {name: value})) is None:
                    return {name: value}
            except BadRowError:
                continue
        return {}

    @cached_property
    def thought_key(self) -> str | None:
        """The key of a message under which the template looks for thoughts."""
        template = str(self.tokenizer.chat_template)
        found = (key for key in THOUGHT_KEYS if re.search(rf"\.{key}\b|['\"]{key}['\"]", template))
        return next(found, None)

    def write_turn(
        self, messages: Sequence[Message], turn: int, tools: Sequence[Any] | None
    ) -> Turn:
        """Return an assistant turn behind the prompt that asks for it.

        Raises: BadRowError where the template refuses the chat, or the turn can't be told from what
            is before it.
        """
        thinking = bool(thoughts_of(messages[turn]))
        whole = self.render(messages[: turn + 1], ask=False, thinking=thinking, tools=tools)
        if turn == 0:
            prompt = self._first_header(messages[0], whole, tools)
        else:
            prompt = self.render(messages[:turn], ask=True, thinking=thinking, tools=tools)
        if whole.startswith(prompt):
            stop = self._end_of_turn(whole, len(prompt))
            return Turn(prompt, whole[len(prompt) : stop], whole[stop:])
        history = self.render(messages[:turn], ask=False, thinking=thinking, tools=tools)
        return self._join(prompt, whole, messages[turn], prompt.removeprefix(history), turn)

    def _first_header(self, message: Message, whole: str, tools: Sequence[Any] | None) -> str:
        """Return what stands before the words of a chat's first message, an assistant's."""
        marks = ("ONE", "TWO")
        both = [
            self.render([{**message, "content": mark}], ask=False, tools=tools) for mark in marks
        ]
        header = both[0][: _common(*both)]
        if not whole.startswith(header) or marks[0] not in both[0]:
            raise BadRowError(
                "the chat begins with the assistant, which this chat template does not show; remove"
                " that turn"
            )
        return header

    def _join(self, prompt: str, whole: str, message: Message, header: str, turn: int) -> Turn:
        """Return a turn behind a prompt with which the whole chat does not begin.

        The prompt has a block of thoughts, or blanks, that the chat does not have there; or the
        template writes what is earlier in another way once the turn is there. The turn's words are
        those behind its header.
        """
        seam = _common(prompt, whole)
        for opening, _ in THOUGHT_TAGS:  # what two tags have in common is no seam
            start = prompt.rfind(opening)
            if 0 <= start < seam < start + len(opening):
                seam = start
        if not _is_thought_block(prompt[seam:]):
            seam = _behind_header(whole, header)
        if seam is None or (turn and not header.strip() and not _is_thought_block(prompt[seam:])):
            raise UnsupervisableError(
                f"this chat template can't be supervised by turn (the text before messages[{turn}]"
                " is not what the model sees when asked for it)"
            )

        body = whole[seam : self._end_of_turn(whole, seam)]
        if (opened := _open_thought(prompt)) is None:
            return Turn(prompt, body)
        opening, closing = opened
        if body.lstrip().startswith(opening):
            return Turn(prompt, body.lstrip().removeprefix(opening).lstrip("\n"))
        return Turn(prompt, f"{thoughts_of(message).strip()}\n{closing}\n\n{body.lstrip()}")

    def _end_of_turn(self, text: str, start: int) -> int:
        """Return where the first token that ends generation ends in ``text`` from ``start`` on."""
        found = [place + len(end) for end in self.ends if (place := text.find(end, start)) >= 0]
        return min(found, default=len(text.rstrip()))


def dated(tokenizer: TokenizerWrapper, write: Callable[[str], str]) -> dict[str, str]:
    """Return what makes ``apply_chat_template`` write(format) where its template asks for today's date."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" not in template:
        return {}
    return {"chat_template": _NOW.sub(lambda call: repr(write(call[2])), template)}


def forms_of(messages: Sequence[Message], template: ChatTemplate) -> Iterator[list[dict[str, Any]]]:
    """Yield a chat in the forms that templates know, first the one that most of them do."""
    calls = any(message.get("tool_calls") for message in messages)
    thoughts = any(thoughts_of(message) for message in messages)
    seen: list[list[dict[str, Any]]] = []
    for arguments, empty, thinking in product(
        ("object", "json") if calls else ("object",),
        ("", None) if calls else ("",),
        ("given", "key", "inline") if thoughts else ("given",),
    ):
        form = [
            _in_form(message, arguments, empty, thinking, template.thought_key)
            for message in messages
        ]
        if form not in seen:
            seen.append(form)
            yield form


def _in_form(
    message: Message, arguments: str, empty: str | None, thinking: str, thought_key: str | None
) -> dict[str, Any]:
    """Return a message with its call's arguments, empty content and thoughts written in one of their forms."""
    form = dict(message)
    if calls := form.get("tool_calls"):
        form["content"] = form.get("content") or empty
        if arguments == "json":
            form["tool_calls"] = [_with_json_arguments(call) for call in calls]
    if thinking == "given" or not thoughts_of(message):
        return form

    thoughts, content = thoughts_of(message), answer_of(message)
    form = {key: value for key, value in form.items() if key not in THOUGHT_KEYS}
    if thinking == "inline":
        form["content"] = f"<think>\n{thoughts}\n</think>\n\n{content}"
    else:
        form["content"] = content if content or not calls else empty
        form[thought_key or THOUGHT_KEYS[0]] = thoughts
    return form


def _with_json_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", call))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": function} if "function" in call else function


def _in_parts(message: Message) -> dict[str, Any]:
    content = message.get("content")
    return (
        {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, str)
        else dict(message)
    )


# --- what a message holds, and whether a text has it
# ------------------------------------------------------------------


def thoughts_of(message: Message) -> str:
    """Return an assistant message's thoughts: those under a key of their own, or those in its content."""
    for key in THOUGHT_KEYS:
        if isinstance(message.get(key), str) and message[key].strip():
            return str(message[key])
    return _parted(str(message.get("content") or ""))[0]


def answer_of(message: Message) -> str:
    """Return a message's content without thoughts."""
    return _parted(str(message.get("content") or ""))[1]


def _parted(content: str) -> tuple[str, str]:
    """Return the thoughts that a content begins with and what is left of it; tags further on are words like others."""
    for opening, closing in THOUGHT_TAGS:
        before, found, after = content.partition(closing)
        if not found:
            continue
        if before.lstrip().startswith(opening):
            return before.lstrip().removeprefix(opening), after
        alone = before.endswith("\n") or after.startswith("\n")
        if alone and opening not in content:  # the prompt has opened them
            return before, after
    return "", content


def find_lost(message: Message, text: str) -> list[str]:
    """Return what of a message ``text`` does not hold: "content", "tool calls", "thoughts".

    Everything has a place of its own: a name in the content does not stand for a call, nor one of
    two calls for both.
    """
    parts: list[tuple[str, Any]] = [("content", answer_of(message))]
    parts += [("thoughts", line) for line in thoughts_of(message).splitlines()]
    parts += [("tool calls", leaf) for leaf in leaves_of_calls(message.get("tool_calls") or ())]

    # Long ones first, so that a short one is not found inside them.
    left, lost = _squeeze(text), set[str]()
    for what, value in sorted(parts, key=lambda part: -len(_squeeze(str(part[1])))):
        spellings = sorted(map(_squeeze, _spellings(value)), key=len, reverse=True)
        found = next((spelling for spelling in spellings if spelling in left), None)
        if found is None:
            lost.add(what)
        elif found:
            left = left.replace(found, "\0", 1)
    return [what for what in ("content", "tool calls", "thoughts") if what in lost]


def function_names(calls: Sequence[Any]) -> list[str]:
    """Return the names in tools or in calls of them, whichever of both forms they have."""
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [str(function.get("name", "")) for function in functions if isinstance(function, dict)]


def leaves_of_calls(calls: Sequence[Any]) -> list[Any]:
    """Return the function's name, the argument names and the single values of every call."""
    leaves: list[Any] = list(function_names(calls))
    for call in calls:
        arguments = call.get("function", call).get("arguments")
        leaves += list(arguments) if isinstance(arguments, Mapping) else []
        leaves += _leaves(arguments)
    return leaves


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _spellings(value: Any) -> set[str]:
    """Return how templates write a value: plain, in JSON, in Python, and escaped for HTML."""
    if not isinstance(value, str):
        return {str(value), json.dumps(value)}
    escaped = (
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
    )
    spellings = {value, *escaped}
    for text in (value, *escaped):
        as_json, as_html = text, text.replace("&", "&amp;")
        for mark, name, entity in (
            ("<", "\\u003c", "&lt;"),
            (">", "\\u003e", "&gt;"),
            ("'", "\\u0027", "&#39;"),
        ):
            as_json, as_html = as_json.replace(mark, name), as_html.replace(mark, entity)
        spellings |= {as_json.replace("&", "\\u0026"), as_html, as_html.replace('"', "&#34;")}
    return spellings


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next(
        (place for place, (left, right) in pairs if left != right), min(len(one), len(other))
    )


def _open_thought(prompt: str) -> tuple[str, str] | None:
    """Return the tags of the block of thoughts that a prompt leaves open at its end, or None."""
    for opening, closing in THOUGHT_TAGS:
        if prompt.rstrip().endswith(opening):
            return opening, closing
    return None


def _behind_header(whole: str, header: str) -> int | None:
    """Return where the last turn's words begin in a chat: behind the last header like that of a generation prompt."""
    for opening, closing in THOUGHT_TAGS:
        header = header.replace(opening, "").replace(closing, "")
    header = header.strip()
    place = whole.rfind(header) if header else -1
    if place < 0:
        return None
    return place + len(header) + (whole[place + len(header) :].startswith("\n"))


def _is_thought_block(text: str) -> bool:
    """Tell whether a text is blank but for the tags of thoughts."""
    for tags in THOUGHT_TAGS:
        for tag in tags:
            text = text.replace(tag, "")
    return not text.strip()
