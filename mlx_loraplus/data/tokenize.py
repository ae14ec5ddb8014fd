"""Records become token ids, and which of them are supervised.

Every row is turned into one string and encoded once; which characters are to be learned is known on
the string, and a token is supervised when it holds at least one of them. So a token that straddles
the seam of prompt and completion belongs to the completion, which is noted: asked with the prompt
alone, the model meets another. What is learned by ``train_on`` "turns" ("last": the last turn;
"everything": all tokens):

- text: all of it, and the end-of-sequence token.
- chat: every assistant turn with its end-of-turn token; not its role header, nor the template's
  text between turns. The template is the authority on special tokens, BOS included: nothing is
  added to what it renders.
- prompt and completion, in any form: a chat of one turn. On a tokenizer without a chat template the
  text is that of ``RAW_FORMS``, or the bare two, between BOS and EOS; the completion and EOS are
  learned.

A template that writes today's date, as Llama 3's, writes ``DAY`` in rows: else a run could not be
resumed tomorrow.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer

from ..errors import DataError, ModelError
from ..models.prompt_format import PromptFormat
from .chat_template import ChatTemplate
from .chat_writer import TrainOn, WrittenRow
from .row_writer import RowWriter, fast_tokenizer
from .rows import BadRowError, Row

_WINDOW = 16  # tokens at the end of a prompt that are encoded again
_STRADDLED = (
    "the end of the prompt and the start of the answer are one token, which the model won't meet"
    " when it is asked: let answers begin with a space or a line break, and prompts end without"
)
_TOKENIZED_ALONE = (
    "the end of the prompt has other tokens on its own than before the answer; the row is trained"
    " behind those of the prompt alone, as the model is asked"
)


@dataclass(frozen=True)
class Example:
    """Tokens that are learned together: a row, or a part of one."""

    tokens: np.ndarray  # (length,) int32
    supervised: (
        np.ndarray
    )  # (length,) bool: the token is to be predicted from those before it; never at 0
    source: str = ""  # where it came from, "train.jsonl:17"


@dataclass
class Encoded:
    """What became of a record."""

    examples: list[Example] = field(
        default_factory=list
    )  # whole, however long; none if there is a problem
    problem: str | None = None
    notes: list[str] = field(default_factory=list)  # such as what the template leaves out
    thinking: bool = False  # whether the prompt of its last turn lets the model think


def encode(
    records: Sequence[Row], tokenizer: TokenizerWrapper, train_on: TrainOn = "turns"
) -> list[Encoded]:
    """Encode records, each into one example, or several where the chat template rewrites earlier turns.

    Raises: ModelError where the tokenizer has no fast version, or names no end-of-sequence token.
    """
    encoded, rendered = [Encoded() for _ in records], []
    writer = RowWriter(tokenizer, train_on)
    for record, result in zip(records, encoded, strict=True):
        try:
            rows = writer.write(record, result.notes)
        except BadRowError as problem:
            result.problem = str(problem)
            continue
        result.thinking = rows[0].thinking
        rendered += [(result, row) for row in rows]
    backend = fast_tokenizer(tokenizer)
    encodings = backend.encode_batch([row.text for _, row in rendered], add_special_tokens=False)
    bos = _leading_bos(tokenizer)
    for (result, row), encoding in zip(rendered, encodings, strict=True):
        ids, offsets = encoding.ids, np.array(encoding.offsets).reshape(-1, 2)
        supervised, straddled = _supervised(offsets, row.spans)
        if straddled:
            result.notes.append(_STRADDLED)
        elif row.spans and (asked := _asked_otherwise(row, ids, offsets, supervised, backend)):
            # The prompt alone has other tokens at its end: train behind those, which the model
            # meets when asked.
            first = int(np.argmax(supervised))
            ids = asked + ids[first:]
            supervised = np.concatenate([np.zeros(len(asked), bool), supervised[first:]])
            result.notes.append(_TOKENIZED_ALONE)
        if row.add_special_tokens:
            front, end = bos if ids[:1] != bos else [], _closing_eos(ids, tokenizer)
            ids = front + ids + end
            supervised = np.concatenate(
                [np.zeros(len(front), bool), supervised, np.ones(len(end), bool)]
            )
        if train_on == "everything":
            supervised[:] = True
        supervised[:1] = False  # nothing comes before the first token to predict it from
        result.examples.append(Example(np.array(ids, dtype=np.int32), supervised))
    return encoded


def encode_prompt(
    prompt: str,
    tokenizer: TokenizerWrapper,
    *,
    chat: bool = True,
    earlier: Sequence[dict[str, str]] = (),
    form: PromptFormat | None = None,
) -> list[int]:
    """Return a prompt's token ids as a row of this ``form`` has them in training, but for the day.

    Without ``chat`` they are those of the text itself. A chat template puts ``earlier`` messages
    before the prompt.

    Raises: DataError where the template refuses them, or no token comes of them.
    """
    form, bos = form or PromptFormat(), _leading_bos(tokenizer)
    if not chat:
        text = prompt
    elif tokenizer.has_chat_template:
        messages = [*earlier, {"role": "user", "content": prompt}]
        text, bos = ChatTemplate(tokenizer).render(messages, ask=True, thinking=form.thinking), []
    else:
        text = form.write_raw(prompt)
    ids = fast_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids
    ids = ids if ids[:1] == bos else bos + ids
    if not ids:
        raise DataError("the prompt is empty: give at least a word")
    return ids


def encode_document(
    pieces: Iterable[str], tokenizer: TokenizerWrapper
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the token ids of a document and which are learned, piece by piece: BOS, its text, EOS; all but BOS.

    A piece is encoded behind the last character before it, so that no tokenizer takes its start for
    a text's start.
    """
    backend, before, ids = fast_tokenizer(tokenizer), "", []
    bos = _leading_bos(tokenizer)
    yield bos, [False] * len(bos)
    for piece in pieces:
        encoding = backend.encode(before + piece, add_special_tokens=False)
        ids = [
            token
            for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if end > len(before)
        ]
        if before and any(start < len(before) < end for start, end in encoding.offsets):
            ids = backend.encode(piece, add_special_tokens=False).ids
        yield ids, [True] * len(ids)
        before = piece[-1]
    eos = _closing_eos(ids, tokenizer)
    yield eos, [True] * len(eos)


def _asked_otherwise(
    row: WrittenRow,
    ids: Sequence[int],
    offsets: np.ndarray,
    supervised: np.ndarray,
    backend: Tokenizer,
) -> list[int] | None:
    """Return the ids of the first prompt on its own where they differ from those before the answer, else None.

    The last characters decide: what is further away is the same unless they differ.
    """
    start, first = row.spans[0][0], int(np.argmax(supervised))
    if first == 0:
        return None
    window = max(0, first - _WINDOW)
    tail = row.text[int(offsets[window, 0]) : start]
    if backend.encode(tail, add_special_tokens=False).ids == list(ids[window:first]):
        return None
    alone = backend.encode(row.text[:start], add_special_tokens=False).ids
    return None if alone == list(ids[:first]) else alone


def _supervised(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, bool]:
    """Return which tokens hold a character of any span, and whether one of them holds the character before it too.

    ``offsets`` are first and past-the-last, (length, 2).
    """
    starts, ends = offsets[:, 0].copy(), offsets[:, 1]
    # Some byte-level tokenizers trim a token's spaces from its offsets: a token starts where the
    # last one ended.
    starts[1:] = np.minimum(starts[1:], ends[:-1])
    supervised, straddled = np.zeros(len(offsets), bool), False
    for first, last in spans:
        supervised |= (ends > first) & (starts < last)
        straddled |= bool(((starts < first) & (ends > first)).any())
    return supervised, straddled


def _leading_bos(tokenizer: TokenizerWrapper) -> list[int]:
    """Return [BOS] if the tokenizer puts one in front of every text, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []


def _closing_eos(ids: list[int], tokenizer: TokenizerWrapper) -> list[int]:
    """Return [EOS] unless ``ids`` ends with a token that ends generation."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "this model's tokenizer names no end-of-sequence token, so no row could end"
        )
    return [] if ids and ids[-1] in tokenizer.eos_token_ids else [tokenizer.eos_token_id]
