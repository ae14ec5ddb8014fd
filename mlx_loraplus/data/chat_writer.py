"""Write chats as text with the model's chat template, and mark the turns to train on.

Every supervised turn is checked: the template must write its content, its thoughts, and the names
and arguments of its tool calls inside the text that the model has to write. If content or
tool calls are missing, the chat can't be used. If the template leaves out thoughts or anything
else, a note reports this.

In an example, each assistant turn follows the prompt that asks for it. Some templates rewrite a
turn when other turns follow; Qwen 3's template, for example, removes earlier thoughts. Such a turn
becomes a separate example, which ends with the turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .chat_template import ChatTemplate, RefusedError, Turn, UnsupervisableError
from .lost_content import find_lost
from .messages import NEEDED_FIELDS, ROLES, BadRowError, assistant_turns
from .template_forms import chat_forms
from .thoughts import THOUGHT_TAGS, Message, answer_of, has_block_after_empty_block, thoughts_of

TrainOn = Literal["turns", "last", "everything"]


@dataclass(frozen=True)
class WrittenRow:
    """A row as text, and the characters to train on."""

    text: str
    spans: list[tuple[int, int]]  # start and stop of the characters to train on
    add_special_tokens: bool = False  # whether BOS and EOS have to be added
    thinking: bool = False  # whether the last turn's prompt allows thoughts


@dataclass(frozen=True)
class SupervisedChat:
    """A chat, and which of its turns to train on."""

    messages: Sequence[Message]
    turns: Sequence[int]  # indices of the assistant messages to train on
    tools: Sequence[Any] | None


@dataclass(frozen=True)
class WrittenChat:
    """A chat as text: one row, or several if the template rewrites earlier turns."""

    form: Sequence[Message]  # the messages in the form that was passed to the template
    rows: list[WrittenRow]
    notes: list[str]  # notes on content of supervised turns that the template leaves out


@dataclass(frozen=True)
class ChatWriter:
    """Writes chats with one chat template."""

    template: ChatTemplate
    train_on: TrainOn

    def write(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        untrained: Sequence[int],
        notes: list[str],
    ) -> list[WrittenRow]:
        """Return a chat as text.

        Args:
            messages: The messages in OpenAI's form.
            tools: The tools that the model may call.
            untrained: Indices of the assistant messages that must not be trained on.
            notes: Receives a note on everything that the template leaves out.

        Raises:
            BadRowError: The template refuses the chat, or leaves out content or tool calls.
        """
        # Messages after the last supervised turn have no effect on training.
        turns = self._choose_turns(messages, untrained)
        if self.train_on != "everything":
            messages = messages[: turns[-1] + 1]

        chat = SupervisedChat(messages, turns, tools)
        written = self._write_in_best_form(chat)
        notes += written.notes
        notes += self._note_left_out(chat, written)
        return written.rows

    def _choose_turns(self, messages: Sequence[Message], untrained: Sequence[int]) -> list[int]:
        """Return the indices of the assistant messages to train on."""
        turns = assistant_turns(messages)
        if self.train_on != "everything":
            turns = [turn for turn in turns if turn not in untrained]
        if not turns:
            raise BadRowError("no assistant turn to train on")
        return turns[-1:] if self.train_on == "last" else turns

    def _write_in_best_form(self, chat: SupervisedChat) -> WrittenChat:
        """Return the chat in the first form without losses, otherwise in the first usable form."""
        try:
            return self._try_forms(chat)
        except BadRowError as problem:
            remedy = self._suggest_field_to_remove(chat)
            if not remedy and isinstance(problem, UnsupervisableError):
                remedy = self._suggest_remedy(chat)
            raise BadRowError(f"{problem}; {remedy}" if remedy else str(problem)) from problem

    def _try_forms(self, chat: SupervisedChat) -> WrittenChat:
        """Return the chat in the first form without losses, otherwise in the first usable form.

        Raises:
            BadRowError: No form is usable; the problem of the first one that the template accepts.
        """
        first_problem: BadRowError | None = None
        best: WrittenChat | None = None

        template = self.template
        for form in chat_forms(chat.messages, template.thought_key, template.thought_tags):
            try:
                if self.train_on == "everything":
                    written = self._write_everything(chat, form)
                else:
                    written = self._write_turns(chat, form)
            except BadRowError as problem:
                if first_problem is None or isinstance(first_problem, RefusedError):
                    first_problem = problem
                continue
            if not written.notes:
                return written
            best = best or written

        if best is not None:
            return best
        assert first_problem is not None  # there is at least one form
        raise first_problem

    def _suggest_field_to_remove(self, chat: SupervisedChat) -> str:
        """Return the message field without which the chat can be written, as a suggestion."""
        fields = {field for message in chat.messages for field in message}
        for field in sorted(fields - NEEDED_FIELDS):
            for roles in (("assistant",), ROLES):
                try:
                    self._try_forms(replace(chat, messages=_without(field, chat.messages, roles)))
                except BadRowError:
                    continue
                whose = "assistant" if len(roles) == 1 else "all"
                return f"remove the field {field!r:.40} from {whose} messages"
        return ""

    def _suggest_remedy(self, chat: SupervisedChat) -> str:
        """Return a suggestion for a chat whose turns can't be found."""
        try:
            written = self._write_everything(chat, chat.messages)
        except BadRowError:
            return "use a model with another chat template"
        if written.notes:
            return "use a model with another chat template"
        return "use --train-on everything"

    def _write_everything(self, chat: SupervisedChat, form: Sequence[Message]) -> WrittenChat:
        """Return the whole chat as one row in which every token is supervised."""
        thinking = any(thoughts_of(message) for message in chat.messages)
        text = self.template.render(form, ask=False, thinking=thinking, tools=chat.tools)
        if has_block_after_empty_block(text):
            raise BadRowError("the chat template writes two blocks of thoughts for one turn")

        notes: list[str] = []
        parts = _split_by_message(chat.messages, text)
        for turn in assistant_turns(chat.messages):
            notes += _check_turn(chat.messages[turn], turn, parts[turn])

        row = WrittenRow(text, [], thinking=thinking)
        return WrittenChat(form, [row], list(dict.fromkeys(notes)))

    def _write_turns(self, chat: SupervisedChat, form: Sequence[Message]) -> WrittenChat:
        """Return the chat as one row that marks as many turns as possible, and rows for the others.

        A row can mark a turn if it begins with the turn's prompt and answer, as in generation. The
        span of the turn begins after its prompt and stops after the first token that ends
        generation, because the model does not write what a template puts after that token.
        """
        # Find each turn's prompt and answer.
        rendered: dict[int, Turn] = {}
        notes: list[str] = []
        for turn in chat.turns:
            rendered[turn] = self.template.write_turn(form, turn, chat.tools)
            notes += _check_turn(chat.messages[turn], turn, rendered[turn].answer)

        # Begin with the last turn, because its prompt contains most of the other turns.
        rows: list[WrittenRow] = []
        left = list(chat.turns)
        while left:
            last = left[-1]
            text = rendered[last].text + rendered[last].rest
            inside = [turn for turn in left if text.startswith(rendered[turn].text)]
            spans = [(len(rendered[turn].prompt), len(rendered[turn].text)) for turn in inside]
            thinking = bool(thoughts_of(chat.messages[last]))
            rows.append(WrittenRow(text, spans, thinking=thinking))
            left = [turn for turn in left if turn not in inside]

        return WrittenChat(form, rows, list(dict.fromkeys(notes)))

    def _note_left_out(self, chat: SupervisedChat, written: WrittenChat) -> list[str]:
        """Return notes on the unsupervised content that the template leaves out."""
        lost: set[str] = set()

        # Search for messages without supervision outside the supervised text. Otherwise the words
        # of an answer would count as those of a question.
        text = _unsupervised_text(written.rows[0])
        others = [message for turn, message in enumerate(written.form) if turn not in chat.turns]
        for message, part in zip(others, _split_by_message(others, text), strict=True):
            missing = find_lost(message, part)
            if "content" in missing:
                lost.add(f"{message['role']} messages")
            if "tool calls" in missing:
                lost.add("tool calls")

        # A tool's name is part of its call, which is checked there.
        if self._ignores("name", ("system", "user", "assistant"), chat, written):
            lost.add("names of speakers ('name')")
        if chat.tools and not self._shows_tools(written.form, chat.tools):
            lost.add("tools")
        notes = [f"the chat template leaves out or rewrites {what}" for what in sorted(lost)]

        # Without ids, the first result is that of the first call.
        is_swapped = _has_swapped_results(written.form)
        if is_swapped and self._ignores("tool_call_id", ("tool",), chat, written):
            notes.append(
                "the chat template leaves out 'tool_call_id', and results of tools are in another"
                " order than their calls; write them in the same order"
            )
        return notes

    def _ignores(
        self, field: str, roles: Sequence[str], chat: SupervisedChat, written: WrittenChat
    ) -> bool:
        """Return whether messages of some roles have a field that the text does not depend on."""
        without = _without(field, written.form, roles)
        if without == list(written.form):
            return False
        try:
            text = self.template.render(written.form, ask=False, tools=chat.tools)
            return self.template.render(without, ask=False, tools=chat.tools) == text
        except BadRowError:
            return False

    def _shows_tools(self, form: Sequence[Message], tools: Sequence[Any]) -> bool:
        """Return whether the rendered chat depends on the tools."""
        thinking = bool(thoughts_of(form[-1]))
        try:
            without_tools = self.template.render(form, ask=False, thinking=thinking)
        except BadRowError:  # a template for chats with tools only
            return True
        with_tools = self.template.render(form, ask=False, thinking=thinking, tools=tools)
        return with_tools != without_tools


def _without(field: str, messages: Sequence[Message], roles: Sequence[str]) -> list[Message]:
    """Return messages of which those of some roles lack a field."""
    return [
        {name: value for name, value in message.items() if name != field}
        if message["role"] in roles
        else message
        for message in messages
    ]


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


def _check_turn(message: Mapping[str, Any], turn: int, text: str) -> list[str]:
    """Check that the text of a supervised turn holds the whole message.

    Returns:
        Notes on lost thoughts, and on answers that contain only thoughts or the end of thoughts.

    Raises:
        BadRowError: Content or tool calls are lost.
    """
    lost = find_lost(message, text)
    unusable = [part for part in lost if part != "thoughts"]
    if unusable:
        raise BadRowError(
            f"the chat template leaves out the {' and '.join(unusable)} of messages[{turn}]"
            f" (assistant); {_advise_lost(message, unusable)}"
        )

    # Training is still useful without the thoughts.
    notes: list[str] = []
    if "thoughts" in lost:
        notes.append("the chat template leaves out thoughts, so they are not trained on")
    closings = [closing for _, closing in THOUGHT_TAGS if closing in answer_of(message)]
    if closings:
        notes.append(
            f"an answer contains {closings[0]}, and the chat template may take the text before it"
            " for thoughts"
        )
    if not answer_of(message).strip() and not message.get("tool_calls"):
        notes.append("an assistant turn holds only thoughts, so the model learns an empty answer")
    return notes


def _advise_lost(message: Mapping[str, Any], lost: Sequence[str]) -> str:
    """Return what to do about a turn whose content or tool calls the template leaves out."""
    if "tool calls" in lost:
        return (
            "use a model whose template supports tools, or write the call into the content as this"
            " model writes it, or skip such rows with --on-bad drop"
        )
    if message.get("tool_calls"):
        return (
            "it may write no content beside tool calls: remove the content, or skip such rows with"
            " --on-bad drop"
        )
    return (
        "check whether the content holds text that the template removes, such as an end-of-turn"
        " token"
    )


def _split_by_message(messages: Sequence[Message], text: str) -> list[str]:
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


def _unsupervised_text(row: WrittenRow) -> str:
    """Return a row's text without the spans to train on."""
    text = ""
    start = 0
    for first, last in sorted(row.spans):
        text += row.text[start:first]
        start = last
    return text + row.text[start:]
