"""Render rows as text, encode the text as token ids, and mark the tokens to train on.

``RowRenderer`` renders a row as one text; as several if the template rewrites earlier turns, or if
the row has two answers. Each text comes with the characters to train on. ``encode`` supervises a
token if it holds at least one of them. A token that holds the end of the prompt and the start of
the completion therefore belongs to the completion. A note reports such tokens, because the prompt
alone is encoded differently.

``train_on`` decides which tokens are supervised: all "turns", only the "last" turn, or
"everything". With "turns":

- text: The whole text and the end-of-sequence token.
- chat: Every assistant turn with its end-of-turn token, but neither its role header nor the text
  that the template puts between turns. The template decides on all special tokens, including BOS;
  nothing is added to the rendered text.
- prompt and completion: The completion, as in a chat of one turn. Without a chat template, the text
  has one of the ``RAW_FORMS``, between BOS and EOS; the completion and EOS are supervised.

If a template renders today's date, as Llama 3's template does, ``DAY`` is used in training rows.
Otherwise a run could not be resumed on another day.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Encoding, Tokenizer

from ..models.prompt_format import RAW_FORMS, with_system
from .chat_renderer import ChatRenderer, TrainOn
from .chat_template import DAY, ChatTemplate
from .lost_content import call_values
from .messages import BadRowError
from .prompt_tokens import encode_end_alone, encode_prompt_alone
from .rendered_chat import CharRange, RenderedRow, RenderedText
from .rows import Row
from .special_tokens import (
    closing_eos,
    control_token_pattern,
    end_tokens,
    fast_tokenizer,
    has_unknown,
    leading_bos,
)
from .template_check import check_template
from .thoughts import Message, answer_of, thoughts_of

_SHOWN_TOKENS = 6  # maximum number of control tokens in a note

_STRADDLED = (
    "the end of the prompt and the start of the answer form one token, which the model does not see"
    " in generation; with a chat template, begin answers without a space; without a template, begin"
    " them with a space or a line break, and end prompts without one"
)
_UNKNOWN_CHARACTERS = (
    "the tokenizer has no token for some characters, and replaces them with its token for unknown"
    " text"
)
_TOKENIZED_ALONE = (
    "the tokenizer splits the end of the prompt differently when no answer follows; training splits"
    " it like that, because the model will see it so when you use it: there is nothing to do"
)


@dataclass(frozen=True)
class Example:
    """Tokens that are trained on together: a row, or a part of one.

    ``dataset.Examples`` is a sequence of these, which reads each from disk.

    Args:
        tokens: Token ids, int32, shape (length,).
        supervised: Whether each token is a training target, bool, shape (length,). It is predicted
            from the tokens before it. The first token is never a target.
        place: Location of the row, such as "train.jsonl:17".
    """

    tokens: np.ndarray
    supervised: np.ndarray
    place: str = ""


@dataclass
class EncodedRow:
    """The examples of a row, or the problem with it."""

    examples: list[Example] = field(default_factory=list)  # of any length; empty with a problem
    problem: str | None = None
    notes: list[str] = field(default_factory=list)  # for the report
    thinking: bool = False  # whether the last prompt of the user allows thoughts


class RowRenderer:
    """Renders rows as text for one tokenizer.

    Args:
        tokenizer: The model's tokenizer, which may have a chat template.
        train_on: Which tokens are supervised: "turns", "last" or "everything".
    """

    def __init__(self, tokenizer: TokenizerWrapper, train_on: TrainOn = "turns"):
        self.tokenizer = tokenizer
        self.train_on: TrainOn = train_on
        self.end_tokens = end_tokens(tokenizer)
        self.control_tokens = control_token_pattern(tokenizer)

    @cached_property
    def chat_renderer(self) -> ChatRenderer:
        """What renders chats; the tokenizer has a chat template."""
        # The rows are not to blame for a broken chat template.
        check_template(self.tokenizer)
        template = ChatTemplate(self.tokenizer, DAY, self.end_tokens)
        return ChatRenderer(template, self.train_on)

    def render(self, row: Row) -> RenderedRow:
        """Return a valid row as text, with the characters to train on.

        Raises:
            ModelError: The chat template can't render any chat.
        """
        rendered = RenderedRow()
        try:
            rendered.texts = self._render_answers(row, rendered.notes)
        except BadRowError as problem:
            rendered.problem = str(problem)
        return rendered

    def _render_answers(self, row: Row, notes: list[str]) -> list[RenderedText]:
        """Return the texts of a row; a row with two answers has one for each answer."""
        texts = self._render_answer(row, notes)
        if row.kind not in ("preference", "desirable", "undesirable"):
            return texts

        # An answer must be one text, because its log-probability is that of all its tokens.
        rejected = [] if row.rejected is None else self._render_answer(row.rejected, notes)
        if len(texts) != 1 or len(rejected) > 1:
            raise BadRowError(
                "the chat template rewrites earlier turns, so an answer of several turns is not one"
                " text; leave one assistant turn in each answer"
            )
        if rejected and rejected[0].text == texts[0].text:
            raise BadRowError(
                "chosen and rejected are equal once the chat template has rendered them, so there"
                " is nothing to prefer"
            )
        return [*texts, *rejected]

    def _render_answer(self, row: Row, notes: list[str]) -> list[RenderedText]:
        """Return the texts of a row without its rejected answer.

        Args:
            row: A valid row.
            notes: Receives the notes on the row.

        Raises:
            BadRowError: The row can't be trained on.
        """
        fields = row.fields

        # Plain texts need no template, and neither do prompts for models without one.
        if "text" in fields:
            text = fields["text"]
            notes += self._note_control_tokens_of_document(text)
            return [RenderedText(text, [(0, len(text))], add_special_tokens=True)]
        if not self.tokenizer.has_chat_template:
            names = [name for name in ("system", "prompt", "completion") if name in fields]
            notes += self._note_control_tokens([fields[name] for name in names])
            return [_render_raw(row, notes)]

        # All other rows are rendered as chats.
        messages = fields["messages"] if "messages" in fields else _to_messages(fields)
        texts: list[str] = []
        for message in messages:
            texts += _texts_of(message)
        notes += self._note_control_tokens(texts)
        return self.chat_renderer.render(messages, fields.get("tools"), row.untrained, notes)

    def _control_tokens_in(self, texts: Sequence[str]) -> list[str]:
        """Return the special tokens in texts; those that end generation come first."""
        if self.control_tokens is None:
            return []

        found: set[str] = set()
        for text in texts:
            found.update(self.control_tokens.findall(text))
        return sorted(found, key=lambda token: (token not in self.end_tokens, token))

    def _note_control_tokens(self, texts: Sequence[str]) -> list[str]:
        """Return a note on special tokens in messages, which are not encoded as plain text."""
        found = self._control_tokens_in(texts)
        if not found:
            return []

        # The tokens that end generation matter most.
        ends = [token for token in found if token in self.end_tokens]
        ending = f"; {' or '.join(ends)} ends the message where it occurs" if ends else ""
        shown = ", ".join(found[:_SHOWN_TOKENS])
        return [
            "a message contains control tokens, which the model reads as such and not as text:"
            f" {shown}{ending}"
        ]

    def _note_control_tokens_of_document(self, text: str) -> list[str]:
        """Return a note on special tokens in a text, which may be a chat that is rendered."""
        found = self._control_tokens_in([text])
        if not found:
            return []

        shown = ", ".join(found[:_SHOWN_TOKENS])
        return [
            f"the text contains control tokens, which the model reads as such: {shown}; all of the"
            " text is learned, so write a chat as messages if only its answers are to be learned"
        ]


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


def _render_raw(row: Row, notes: list[str]) -> RenderedText:
    """Return a prompt and its completion as text, for a model without a chat template."""
    fields = row.fields
    if "messages" in fields:
        raise BadRowError(
            "chat rows need a chat template, and this model's tokenizer has none; use an"
            " instruction-tuned model (such as gemma-3-270m-it), or write the rows as prompt and"
            " completion"
        )

    form, lead = RAW_FORMS.get(row.kind, RAW_FORMS["completion"])
    if row.kind in ("alpaca", "question"):
        shown = repr(f"{form}{lead}...")
        notes.append(f"no chat template, so {row.kind} rows are rendered as {shown}")

    # The text that the form puts after the prompt is trained on too, because the model has to
    # generate it.
    prompt = form.replace("{prompt}", fields["prompt"])
    prompt = with_system(prompt, fields.get("system", ""))
    text = prompt + lead + fields["completion"]
    return RenderedText(text, [(len(prompt), len(text))], add_special_tokens=True)


def encode(
    rendered_rows: Sequence[RenderedRow],
    tokenizer: TokenizerWrapper,
    train_on: TrainOn = "turns",
) -> list[EncodedRow]:
    """Return the token ids of each row, with one example for each of its texts.

    Args:
        rendered_rows: Rows from ``RowRenderer.render``. The tokenizer encodes their texts in
            parallel.
        tokenizer: A tokenizer that has a fast version.
        train_on: Which tokens are supervised, as for ``RowRenderer``.

    Raises:
        ModelError: The tokenizer has no fast version, or no end-of-sequence token.
    """
    results: list[EncodedRow] = []
    all_texts: list[tuple[EncodedRow, RenderedText]] = []
    for row in rendered_rows:
        thinking = any(rendered.thinking for rendered in row.texts[:1])
        result = EncodedRow(problem=row.problem, notes=list(row.notes), thinking=thinking)
        results.append(result)
        all_texts += [(result, rendered) for rendered in row.texts]

    backend = fast_tokenizer(tokenizer)
    texts = [rendered.text for _, rendered in all_texts]
    encodings = backend.encode_batch(texts, add_special_tokens=False)

    # Mark the supervised tokens, and add BOS and EOS where no chat template renders them.
    bos = leading_bos(tokenizer)
    for (result, rendered), encoding in zip(all_texts, encodings, strict=True):
        if has_unknown(encoding.ids, rendered.text, tokenizer):
            result.notes.append(_UNKNOWN_CHARACTERS)
        ids, supervised = _supervise(rendered, encoding, backend, result.notes)
        if rendered.add_special_tokens:
            start = bos if ids[:1] != bos else []
            end = closing_eos(ids, tokenizer)
            ids = start + ids + end
            supervised = np.concatenate(
                [np.zeros(len(start), bool), supervised, np.ones(len(end), bool)]
            )

        if train_on == "everything":
            supervised[:] = True
        # The first token can't be predicted, because there is no token before it.
        supervised[:1] = False
        result.examples.append(Example(np.array(ids, dtype=np.int32), supervised))

    return results


def _supervise(
    rendered: RenderedText, encoding: Encoding, backend: Tokenizer, notes: list[str]
) -> tuple[list[int], np.ndarray]:
    """Return a row's token ids and which of them are supervised, and note unusual ones.

    The ids at the end of each prompt are those that it has alone, as when the model generates.
    """
    ids = encoding.ids
    offsets = np.array(encoding.offsets).reshape(-1, 2)
    supervised, straddled = _find_supervised(offsets, rendered.learned)
    if straddled:
        notes.append(_STRADDLED)
        return ids, supervised
    if not rendered.learned or not ids:
        return ids, supervised

    # Generation encodes a prompt separately, so training must use the same tokens for it. Begin
    # with the last one, which leaves the places of the others as they are.
    for start, _ in sorted(rendered.learned)[:0:-1]:
        first, stop, end_ids = encode_end_alone(
            rendered.text[:start], encoding.ids, offsets, backend
        )
        if first < stop and not supervised[first:stop].any():
            ids = ids[:first] + end_ids + ids[stop:]
            unlearned = np.zeros(len(end_ids), bool)
            supervised = np.concatenate([supervised[:first], unlearned, supervised[stop:]])

    answer_start = int(np.argmax(supervised))
    prompt_ids = encode_prompt_alone(rendered, ids[:answer_start], offsets, backend)
    if prompt_ids != ids[:answer_start]:
        ids = prompt_ids + ids[answer_start:]
        supervised = np.concatenate([np.zeros(len(prompt_ids), bool), supervised[answer_start:]])
    if ids != encoding.ids:
        notes.append(_TOKENIZED_ALONE)
    return ids, supervised


def _find_supervised(offsets: np.ndarray, learned: Sequence[CharRange]) -> tuple[np.ndarray, bool]:
    """Return which tokens hold a learned character, and whether one straddles a range's start.

    Args:
        offsets: Start and stop of each token's characters, shape (length, 2).
        learned: The characters to train on.
    """
    starts = offsets[:, 0].copy()
    ends = offsets[:, 1]

    # Some byte-level tokenizers leave a token's spaces out of its offsets. Assume that each token
    # starts where the previous token ends.
    starts[1:] = np.minimum(starts[1:], ends[:-1])

    supervised = np.zeros(len(offsets), bool)
    straddled = False
    for start, stop in learned:
        # A token overlaps the range; or it begins before the range, and ends inside.
        supervised |= (ends > start) & (starts < stop)
        straddled |= bool(((starts < start) & (ends > start)).any())
    return supervised, straddled
