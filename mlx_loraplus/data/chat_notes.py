"""Notes on what a rendered chat leaves out, or has in a different place than the row."""

from collections.abc import Sequence
from typing import Any

from .chat_template import ChatTemplate
from .lost_content import find_lost
from .messages import BadRowError
from .rendered_chat import RenderedChat, RenderedText, SupervisedChat
from .simpler_chats import without_field
from .template_check import SOME_TOOL
from .template_forms import CALL_ID, ChatForm
from .thoughts import Message, answer_of, thoughts_of


def note_left_out(
    template: ChatTemplate, chat: SupervisedChat, rendered: RenderedChat
) -> list[str]:
    """Return notes on unsupervised content that is left out, and on what the template rewrites."""
    lost: set[str] = set()

    # Search for messages without supervision outside the supervised text. Otherwise the words
    # of an answer would count as those of a question.
    text = _unsupervised_text(rendered.texts[0])
    others = [
        message for turn, message in enumerate(rendered.form.messages) if turn not in chat.turns
    ]
    for message, part in zip(others, divide_by_message(others, text), strict=True):
        missing = find_lost(message, part)
        if "content" in missing:
            lost.add(f"{message['role']} messages")
        if "tool calls" in missing:
            lost.add("tool calls")

    # The names in tool messages are not checked here: the calls contain the same names.
    if _ignores(template, "name", ("system", "user", "assistant"), chat, rendered):
        lost.add("names of speakers ('name')")
    last = rendered.form.messages[-1]
    thinking = bool(thoughts_of(last))
    if chat.tools and not shows_tools(
        template, rendered.form.messages, chat.tools, ask=False, thinking=thinking
    ):
        lost.add("tools")
    notes = [f"the chat template leaves out or rewrites {what}" for what in sorted(lost)]
    notes += _note_rewritten(template, chat, rendered.form)
    notes += _note_early_ends(template, chat, rendered.texts)
    notes += _note_endless(template, rendered.texts)

    # Without ids, the first result is that of the first call.
    is_swapped = _has_swapped_results(rendered.form.messages)
    if is_swapped and _ignores(template, "tool_call_id", ("tool",), chat, rendered):
        notes.append(
            "the chat template leaves out 'tool_call_id', and results of tools are in another"
            " order than their calls; write them in the same order"
        )
    return notes


def _ignores(
    template: ChatTemplate,
    field: str,
    roles: Sequence[str],
    chat: SupervisedChat,
    rendered: RenderedChat,
) -> bool:
    """Return whether messages of some roles have a field that the text does not depend on."""
    form = rendered.form.messages
    without = without_field(field, form, roles)
    if without == list(form):
        return False
    try:
        text = template.render(form, ask=False, tools=chat.tools)
        return template.render(without, ask=False, tools=chat.tools) == text
    except BadRowError:
        return False


def shows_tools(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Any],
    *,
    ask: bool,
    thinking: bool,
) -> bool:
    """Return whether a rendered chat depends on the tools."""
    with_tools = template.render(messages, ask=ask, thinking=thinking, tools=tools)

    # A template for chats with tools only refuses a chat without them, but takes other tools.
    for others in (None, [SOME_TOOL]):
        try:
            return template.render(messages, ask=ask, thinking=thinking, tools=others) != with_tools
        except BadRowError:
            continue
    return True


def _note_rewritten(template: ChatTemplate, chat: SupervisedChat, form: ChatForm) -> list[str]:
    """Return notes on what the form of a chat has in other places than the row."""
    notes: list[str] = []
    block = template.thought_block
    tags = f"{block.opening} and {block.closing}"
    if form.thoughts:
        notes.append(
            "the chat template has no place for the thoughts of some answers, so they are"
            f" rendered before the answer, between {tags}"
        )
    elif _moves_thoughts_into_content(chat.messages, form.messages) and not block.is_own:
        notes.append(
            "the chat template has no place for thoughts, so they are rendered at the start of"
            f" the content, between {tags}"
        )
    if _call_ids(form.messages) != _call_ids(chat.messages):
        notes.append(
            "the chat template renders the id of a tool call in place of the function's name, so"
            f" ids are rendered as {CALL_ID.format(name='NAME', number='NUMBER')}"
        )
    return notes


def _note_early_ends(
    template: ChatTemplate, chat: SupervisedChat, texts: Sequence[RenderedText]
) -> list[str]:
    """Return notes on tokens that end generation inside an answer but do not occur in the row."""
    own_text = "".join(str(message) for message in chat.messages)
    ends = [end for end in template.ends if end not in own_text]
    answers = [each.text[start:stop] for each in texts for start, stop in each.learned]
    return [
        f"the chat template renders {end} inside an answer, and generation stops there, before the"
        " rest of the answer"
        for end in ends
        if any(end in answer[: -len(end)] for answer in answers)
    ]


def _note_endless(template: ChatTemplate, texts: Sequence[RenderedText]) -> list[str]:
    """Return a note if an answer has no token that ends generation."""
    answers = [each.text[start:stop].rstrip() for each in texts for start, stop in each.learned]
    if not template.ends or all(answer.endswith(tuple(template.ends)) for answer in answers):
        return []
    return [
        "the chat template renders no end token after some answers, so the model does not learn to"
        " stop there"
    ]


def _moves_thoughts_into_content(messages: Sequence[Message], form: Sequence[Message]) -> bool:
    """Return whether a form has thoughts inside the content that the row has under a key."""
    for message, formed in zip(messages, form, strict=True):
        is_inside = bool(thoughts_of({"content": formed.get("content")}))
        if is_inside and not thoughts_of({"content": message.get("content")}):
            return True
    return False


def _call_ids(messages: Sequence[Message]) -> list[Any]:
    """Return the ids of all tool calls."""
    return [call.get("id") for message in messages for call in message.get("tool_calls") or ()]


def _has_swapped_results(messages: Sequence[Message]) -> bool:
    """Return whether results of tools are in another order than the calls before them."""
    places: dict[Any, int] = {}
    last = -1
    for message in messages:
        if message["role"] == "tool":
            place = places.get(message.get("tool_call_id"), last)
            if place < last:
                return True
            last = place
        else:
            calls = message.get("tool_calls") or ()
            places = {call.get("id"): number for number, call in enumerate(calls)}
            last = -1
    return False


def divide_by_message(messages: Sequence[Message], text: str) -> list[str]:
    """Return, for each message, the text that follows the content of the previous message."""
    parts: list[str] = []
    start = 0

    for message in messages:
        parts.append(text[start:])

        # Templates may move the system message, so the next message may come before it.
        if message["role"] == "system":
            continue
        content = answer_of(message).strip()
        place = text.find(content, start)
        if content and place >= 0:
            start = place + len(content)

    return parts


def _unsupervised_text(rendered: RenderedText) -> str:
    """Return a text without the characters to train on."""
    text = ""
    start = 0
    for first, last in sorted(rendered.learned):
        text += rendered.text[start:first]
        start = last
    return text + rendered.text[start:]
