"""Convert rows to token ids, and mark the tokens to train on.

Every row is written as one text and encoded once. The text comes with the spans of characters to
train on. A token is supervised if it holds at least one character of a span. A token that holds the
end of the prompt and the start of the completion therefore belongs to the completion. A note
reports this, because the prompt alone is encoded differently.

``train_on`` decides which tokens are supervised: all "turns", only the "last" turn, or
"everything". With "turns":

- text: The whole text and the end-of-sequence token.
- chat: Every assistant turn with its end-of-turn token, but neither its role header nor the text
  that the template puts between turns. The template decides on all special tokens, including BOS;
  nothing is added to the rendered text.
- prompt and completion: The completion, as in a chat of one turn. Without a chat template, the text
  has one of the ``RAW_FORMS``, between BOS and EOS; the completion and EOS are supervised.

If a template writes today's date, as Llama 3's template does, ``DAY`` is used in training rows.
Otherwise a run could not be resumed on another day.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Encoding, Tokenizer

from ..errors import DataError, ModelError
from ..models.prompt_format import PromptFormat
from .chat_template import ChatTemplate
from .chat_writer import TrainOn, WrittenRow
from .row_writer import RowWriter, fast_tokenizer
from .rows import BadRowError, Row

_WINDOW = 16
"""Number of tokens at the end of a prompt that are encoded again for comparison."""

_STRADDLED = (
    "the end of the prompt and the start of the answer are one token, which the model does not see"
    " in generation; begin answers with a space or a line break, and end prompts without one"
)
_UNKNOWN_CHARACTERS = (
    "the tokenizer has no token for some characters, and replaces them by its token for unknown"
    " text"
)
_TOKENIZED_ALONE = (
    "the end of the prompt has other tokens on its own than before the answer; the row is trained"
    " with the tokens that the prompt has on its own, as in generation"
)


@dataclass(frozen=True)
class Example:
    """Tokens that are trained on together: a row, or a part of one.

    Args:
        tokens: Token ids, int32, shape (length,).
        supervised: Whether each token is a training target, bool, shape (length,). It is predicted
            from the tokens before it. The first token is never a target.
        source: Location of the row, such as "train.jsonl:17".
    """

    tokens: np.ndarray
    supervised: np.ndarray
    source: str = ""


@dataclass
class Encoded:
    """The examples of a row, or the problem with it."""

    examples: list[Example] = field(default_factory=list)  # of any length; empty with a problem
    problem: str | None = None
    notes: list[str] = field(default_factory=list)  # remarks for the report
    thinking: bool = False  # whether the last turn's prompt allows thoughts


def encode(
    records: Sequence[Row], tokenizer: TokenizerWrapper, train_on: TrainOn = "turns"
) -> list[Encoded]:
    """Encode each row, into several examples if the chat template rewrites earlier turns.

    Args:
        records: Valid rows.
        tokenizer: A tokenizer that has a fast version.
        train_on: Which tokens are supervised: "turns", "last" or "everything".

    Raises:
        ModelError: The tokenizer has no fast version, or no end-of-sequence token.
    """
    # Write all rows before encoding any, because the tokenizer encodes many texts in parallel.
    writer = RowWriter(tokenizer, train_on)
    results = [Encoded() for _ in records]
    written: list[tuple[Encoded, WrittenRow]] = []
    for record, result in zip(records, results, strict=True):
        try:
            rows = _write_row(writer, record, result.notes)
        except BadRowError as problem:
            result.problem = str(problem)
            continue
        result.thinking = rows[0].thinking
        written += [(result, row) for row in rows]

    backend = fast_tokenizer(tokenizer)
    encodings = backend.encode_batch([row.text for _, row in written], add_special_tokens=False)

    # Mark the supervised tokens, and add BOS and EOS where no chat template writes them.
    bos = _leading_bos(tokenizer)
    for (result, row), encoding in zip(written, encodings, strict=True):
        if _has_unknown(encoding.ids, row.text, tokenizer):
            result.notes.append(_UNKNOWN_CHARACTERS)
        ids, supervised = _supervise(row, encoding, backend, result.notes)
        if row.add_special_tokens:
            start = bos if ids[:1] != bos else []
            end = _closing_eos(ids, tokenizer)
            ids = start + ids + end
            supervised = np.concatenate(
                [np.zeros(len(start), bool), supervised, np.ones(len(end), bool)]
            )

        # The first token can't be predicted, because there is no token before it.
        if train_on == "everything":
            supervised[:] = True
        supervised[:1] = False
        result.examples.append(Example(np.array(ids, dtype=np.int32), supervised))

    return results


def _write_row(writer: RowWriter, record: Row, notes: list[str]) -> list[WrittenRow]:
    """Return the texts to encode for a row; for a row with two answers, that of each answer."""
    rows = writer.write(record, notes)
    if record.rejected is None:
        return rows

    others = writer.write(record.rejected, notes)
    if len(rows) != 1 or len(others) != 1:
        raise BadRowError(
            "the chat template rewrites earlier turns, so an answer of several turns is not one"
            " text; leave one assistant turn in chosen and rejected"
        )
    return [*rows, *others]


def encode_prompt(
    prompt: str,
    tokenizer: TokenizerWrapper,
    *,
    chat: bool = True,
    earlier: Sequence[dict[str, str]] = (),
    form: PromptFormat | None = None,
    tools: Sequence[Any] = (),
) -> list[int]:
    """Return a prompt's token ids, which are the same as in training except for the date.

    Args:
        prompt: The text, or the user's message.
        tokenizer: A tokenizer that has a fast version.
        chat: Whether to write the prompt in the training format, instead of unchanged.
        earlier: Messages that a chat template puts before the prompt. If the first is a system
            message, it replaces the one that the model was trained with; empty, it removes it.
        form: The format that the model was trained with.
        tools: The tools that the model may call; a chat template writes them into the prompt.

    Raises:
        DataError: The template refuses the messages, or the prompt has no tokens.
    """
    form = form or PromptFormat()
    bos = _leading_bos(tokenizer)
    system = form.system or ""
    if earlier and earlier[0]["role"] == "system":
        system, earlier = earlier[0]["content"], earlier[1:]

    # A chat template writes BOS itself.
    if not chat:
        text = prompt
    elif tokenizer.has_chat_template:
        first = [{"role": "system", "content": system}] if system.strip() else []
        messages = [*first, *earlier, {"role": "user", "content": prompt}]
        template = ChatTemplate(tokenizer)
        text = template.render(messages, ask=True, thinking=form.thinking, tools=tools)
        bos = []
    else:
        text = form.write_raw(prompt, system)

    ids = fast_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids
    if ids[:1] != bos:
        ids = bos + ids
    if not ids:
        raise DataError("the prompt is empty; give at least one word")
    return ids


def encode_document(
    pieces: Iterable[str], tokenizer: TokenizerWrapper
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield a document's token ids and which are supervised: BOS, each piece of the text, EOS.

    All tokens except BOS are supervised. A piece is encoded together with the last character of the
    previous piece, because some tokenizers treat the start of a text differently.
    """
    backend = fast_tokenizer(tokenizer)
    bos = _leading_bos(tokenizer)
    yield bos, [False] * len(bos)

    before = ""
    ids: list[int] = []
    for piece in pieces:
        encoding = backend.encode(before + piece, add_special_tokens=False)
        offsets = encoding.offsets

        # Leave out the tokens of the previous character, except one that also covers the piece.
        seam = len(before)
        if before and any(start < seam < end for start, end in offsets):
            ids = backend.encode(piece, add_special_tokens=False).ids
        else:
            pairs = zip(encoding.ids, offsets, strict=True)
            ids = [token for token, (_, end) in pairs if end > seam]
        yield ids, [True] * len(ids)
        before = piece[-1]

    eos = _closing_eos(ids, tokenizer)
    yield eos, [True] * len(eos)


def _supervise(
    row: WrittenRow, encoding: Encoding, backend: Tokenizer, notes: list[str]
) -> tuple[list[int], np.ndarray]:
    """Return a row's token ids and which of them are supervised."""
    ids = encoding.ids
    offsets = np.array(encoding.offsets).reshape(-1, 2)
    supervised, straddled = _find_supervised(offsets, row.spans)
    if straddled:
        notes.append(_STRADDLED)
        return ids, supervised
    if not row.spans:
        return ids, supervised

    # Generation encodes the prompt separately, so training must use the same tokens for it.
    first = int(np.argmax(supervised))
    prompt_ids = _encode_prompt_alone(row, ids[:first], offsets, backend)
    if prompt_ids == ids[:first]:
        return ids, supervised
    notes.append(_TOKENIZED_ALONE)
    supervised = np.concatenate([np.zeros(len(prompt_ids), bool), supervised[first:]])
    return prompt_ids + ids[first:], supervised


def _encode_prompt_alone(
    row: WrittenRow, prompt_ids: list[int], offsets: np.ndarray, backend: Tokenizer
) -> list[int]:
    """Return the token ids of a row's first prompt when it is encoded separately.

    The whole prompt is only encoded again if separate encoding changes the tokens at its end.

    Args:
        row: The row as text.
        prompt_ids: The token ids of the prompt when it is encoded with its answer.
        offsets: Start and stop of each token's characters, shape (length, 2).
        backend: The fast tokenizer.
    """
    if not prompt_ids:
        return prompt_ids

    start = row.spans[0][0]
    window = max(0, len(prompt_ids) - _WINDOW)
    tail = row.text[int(offsets[window, 0]) : start]
    if backend.encode(tail, add_special_tokens=False).ids == prompt_ids[window:]:
        return prompt_ids

    alone = backend.encode(row.text[:start], add_special_tokens=False).ids
    return alone or prompt_ids


def _find_supervised(
    offsets: np.ndarray, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, bool]:
    """Return which tokens hold a character of a span, and whether one straddles a span's start.

    Args:
        offsets: Start and stop of each token's characters, shape (length, 2).
        spans: Start and stop of the characters to train on.
    """
    starts = offsets[:, 0].copy()
    ends = offsets[:, 1]

    # Some byte-level tokenizers leave a token's spaces out of its offsets. Assume that each token
    # starts where the previous token ends.
    starts[1:] = np.minimum(starts[1:], ends[:-1])

    supervised = np.zeros(len(offsets), bool)
    straddled = False
    for first, last in spans:
        supervised |= (ends > first) & (starts < last)
        straddled |= bool(((starts < first) & (ends > first)).any())
    return supervised, straddled


def _has_unknown(ids: Sequence[int], text: str, tokenizer: TokenizerWrapper) -> bool:
    """Return whether a text has characters that became the token for unknown text."""
    unknown = tokenizer.unk_token_id

    # Tokenizers that have a token for every byte often use the end token's id here.
    if unknown is None or unknown in (tokenizer.bos_token_id, *tokenizer.eos_token_ids):
        return False
    return unknown in ids and str(tokenizer.unk_token) not in text


def _leading_bos(tokenizer: TokenizerWrapper) -> list[int]:
    """Return [BOS] if the tokenizer puts BOS before every text, else []."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer.encode("")[:1] == [bos]:
        return [bos]
    return []


def _closing_eos(ids: Sequence[int], tokenizer: TokenizerWrapper) -> list[int]:
    """Return [EOS], or [] if ``ids`` already end with a token that ends generation."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "this model's tokenizer has no end-of-sequence token, so the model could not learn"
            " where to stop; use a model that has one"
        )
    if ids and ids[-1] in tokenizer.eos_token_ids:
        return []
    return [tokenizer.eos_token_id]
