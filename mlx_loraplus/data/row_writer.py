"""Write rows of any kind as text for one tokenizer, and mark the characters to train on."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer

from ..errors import ModelError
from ..models.prompt_format import RAW_FORMS, with_system
from .chat_template import DAY, ChatTemplate
from .chat_writer import ChatWriter, TrainOn, WrittenRow
from .lost_content import call_values
from .messages import BadRowError
from .rows import Row
from .thoughts import Message, answer_of, thoughts_of

_SHOWN_TOKENS = 6  # maximum number of control tokens in a note


class RowWriter:
    """Writes rows as text for one tokenizer."""

    def __init__(self, tokenizer: TokenizerWrapper, train_on: TrainOn):
        self.end_tokens = _end_tokens(tokenizer)
        self.control_tokens = _match_control_tokens(tokenizer)
        self.chat_writer: ChatWriter | None = None
        if tokenizer.has_chat_template:
            template = ChatTemplate(tokenizer, DAY, self.end_tokens)
            self.chat_writer = ChatWriter(template, train_on)

    def write(self, record: Row, notes: list[str]) -> list[WrittenRow]:
        """Return the texts to encode for a row, with the spans to train on.

        Args:
            record: A valid row.
            notes: Receives the notes on the row.

        Raises:
            BadRowError: The row can't be trained on.
        """
        fields = record.fields

        # Plain texts need no template, and neither do prompts for models without one.
        if "text" in fields:
            text = fields["text"]
            notes += self._note_control_tokens([text])
            return [WrittenRow(text, [(0, len(text))], add_special_tokens=True)]
        if self.chat_writer is None:
            names = [name for name in ("system", "prompt", "completion") if name in fields]
            notes += self._note_control_tokens([fields[name] for name in names])
            return [_write_raw(record, notes)]

        # All other rows are written as chats.
        messages = fields["messages"] if "messages" in fields else _to_messages(fields)
        texts: list[str] = []
        for message in messages:
            texts += _texts_of(message)
        notes += self._note_control_tokens(texts)
        return self.chat_writer.write(messages, fields.get("tools"), record.untrained, notes)

    def _note_control_tokens(self, texts: Sequence[str]) -> list[str]:
        """Return notes on special tokens in a row's text, which are not encoded as plain text."""
        if self.control_tokens is None:
            return []

        found: set[str] = set()
        for text in texts:
            found.update(self.control_tokens.findall(text))

        # Each token that ends generation has a separate note, because these tokens matter most.
        notes: list[str] = []
        others: list[str] = []
        for token in sorted(found):
            if token in self.end_tokens:
                notes.append(f"{token} occurs inside a message, and ends it there")
            else:
                others.append(token)
        if others:
            shown = ", ".join(others[:_SHOWN_TOKENS])
            notes.append(
                f"the row's text contains control tokens, which are not encoded as text: {shown}"
            )
        return notes


def _to_messages(fields: Mapping[str, str]) -> list[dict[str, str]]:
    """Return a prompt and its completion as a chat of one turn."""
    messages: list[dict[str, str]] = []
    for role, name in (("system", "system"), ("user", "prompt"), ("assistant", "completion")):
        if name in fields:
            messages.append({"role": role, "content": fields[name]})
    return messages


def _texts_of(message: Message) -> list[str]:
    """Return the texts of a message: its content, thoughts and tool calls."""
    calls = [str(value) for value in call_values(message.get("tool_calls") or ())]
    return [answer_of(message), thoughts_of(message), *calls]


def _write_raw(record: Row, notes: list[str]) -> WrittenRow:
    """Return a prompt and its completion as text, for a model without a chat template."""
    fields = record.fields
    if "messages" in fields:
        raise BadRowError(
            "chat rows need a chat template, and this model's tokenizer has none; use an"
            " instruction-tuned model (such as gemma-3-270m-it), or write the rows as prompt and"
            " completion"
        )

    form, lead = RAW_FORMS.get(record.kind, RAW_FORMS["completion"])
    if record.kind in ("alpaca", "question"):
        written = repr(f"{form}{lead}...")
        notes.append(f"no chat template, so {record.kind} rows are written as {written}")

    # The completion follows the prompt and the text that the form puts after the prompt.
    prompt = form.replace("{prompt}", fields["prompt"])
    prompt = with_system(prompt, fields.get("system", ""))
    text = prompt + lead + fields["completion"]
    return WrittenRow(text, [(len(prompt), len(text))], add_special_tokens=True)


def fast_tokenizer(tokenizer: TokenizerWrapper) -> Tokenizer:
    """Return the fast tokenizer, which can map every token to its characters.

    Its truncation and padding are switched off.

    Raises:
        ModelError: The tokenizer has no fast version.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            "this model's tokenizer has no fast version (tokenizer.json), which is needed to find"
            " the tokens to train on; use a model that has one"
        )
    backend.no_truncation()
    backend.no_padding()
    return backend


def _end_tokens(tokenizer: TokenizerWrapper) -> list[str]:
    """Return the tokens that end generation, as text."""
    tokens = tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
    return [str(token) for token in tokens if token]


def _match_control_tokens(tokenizer: TokenizerWrapper) -> re.Pattern[str] | None:
    """Return a pattern of the tokenizer's special tokens, or None if it has none."""
    added = fast_tokenizer(tokenizer).get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    names = [name for name in special.union(_end_tokens(tokenizer)) if name.strip()]
    if not names:
        return None

    # Longer tokens come first, because one token may be a prefix of another.
    names.sort(key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in names))
