"""Render chats as text with the model's chat template, and mark the turns to train on.

Every supervised turn is checked: the template must render its content, its thoughts, and the names
and arguments of its tool calls inside the text that the model has to generate. If content or
tool calls are missing, the chat can't be used. If the template leaves out thoughts or anything
else, a note reports this.

In an example, each assistant turn follows the prompt that asks for it. Some templates rewrite a
turn when other turns follow; Qwen 3's template, for example, removes earlier thoughts. Such a turn
becomes a separate example, which ends with the turn.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jinja2.exceptions import SecurityError

from .chat_notes import divide_by_message, note_left_out
from .chat_template import ChatTemplate, RefusedError, Turn, UnsupervisableError
from .lost_content import find_lost, has_python_arguments
from .messages import BadRowError, assistant_turns
from .rendered_chat import RenderedChat, RenderedText, SupervisedChat
from .simpler_chats import simpler_chats
from .template_forms import ChatForm, chat_forms
from .thoughts import (
    THOUGHT_TAGS,
    Message,
    ThoughtBlock,
    answer_of,
    answer_only,
    find_open_tags,
    has_block_after_empty_block,
    thoughts_of,
)

TrainOn = Literal["turns", "last", "everything"]

_UNASKED = (
    "an answer before the first user message is trained on, after no question; to leave it out, add"
    ' "weight": 0 to its message'
)
_SPECIAL_TOKENS = re.compile(r"(\s|<[^<>\s]+>|\[[A-Z_/]+\])*")


class LostError(BadRowError):
    """The chat template leaves out content or tool calls; with advice for this case."""

    def __init__(self, problem: str, advice: str):
        super().__init__(problem)
        self.advice = advice


@dataclass(frozen=True)
class ChatRenderer:
    """Renders chats with one chat template."""

    template: ChatTemplate
    train_on: TrainOn

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        untrained: Sequence[int],
        notes: list[str],
    ) -> list[RenderedText]:
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
            if messages[-1]["role"] != "assistant":
                notes.append("messages after the last answer are left out: they have no effect")
            messages = messages[: turns[-1] + 1]

        chat = SupervisedChat(messages, turns, tools)
        rendered = self._render_in_best_form(chat)
        roles = [message["role"] for message in messages[: turns[0]]]
        if self.train_on != "everything" and "user" not in roles:
            notes.append(_UNASKED)
        notes += rendered.notes
        notes += note_left_out(self.template, chat, rendered)
        return rendered.texts

    def _choose_turns(self, messages: Sequence[Message], untrained: Sequence[int]) -> list[int]:
        """Return the indices of the assistant messages to train on."""
        turns = assistant_turns(messages)
        if self.train_on != "everything":
            turns = [turn for turn in turns if turn not in untrained]
        if not turns:
            raise BadRowError("no assistant turn to train on")
        return turns[-1:] if self.train_on == "last" else turns

    def _render_in_best_form(self, chat: SupervisedChat) -> RenderedChat:
        """Return the chat as ``_try_forms`` does; an error also says what to do."""
        try:
            return self._try_forms(chat)
        except BadRowError as problem:
            remedy = self._suggest_remedy(chat, problem)
            raise BadRowError(f"{problem}; {remedy}" if remedy else str(problem)) from problem

    def _try_forms(self, chat: SupervisedChat) -> RenderedChat:
        """Return the chat in the first form without losses, otherwise in the first usable form.

        Raises:
            BadRowError: No form is usable. The error is that of the first form that the template
                accepts, or of the last form if the template refuses all of them.
        """
        first_problem: BadRowError | None = None
        best: RenderedChat | None = None

        # A chat without tool calls and thoughts has one form: its messages as they are.
        template = self.template
        for form in chat_forms(chat.messages, template.thought_key, template.thought_block):
            # Thoughts can be put before an answer only where its prompt ends.
            if form.thoughts and self.train_on == "everything":
                continue
            try:
                if self.train_on == "everything":
                    rendered = self._render_everything(chat, form)
                else:
                    rendered = self._render_turns(chat, form)
            except BadRowError as problem:
                if first_problem is None or isinstance(first_problem, RefusedError):
                    first_problem = problem
                continue
            if not rendered.notes:
                return rendered
            best = best or rendered

        if best is not None:
            return best
        assert first_problem is not None  # there is at least one form
        raise first_problem

    def _suggest_remedy(self, chat: SupervisedChat, problem: BadRowError) -> str:
        """Return what to do about a chat that can't be rendered, tried before it is suggested."""
        for messages, remedy in simpler_chats(chat.messages):
            turns = assistant_turns(messages)
            if self.train_on == "last":
                turns = turns[-1:]
            try:
                self._try_forms(replace(chat, messages=messages, turns=turns))
            except BadRowError:
                continue
            return remedy

        if isinstance(problem, LostError):
            return problem.advice
        if isinstance(problem.__cause__, SecurityError):
            return (
                "this model's template does what transformers and mlx-lm do not allow in a template"
                "; use the current template of the model's publisher, or another model"
            )
        return self._suggest_everything(chat) if isinstance(problem, UnsupervisableError) else ""

    def _suggest_everything(self, chat: SupervisedChat) -> str:
        """Return what to do about a chat whose turns can't be found."""
        other = "use a model with another chat template"

        # Results of tools may be anywhere in a turn, and must not be learned as a part of it.
        if any(message["role"] == "tool" for message in chat.messages):
            return other
        try:
            rendered = self._render_everything(chat, ChatForm(chat.messages, {}))
        except BadRowError:
            return other
        return other if rendered.notes else "use --train-on everything"

    def _render_everything(self, chat: SupervisedChat, form: ChatForm) -> RenderedChat:
        """Return the whole chat as one text in which every token is supervised."""
        thinking = any(thoughts_of(message) for message in chat.messages)
        text = self.template.render(form.messages, ask=False, thinking=thinking, tools=chat.tools)
        if has_block_after_empty_block(text):
            raise BadRowError("the chat template renders two blocks of thoughts for one turn")

        notes: list[str] = []
        parts = divide_by_message(chat.messages, text)
        for turn in assistant_turns(chat.messages):
            notes += _check_turn(chat.messages[turn], turn, parts[turn])
            notes += self._note_inside(chat, form, turn)

        texts = [RenderedText(text, [], thinking=thinking)]
        return RenderedChat(form, texts, list(dict.fromkeys(notes)))

    def _note_inside(self, chat: SupervisedChat, form: ChatForm, turn: int) -> list[str]:
        """Return a note if the template renders the thoughts of a turn inside the answer.

        Raises:
            BadRowError: The template refuses a part of the chat.
        """
        if not thoughts_of(chat.messages[turn]):
            return []
        try:
            rendered = self.template.render_turn(form, turn, chat.tools)
        except UnsupervisableError:
            return []
        return _check_place(rendered, chat.messages[turn], self.template.thought_block)

    def _render_turns(self, chat: SupervisedChat, form: ChatForm) -> RenderedChat:
        """Return the chat as one text that marks most turns, and as texts for the other turns.

        A text can mark a turn if it begins with the turn's prompt and answer, as in generation. The
        marked characters begin after the turn's prompt and stop after the first token that ends
        generation, because the model does not generate what a template puts after that token.
        """
        # Find each turn's prompt and answer.
        rendered: dict[int, Turn] = {}
        notes: list[str] = []
        for index in chat.turns:
            turn = self.template.render_turn(form, index, chat.tools)
            notes += _check_turn(chat.messages[index], index, turn.answer)
            notes += _check_place(turn, chat.messages[index], self.template.thought_block)
            rendered[index] = turn

        # Begin with the last turn, because its prompt contains most of the other turns.
        thinking = _answers_with_thoughts(chat)
        texts: list[RenderedText] = []
        left = list(chat.turns)
        while left:
            last = rendered[left[-1]]
            text = last.text + last.rest
            inside = [index for index in left if text.startswith(rendered[index].text)]
            marked = [rendered[index] for index in inside]
            ranges = [(len(turn.prompt), len(turn.text)) for turn in marked]
            texts.append(RenderedText(text, ranges, thinking=thinking))
            left = [index for index in left if index not in inside]

        return RenderedChat(form, texts, list(dict.fromkeys(notes)))


def _answers_with_thoughts(chat: SupervisedChat) -> bool:
    """Return whether the last supervised turn that answers the user has thoughts.

    A prompt in generation asks for such a turn, not for one that follows the result of a tool.
    """
    roles = [message["role"] for message in chat.messages]
    answers = [turn for turn in chat.turns if turn == 0 or roles[turn - 1] != "tool"]
    return bool(thoughts_of(chat.messages[(answers or chat.turns)[-1]]))


def _check_turn(message: Mapping[str, Any], turn: int, text: str) -> list[str]:
    """Check that the text of a supervised turn holds the whole message.

    Returns:
        Notes on lost thoughts, on answers that contain only thoughts or the end of thoughts, and on
        tool calls that are not in JSON.

    Raises:
        BadRowError: Content or tool calls are lost.
    """
    lost = find_lost(message, text)
    unusable = [part for part in lost if part != "thoughts"]
    if unusable:
        raise LostError(
            f"the chat template leaves out the {' and '.join(unusable)} of messages[{turn}]"
            " (assistant)",
            _advise_lost(message, unusable),
        )

    # Training is still useful without the thoughts.
    notes: list[str] = []
    if "thoughts" in lost:
        notes.append("the chat template leaves out thoughts, so they are not trained on")
    if has_python_arguments(message, text):
        notes.append(
            "the chat template renders the arguments of tool calls as Python, not as JSON, and"
            " programs that read JSON can't read such calls"
        )
    closings = [closing for _, closing in THOUGHT_TAGS if closing in answer_of(message)]
    if closings:
        notes.append(
            f"an answer contains {closings[0]}, and the chat template may take the text before it"
            " for thoughts"
        )
    if not answer_of(message).strip() and not message.get("tool_calls"):
        notes.append("an assistant turn holds only thoughts, so the model learns an empty answer")
    return notes


def _check_place(turn: Turn, message: Message, block: ThoughtBlock) -> list[str]:
    """Return a note if thoughts come after the answer or special tokens, or are in no block."""
    # Thoughts that are left out have a note of their own.
    if not thoughts_of(message) or "thoughts" in find_lost(message, turn.answer):
        return []

    text = turn.answer.lstrip()
    if find_open_tags(turn.prompt) is not None or text.startswith(block.opening):
        return []

    # A header of words may come before the block, but no answer and no special token.
    before, found, after = text.partition(block.opening)
    if not found:
        inside = f"the chat template renders thoughts inside the answer, not in {block.opening}"
        return [inside] if block.is_own else []
    if find_lost(answer_only(message), after):
        return ["the chat template renders thoughts after the content or tool calls of an answer"]
    if _SPECIAL_TOKENS.fullmatch(before):
        return ["the chat template renders thoughts after the special tokens that begin an answer"]
    return []


def _advise_lost(message: Mapping[str, Any], lost: Sequence[str]) -> str:
    """Return what to do about a turn whose content or tool calls the template leaves out."""
    if "tool calls" in lost:
        return (
            "use a model whose template supports tools, or write the call into the content as this"
            " model writes it, or skip such rows with --on-bad drop"
        )
    if message.get("tool_calls"):
        return "skip such rows with --on-bad drop"
    return (
        "check whether the content holds text that the template removes, such as an end-of-turn"
        " token"
    )
