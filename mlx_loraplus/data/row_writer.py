"""A row is written as text by the model's chat template, and the characters to learn are marked.

Every supervised turn is checked: its content, the names and arguments of its tool calls and its
thoughts lie in what the model is to write in that turn. A row that loses content or calls can't be
used; lost thoughts are noted, and so is everything else that a template leaves out.

An assistant turn is learned behind the prompt that asks for it. Some templates rewrite a turn once
others follow, such as Qwen 3's, which forgets earlier thoughts: such a turn becomes an example of
its own, which ends with it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer

from ..errors import ModelError
from ..models.prompt_format import RAW_FORMS
from .chat_template import (
    DAY,
    ChatTemplate,
    Turn,
    UnsupervisableError,
    answer_of,
    find_lost,
    forms_of,
    leaves_of_calls,
    thoughts_of,
)
from .rows import BadRowError, Row

TrainOn = Literal["turns", "last", "everything"]


@dataclass(frozen=True)
class WrittenRow:
    """A row as one string, the character spans to learn, and whether BOS and EOS are still to be added."""

    text: str
    spans: list[tuple[int, int]]
    add_special_tokens: bool = False
    thinking: bool = False


class RowWriter:
    """Writes rows as text, for one tokenizer, and says what of them is learned."""

    def __init__(self, tokenizer: TokenizerWrapper, train_on: TrainOn):
        self.train_on = train_on
        self.ends = _ends(tokenizer)
        self.template = (
            ChatTemplate(tokenizer, DAY, self.ends) if tokenizer.has_chat_template else None
        )
        self.control = _control_tokens(tokenizer)

    def write(self, record: Row, notes: list[str]) -> list[WrittenRow]:
        """Turn a record into the strings to encode and the spans of them to learn; append what is to be noted.

        Raises: BadRowError where the row can't be learned as it is.
        """
        fields = record.fields
        if "text" in fields:
            notes += self._note_control_tokens([fields["text"]])
            return [WrittenRow(fields["text"], [(0, len(fields["text"]))], add_special_tokens=True)]
        if self.template is None:
            texts = [
                value
                for name, value in fields.items()
                if name in ("system", "prompt", "completion")
            ]
            notes += self._note_control_tokens(texts)
            return [_write_raw(record, notes)]

        messages = fields.get("messages")
        if messages is None:
            turns = {
                "system": fields.get("system"),
                "user": fields["prompt"],
                "assistant": fields["completion"],
            }
            messages = [
                {"role": role, "content": content}
                for role, content in turns.items()
                if content is not None
            ]
        notes += self._note_control_tokens(
            [text for message in messages for text in _words_of(message)]
        )
        return self._write_chat(messages, fields.get("tools"), record.untrained, notes)

    def _write_chat(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None,
        untrained: Sequence[int],
        notes: list[str],
    ) -> list[WrittenRow]:
        """Render a chat in the first form of its messages of which the template loses nothing."""
        assert self.template is not None
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on != "everything":
            turns = [turn for turn in turns if turn not in untrained]
        if not turns:
            raise BadRowError(
                "no assistant turn that may be learned: all say that they are not to be"
            )
        if self.train_on == "last":
            turns = turns[-1:]
        if self.train_on != "everything":
            messages = messages[: turns[-1] + 1]  # nothing is learned from what follows

        problem: BadRowError | None = None
        best: tuple[list[WrittenRow], list[str]] | None = None
        taken: Sequence[Any] = messages
        for form in forms_of(messages, self.template):
            try:
                if self.train_on == "everything":
                    found = self._write_everything(form, messages, tools)
                else:
                    found = self._write_turns(form, messages, turns, tools)
            except BadRowError as error:
                problem = problem or error
                continue
            if best is None or not found[1]:
                best, taken = found, form
            if not found[1]:
                break
        if isinstance(problem, UnsupervisableError) and best is None:
            raise BadRowError(f"{problem}; {self._advise(messages, tools)}")
        if best is None:
            raise problem or BadRowError("no assistant turn, so nothing to learn")

        rows, lost = best
        notes += lost
        notes += self._note_what_is_left_out(taken, turns, tools, rows[0])
        return rows

    def _advise(self, messages: Sequence[Any], tools: Sequence[Any] | None) -> str:
        """Return what to do about a chat whose turns can't be told apart."""
        try:
            _, notes = self._write_everything(messages, messages, tools)
        except BadRowError:
            notes = ["something is lost"]
        return "take a model with another chat template" if notes else "use --train-on everything"

    def _write_everything(
        self, form: Sequence[Any], messages: Sequence[Any], tools: Sequence[Any] | None
    ) -> tuple[list[WrittenRow], list[str]]:
        """Return the whole chat, every token of which is learned, and a note if thoughts are lost."""
        assert self.template is not None
        thinking = any(thoughts_of(message) for message in messages)
        text = self.template.render(form, ask=False, thinking=thinking, tools=tools)
        notes: list[str] = []
        for turn, part in enumerate(_parts_of(messages, text)):
            if messages[turn]["role"] == "assistant":
                notes += _check_turn(messages[turn], turn, part)
        return [WrittenRow(text, [], thinking=thinking)], list(dict.fromkeys(notes))

    def _write_turns(
        self,
        form: Sequence[Any],
        messages: Sequence[Any],
        turns: Sequence[int],
        tools: Sequence[Any] | None,
    ) -> tuple[list[WrittenRow], list[str]]:
        """Return the chat with every turn that stands in it as the model would write it; and the same for the others.

        A turn's span goes from behind its prompt to the end of the first token that ends
        generation: what a template puts behind that is not the model's to write.
        """
        assert self.template is not None
        written: dict[int, Turn] = {}
        notes: list[str] = []
        for turn in turns:
            written[turn] = self.template.write_turn(form, turn, tools)
            notes += _check_turn(messages[turn], turn, written[turn].answer)

        rows: list[WrittenRow] = []
        left = list(turns)
        while left:
            last = written[left[-1]]
            text = last.text + last.rest
            inside = [turn for turn in left if text.startswith(written[turn].text)]
            spans = [(len(written[turn].prompt), len(written[turn].text)) for turn in inside]
            rows.append(WrittenRow(text, spans, thinking=bool(thoughts_of(messages[left[-1]]))))
            left = [turn for turn in left if turn not in inside]
        return rows, list(dict.fromkeys(notes))

    def _note_what_is_left_out(
        self,
        messages: Sequence[Any],
        turns: Sequence[int],
        tools: Sequence[Any] | None,
        row: WrittenRow,
    ) -> list[str]:
        """Return notes on what a template leaves out of what is not learned."""
        assert self.template is not None
        lost: set[str] = set()
        text, start = "", 0  # without what is learned: a user's words are not found in an answer
        for first, last in sorted(row.spans):
            text, start = text + row.text[start:first], last
        text += row.text[start:]
        for turn, (message, part) in enumerate(
            zip(messages, _parts_of(messages, text), strict=True)
        ):
            if turn in turns:
                continue
            missing = find_lost(message, part)
            if "content" in missing:
                lost.add(f"{message['role']} messages")
            if "tool calls" in missing:
                lost.add("tool calls")
        if tools:
            thinking = bool(thoughts_of(messages[-1]))
            without = self.template.render(messages, ask=False, thinking=thinking)
            if self.template.render(messages, ask=False, thinking=thinking, tools=tools) == without:
                lost.add("tools")
        return [f"the chat template leaves out or rewrites {what}" for what in sorted(lost)]

    def _note_control_tokens(self, texts: Sequence[str]) -> list[str]:
        """Return notes on special tokens inside what people wrote, where they are no text."""
        if self.control is None:
            return []
        found = sorted({match for text in texts for match in self.control.findall(text)})
        notes = [
            f"{token} stands inside a message, and ends it there"
            for token in found
            if token in self.ends
        ]
        others = [token for token in found if token not in self.ends]
        if others:
            notes.append(
                "control tokens stand inside the row's text and act as such:"
                f" {', '.join(others[:6])}"
            )
        return notes


def _check_turn(message: Mapping[str, Any], turn: int, answer: str) -> list[str]:
    """Check that a supervised turn's own text holds all of it; return a note where only thoughts are lost.

    Raises: BadRowError where content or tool calls are lost.
    """
    lost = find_lost(message, answer)
    gone = [what for what in ("content", "tool calls") if what in lost]
    if gone:
        remedy = (
            "take a model whose template has tools, or leave such rows out with --on-bad drop"
            if "tool calls" in gone
            else ("see what the turn holds that the template cuts, such as a token that ends turns")
        )
        raise BadRowError(
            f"the chat template leaves out the {' and '.join(gone)} of messages[{turn}]"
            f" (assistant): {remedy}"
        )
    notes = (
        ["the chat template leaves out thoughts, so they are not learned"]
        if "thoughts" in lost
        else []
    )
    if not answer_of(message).strip() and not message.get("tool_calls"):
        notes.append(
            "an assistant turn holds thoughts only, so an empty answer is learned behind them"
        )
    return notes


def _words_of(message: Mapping[str, Any]) -> list[str]:
    """Return what people wrote in a message: its content, thoughts and calls."""
    calls = map(str, leaves_of_calls(message.get("tool_calls") or ()))
    return [answer_of(message), thoughts_of(message), *calls]


def _parts_of(messages: Sequence[Any], text: str) -> list[str]:
    """Return for each message the text from behind the message before it."""
    parts, start = [], 0
    for message in messages:
        parts.append(text[start:])
        # Templates put a system message anywhere, so nothing is known to stand behind it.
        content = "" if message["role"] == "system" else answer_of(message).strip()
        place = text.find(content, start) if content else -1
        if place >= 0:
            start = place + len(content)
    return parts


def _write_raw(record: Row, notes: list[str]) -> WrittenRow:
    """Turn a prompt and its completion into text, for a model without a chat template."""
    fields = record.fields
    if "messages" in fields:
        raise BadRowError(
            "chat rows need a chat template and this model's tokenizer has none; take an"
            " instruction-tuned model (such as gemma-3-270m-it), or write the rows as prompt and"
            " completion"
        )
    form, lead = RAW_FORMS.get(record.kind, RAW_FORMS["completion"])
    if record.kind in ("alpaca", "question"):
        notes.append(
            f"no chat template, so {record.kind} rows are written as {form + lead + '...'!r}"
        )
    prompt = (f"{fields['system']}\n\n" if "system" in fields else "") + form.replace(
        "{prompt}", fields["prompt"]
    )
    text = prompt + lead + fields["completion"]
    return WrittenRow(text, [(len(prompt), len(text))], add_special_tokens=True)


def fast_tokenizer(tokenizer: TokenizerWrapper) -> Tokenizer:
    """Return the fast tokenizer, which knows the characters of every token, set to neither cut nor pad."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            "this model's tokenizer has no fast version (tokenizer.json), which supervision needs"
        )
    backend.no_truncation()
    backend.no_padding()
    return backend


def _ends(tokenizer: TokenizerWrapper) -> list[str]:
    """Return the tokens that end generation, as text."""
    return [
        str(token)
        for token in tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
        if token
    ]


def _control_tokens(tokenizer: TokenizerWrapper) -> re.Pattern[str] | None:
    """Return what finds the tokenizer's special tokens in a text, and those that end generation."""
    added = fast_tokenizer(tokenizer).get_added_tokens_decoder().values()
    names = {token.content for token in added if token.special} | set(_ends(tokenizer))
    names = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None
