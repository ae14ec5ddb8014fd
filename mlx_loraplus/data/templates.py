"""Records become token ids, and which of them are supervised.

Every row is turned into one string and encoded once; which characters are to be learned is known on the string, and a
token is supervised when it holds at least one of them. So a token that straddles the seam of prompt and completion
belongs to the completion. What is learned with ``mask_prompt`` (without it: every token but the first):

- text: all of it, and the end-of-sequence token.
- prompt and completion, no chat template: BOS + prompt + completion + EOS; the completion and EOS.
- prompt and completion on a tokenizer with a chat template: a chat of one turn, as mlx-lm does.
- chat: every assistant turn with its end-of-turn token; not its role header, nor the template's text between turns.
  The template is the authority on special tokens, BOS included: nothing is added to what it renders.

Assistant turns are found by rendering prefixes of the chat, and a prefix must be what the whole rendering starts with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Encoding, Tokenizer

from ..errors import DataError, ModelError, join_problems
from .records import Record


@dataclass(frozen=True)
class Example:
    """One row as tokens.

    Attributes:
        tokens: (length,) int32.
        supervised: (length,) bool; True where the token is to be predicted from those before it, never at 0.
        source: the record's place, "train.jsonl:17".
        truncated: tokens cut from the end.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    source: str
    truncated: int


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows; ``rows``, ``tokens`` and ``supervised_tokens`` count what is left."""

    rows: int
    tokens: int
    supervised_tokens: int
    truncated_rows: int
    cut_tokens: int
    dropped_rows: int
    max_seq_length: int

    def __str__(self) -> str:
        """Return the counts in one line."""
        line = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.supervised_tokens:,} supervised"
        if self.truncated_rows:
            line += f"; {self.truncated_rows:,} rows cut at {self.max_seq_length:,} tokens ({self.cut_tokens:,} lost)"
        if self.dropped_rows:
            line += (
                f"; {self.dropped_rows:,} rows dropped (nothing to learn in their first {self.max_seq_length:,} tokens)"
            )
        return line


@dataclass(frozen=True)
class _Rendered:
    """A row as one string, the character spans to learn, and whether BOS and EOS are still to be added."""

    text: str
    spans: list[tuple[int, int]]
    add_special_tokens: bool


class _BadRowError(DataError):
    """Why one row can't be encoded, without its place."""


def encode(record: Record, tokenizer: TokenizerWrapper, *, mask_prompt: bool, max_seq_length: int) -> Example:
    """Encode one record.

    Args:
        record: the row.
        tokenizer: mlx-lm's wrapper around a fast tokenizer.
        mask_prompt: supervise completions and assistant turns only.
        max_seq_length: longest row, in tokens; a longer one is cut at its end, which may leave nothing supervised.

    Raises:
        DataError: the chat template is missing, refuses the row, or can't be supervised by turn.
    """
    return _encode([record], tokenizer, mask_prompt, max_seq_length)[0]


def encode_all(
    records: Sequence[Record], tokenizer: TokenizerWrapper, *, mask_prompt: bool, max_seq_length: int
) -> tuple[list[Example], EncodeReport]:
    """Encode records, and drop and count those whose supervised part is cut to nothing.

    Args:
        records: the rows.
        tokenizer: mlx-lm's wrapper around a fast tokenizer.
        mask_prompt: supervise completions and assistant turns only.
        max_seq_length: longest row, in tokens; longer ones are cut at their end.

    Raises:
        DataError: as ``encode``, all rows in one message; or no row is left.
    """
    encoded = _encode(records, tokenizer, mask_prompt, max_seq_length)
    examples = [example for example in encoded if example.supervised.any()]
    if not examples:
        raise DataError(
            f"no row is left of {len(encoded):,}: nothing to learn in their first {max_seq_length:,} tokens; "
            "raise --max-seq-length"
        )
    report = EncodeReport(
        rows=len(examples),
        tokens=sum(len(example.tokens) for example in examples),
        supervised_tokens=sum(int(example.supervised.sum()) for example in examples),
        truncated_rows=sum(example.truncated > 0 for example in examples),
        cut_tokens=sum(example.truncated for example in examples),
        dropped_rows=len(encoded) - len(examples),
        max_seq_length=max_seq_length,
    )
    return examples, report


def encode_prompt(prompt: str, tokenizer: TokenizerWrapper, *, chat: bool = True) -> list[int]:
    """Return a prompt's token ids as a completion row has them in training; without ``chat``, as raw text.

    Raises:
        DataError: the chat template refuses the prompt.
    """
    if chat and tokenizer.has_chat_template:
        text = _renderer(tokenizer, None)([{"role": "user", "content": prompt}], True)
        return _backend(tokenizer).encode(text, add_special_tokens=False).ids
    ids = _backend(tokenizer).encode(prompt, add_special_tokens=False).ids
    return _leading_bos(ids, tokenizer) + ids


def _encode(
    records: Sequence[Record], tokenizer: TokenizerWrapper, mask_prompt: bool, max_seq_length: int
) -> list[Example]:
    if not tokenizer.has_chat_template and any(record.kind == "chat" for record in records):
        raise DataError(
            "chat rows need a chat template and this model's tokenizer has none; "
            "take an instruction-tuned model (such as gemma-3-270m-it), or write the rows as prompt and completion"
        )
    rendered: list[_Rendered] = []
    problems: dict[str, list[str]] = {}  # one template's refusal may hit every row: say it once
    for record in records:
        try:
            rendered.append(_render(record, tokenizer, mask_prompt))
        except _BadRowError as problem:
            problems.setdefault(str(problem), []).append(record.source)
    if problems:
        raise DataError(join_problems([f"{_places(sources)}: {problem}" for problem, sources in problems.items()]))
    encodings = _backend(tokenizer).encode_batch([row.text for row in rendered], add_special_tokens=False)
    return [
        _example(record.source, row, encoding, tokenizer, mask_prompt, max_seq_length)
        for record, row, encoding in zip(records, rendered, encodings, strict=True)
    ]


def _places(sources: Sequence[str], most: int = 5) -> str:
    rest = len(sources) - most
    return ", ".join(sources[:most]) + (f" and {rest:,} more rows" if rest > 0 else "")


def _backend(tokenizer: TokenizerWrapper) -> Tokenizer:
    """Return the fast tokenizer, which knows the characters of every token, set to neither cut nor pad."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError("this model's tokenizer has no fast version (tokenizer.json), which supervision needs")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _render(record: Record, tokenizer: TokenizerWrapper, mask_prompt: bool) -> _Rendered:
    """Turn a record into the string to encode and the spans of it to learn."""
    fields = record.fields
    if record.kind == "text":
        return _Rendered(fields["text"], [(0, len(fields["text"]))], add_special_tokens=True)
    if record.kind == "completion" and not tokenizer.has_chat_template:
        text = fields["prompt"] + fields["completion"]
        return _Rendered(text, [(len(fields["prompt"]), len(text))], add_special_tokens=True)
    if record.kind == "completion":
        turns = (("user", fields["prompt"]), ("assistant", fields["completion"]))
        messages = [{"role": role, "content": content} for role, content in turns]
    else:
        messages = fields["messages"]
    render = _renderer(tokenizer, fields.get("tools"))
    text = render(messages, False)
    spans = _assistant_spans(messages, text, render) if mask_prompt else []
    return _Rendered(text, spans, add_special_tokens=False)


Renderer = Callable[[Sequence[Any], bool], str]


def _renderer(tokenizer: TokenizerWrapper, tools: list[Any] | None) -> Renderer:
    """Return (messages, add_generation_prompt) -> text by the tokenizer's chat template."""
    options = {"tools": tools} if tools else {}

    def render(messages: Sequence[Any], add_generation_prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        # templates are programs, run by transformers in jinja2's sandbox; they raise these
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise _BadRowError(f"the chat template refuses it ({error})") from error

    return render


def _assistant_spans(messages: Sequence[Any], text: str, render: Renderer) -> list[tuple[int, int]]:
    """Return the characters of every assistant turn, from behind its header to the end of its end-of-turn token.

    The whitespace that a template puts behind the end-of-turn token is not the model's to write.
    """
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(messages[:turn], True), render(messages[: turn + 1], False)
        if not (text.startswith(after) and after.startswith(before)):
            raise _BadRowError(
                f"this chat template can't be supervised by turn (the text up to messages[{turn}] changes with "
                "what follows it); use --no-mask-prompt"
            )
        spans.append((len(before), len(after.rstrip())))
    return spans


def _example(
    source: str,
    row: _Rendered,
    encoding: Encoding,
    tokenizer: TokenizerWrapper,
    mask_prompt: bool,
    max_seq_length: int,
) -> Example:
    ids = encoding.ids
    supervised = _supervised(np.array(encoding.offsets).reshape(-1, 2), row.spans)  # (len(ids),)
    if row.add_special_tokens:
        bos, eos = _leading_bos(ids, tokenizer), _closing_eos(ids, tokenizer)
        ids = bos + ids + eos
        supervised = np.concatenate([np.zeros(len(bos), bool), supervised, np.ones(len(eos), bool)])
    if not mask_prompt:
        supervised[:] = True
    supervised[:1] = False  # nothing comes before the first token to predict it from
    return Example(
        tokens=np.array(ids[:max_seq_length], dtype=np.int32),
        supervised=supervised[:max_seq_length],
        source=source,
        truncated=max(0, len(ids) - max_seq_length),
    )


def _supervised(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return which tokens hold a character of any span.

    Args:
        offsets: (length, 2) first and past-the-last character of every token.
        spans: the same of every span.
    """
    starts, ends = offsets[:, 0].copy(), offsets[:, 1]
    # Some byte-level tokenizers trim a token's spaces from its offsets: a token starts where the last one ended.
    starts[1:] = np.minimum(starts[1:], ends[:-1])
    supervised = np.zeros(len(offsets), bool)
    for first, last in spans:
        supervised |= (ends > first) & (starts < last)
    return supervised


def _leading_bos(ids: list[int], tokenizer: TokenizerWrapper) -> list[int]:
    """Return [BOS] if the tokenizer puts one in front of every text and ``ids`` has none yet, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] != [bos] and tokenizer.encode("")[:1] == [bos] else []


def _closing_eos(ids: list[int], tokenizer: TokenizerWrapper) -> list[int]:
    """Return [EOS] unless ``ids`` ends with a token that ends generation."""
    if tokenizer.eos_token_id is None:
        raise ModelError("this model's tokenizer names no end-of-sequence token, so no row could end")
    return [] if ids and ids[-1] in tokenizer.eos_token_ids else [tokenizer.eos_token_id]
