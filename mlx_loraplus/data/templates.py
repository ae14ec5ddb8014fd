"""Records become token ids, and which of them are supervised.

Every row is turned into one string and encoded once; which characters are to be learned is known on the string, and a
token is supervised when it holds at least one of them. So a token that straddles the seam of prompt and completion
belongs to the completion, which is noted: asked with the prompt alone, the model meets another. What is learned by
``train_on`` "turns" ("last": the last turn; "everything": all tokens):

- text: all of it, and the end-of-sequence token.
- chat: every assistant turn with its end-of-turn token; not its role header, nor the template's text between turns.
  The template is the authority on special tokens, BOS included: nothing is added to what it renders.
- prompt and completion, in any form: a chat of one turn. On a tokenizer without a chat template the text is that of
  ``_RAW_FORMS``, or the bare two, between BOS and EOS; the completion and EOS are learned.

An assistant turn is what the template adds to the chat before it with its header, and that is verified: the rendering
must begin with what the model sees when it is asked for that turn. Some templates rewrite a turn once others follow,
such as Qwen 3's, which forgets earlier thoughts: such a turn becomes an example of its own, which ends with it.

A template that writes today's date, as Llama 3's, writes ``DAY`` in rows: else a run could not be resumed tomorrow.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer

from ..errors import DataError, ModelError
from .records import BadRowError, Kind, Record

TrainOn = Literal["turns", "last", "everything"]

DAY = datetime(2024, 7, 26)  # what Llama 3's template writes where it is not told the day  # noqa: DTZ001
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

# Templates are programs, run by transformers in jinja2's sandbox; they raise these.
_TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError,
)  # fmt: skip

_RAW_FORMS: dict[Kind, tuple[str, str]] = {  # without a chat template: what is asked, and what stands before the answer
    "alpaca": ("### Instruction:\n{prompt}\n\n### Response:\n", ""),
    "question": ("Question: {prompt}\nAnswer:", " "),
}

_STRADDLED = (
    "the end of the prompt and the start of the answer are one token, which the model won't meet when it is asked: let "
    "answers begin with a space or a line break, and prompts end without"
)


@dataclass(frozen=True)
class Example:
    """Tokens that are learned together: a row, or a part of one."""

    tokens: np.ndarray  # (length,) int32
    supervised: np.ndarray  # (length,) bool: the token is to be predicted from those before it; never at 0
    source: str = ""  # where it came from, "train.jsonl:17"


@dataclass
class Encoded:
    """What became of a record."""

    examples: list[Example] = field(default_factory=list)  # whole, however long; none if there is a problem
    problem: str | None = None
    notes: list[str] = field(default_factory=list)  # such as what the template leaves out


@dataclass(frozen=True)
class _Rendered:
    """A row as one string, the character spans to learn, and whether BOS and EOS are still to be added."""

    text: str
    spans: list[tuple[int, int]]
    add_special_tokens: bool = False


def encode(records: Sequence[Record], tokenizer: TokenizerWrapper, train_on: TrainOn = "turns") -> list[Encoded]:
    """Encode records, each into one example, or several where the chat template rewrites earlier turns.

    Raises: ModelError where the tokenizer has no fast version, or names no end-of-sequence token.
    """
    encoded, rendered = [Encoded() for _ in records], []
    for record, result in zip(records, encoded, strict=True):
        try:
            rendered += [(result, row) for row in _render(record, tokenizer, train_on, result.notes)]
        except BadRowError as problem:
            result.problem = str(problem)
    encodings = fast_tokenizer(tokenizer).encode_batch([row.text for _, row in rendered], add_special_tokens=False)
    bos = _leading_bos(tokenizer)
    for (result, row), encoding in zip(rendered, encodings, strict=True):
        ids = encoding.ids
        supervised, straddled = _supervised(np.array(encoding.offsets).reshape(-1, 2), row.spans)
        result.notes += [_STRADDLED] * straddled
        if row.add_special_tokens:
            front, end = bos if ids[:1] != bos else [], _closing_eos(ids, tokenizer)
            ids = front + ids + end
            supervised = np.concatenate([np.zeros(len(front), bool), supervised, np.ones(len(end), bool)])
        if train_on == "everything":
            supervised[:] = True
        supervised[:1] = False  # nothing comes before the first token to predict it from
        result.examples.append(Example(np.array(ids, dtype=np.int32), supervised))
    return encoded


def encode_prompt(
    prompt: str, tokenizer: TokenizerWrapper, *, chat: bool = True, earlier: Sequence[dict[str, str]] = ()
) -> list[int]:
    """Return a prompt's token ids as a completion row has them in training, but for the day; without ``chat``, raw.

    Where there is a chat template, ``earlier`` messages stand before it.

    Raises: DataError where the template refuses them, or no token comes of them.
    """
    text, bos = prompt, _leading_bos(tokenizer)
    if chat and tokenizer.has_chat_template:
        text, bos = _renderer(tokenizer, day=None)([*earlier, {"role": "user", "content": prompt}], True), []
    ids = fast_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids
    ids = ids if ids[:1] == bos else bos + ids
    if not ids:
        raise DataError("the prompt is empty: give at least a word")
    return ids


def encode_document(pieces: Iterable[str], tokenizer: TokenizerWrapper) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the token ids of a document and which are learned, piece by piece: BOS, its text, EOS; all but BOS.

    A piece is encoded behind the last character before it, so that no tokenizer takes its start for a text's start.
    """
    backend, before, ids = fast_tokenizer(tokenizer), "", []
    bos = _leading_bos(tokenizer)
    yield bos, [False] * len(bos)
    for piece in pieces:
        encoding = backend.encode(before + piece, add_special_tokens=False)
        ids = [token for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if end > len(before)]
        if before and any(start < len(before) < end for start, end in encoding.offsets):
            ids = backend.encode(piece, add_special_tokens=False).ids
        yield ids, [True] * len(ids)
        before = piece[-1]
    eos = _closing_eos(ids, tokenizer)
    yield eos, [True] * len(eos)


def fast_tokenizer(tokenizer: TokenizerWrapper) -> Tokenizer:
    """Return the fast tokenizer, which knows the characters of every token, set to neither cut nor pad."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError("this model's tokenizer has no fast version (tokenizer.json), which supervision needs")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _render(record: Record, tokenizer: TokenizerWrapper, train_on: TrainOn, notes: list[str]) -> list[_Rendered]:
    """Turn a record into the strings to encode and the spans of them to learn."""
    fields = record.fields
    if "text" in fields:
        return [_Rendered(fields["text"], [(0, len(fields["text"]))], add_special_tokens=True)]
    if not tokenizer.has_chat_template:
        return [_render_raw(record, notes)]
    messages = fields.get("messages")
    if messages is None:
        turns = {"system": fields.get("system"), "user": fields["prompt"], "assistant": fields["completion"]}
        messages = [{"role": role, "content": content} for role, content in turns.items() if content is not None]
    render, ends = _renderer(tokenizer, day=DAY, tools=fields.get("tools")), _ends(tokenizer)
    if train_on == "everything":
        rows = [_Rendered(render(messages, False), [])]
    else:
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [turn for turn in turns if turn not in record.untrained]
        if not turns:
            raise BadRowError("no assistant turn that may be learned: all say that they are not to be")
        messages = messages[: turns[-1] + 1]  # nothing is learned from what follows
        rows = _render_turns(messages, turns[-1:] if train_on == "last" else turns, render, ends)
    notes += _notes(messages, fields.get("tools", ()), rows[0].text, ends)
    return rows


def _render_raw(record: Record, notes: list[str]) -> _Rendered:
    """Turn a prompt and its completion into text, for a model without a chat template."""
    fields = record.fields
    if "messages" in fields:
        raise BadRowError(
            "chat rows need a chat template and this model's tokenizer has none; "
            "take an instruction-tuned model (such as gemma-3-270m-it), or write the rows as prompt and completion"
        )
    form, lead = _RAW_FORMS.get(record.kind, ("{prompt}", ""))
    if record.kind in _RAW_FORMS:
        notes.append(f"no chat template, so {record.kind} rows are written as {form + lead + '...'!r}")
    prompt = (f"{fields['system']}\n\n" if "system" in fields else "") + form.replace("{prompt}", fields["prompt"])
    text = prompt + lead + fields["completion"]
    return _Rendered(text, [(len(prompt), len(text))], add_special_tokens=True)


Renderer = Callable[[Sequence[Any], bool], str]


def _renderer(tokenizer: TokenizerWrapper, *, day: datetime | None, tools: list[Any] | None = None) -> Renderer:
    """Return (messages, add_generation_prompt) -> text by the chat template, written today or on ``day``."""
    options: dict[str, Any] = {"tools": tools} if tools else {}
    if day is not None:
        options |= dated(tokenizer, day.strftime)

    def render(messages: Sequence[Any], add_generation_prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except _TEMPLATE_ERRORS as error:
            raise BadRowError(f"the chat template refuses it ({' '.join(str(error).split())})") from error

    return render


def dated(tokenizer: TokenizerWrapper, write: Callable[[str], str]) -> dict[str, str]:
    """Return what makes ``apply_chat_template`` write(format) where its template asks for today's date."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" not in template:
        return {}
    return {"chat_template": _NOW.sub(lambda call: repr(write(call[2])), template)}


def _render_turns(
    messages: Sequence[Any], turns: Sequence[int], render: Renderer, ends: Sequence[str]
) -> list[_Rendered]:
    """Return the whole chat with every turn that stands in it as the model would write it; and the same for the others.

    A turn's span goes from behind its header to the end of the first of ``ends``, the tokens that end generation: what
    a template puts behind that is not the model's to write.
    """
    rows: list[_Rendered] = []
    left = list(turns)
    while left:
        last = left[-1]
        text, spans, missed = render(messages[: last + 1], False), [], []
        for turn in left:
            before, after = render(messages[:turn], True), text if turn == last else render(messages[: turn + 1], False)
            found = [place + len(end) for end in ends if (place := after.find(end, len(before))) >= 0]
            stop = min(found, default=len(after.rstrip()))
            if after.startswith(before) and text.startswith(after[:stop]):
                spans.append((len(before), stop))
            else:
                missed.append(turn)
        if last in missed:
            raise BadRowError(
                f"this chat template can't be supervised by turn (the text before messages[{last}] is not what the "
                "model sees when asked for it); use --train-on everything"
            )
        rows.append(_Rendered(text, spans))
        left = missed
    return rows


def _ends(tokenizer: TokenizerWrapper) -> list[str]:
    """Return the tokens that end generation, as text."""
    return [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids)) if token]


def _notes(messages: Sequence[Any], tools: Sequence[Any], text: str, ends: Sequence[str]) -> list[str]:
    """Return notes on what a template leaves out, but for earlier thoughts, and on ends of turns inside a text."""
    lost, inside = set(), set()
    for message in messages:
        content = (message.get("content") or "").strip()
        if content not in text and "</think>" not in content:
            lost.add(f"{message['role']} messages")
        inside |= {end for end in ends if end in content}
        lost |= {"tool calls" for name in _function_names(message.get("tool_calls") or ()) if name not in text}
    lost |= {"tools" for name in _function_names(tools) if name not in text}
    notes = [f"the chat template leaves out or rewrites {what}" for what in sorted(lost)]
    return notes + [f"{end} stands inside a message, and ends it there" for end in sorted(inside)]


def _function_names(calls: Sequence[Any]) -> list[str]:
    """Return the names in tools or in calls of them, whichever of both forms they have."""
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [str(function.get("name", "")) for function in functions if isinstance(function, dict)]


def _supervised(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, bool]:
    """Return which tokens hold a character of any span, and whether one of them holds the character before it too.

    ``offsets`` are first and past-the-last, (length, 2).
    """
    starts, ends = offsets[:, 0].copy(), offsets[:, 1]
    # Some byte-level tokenizers trim a token's spaces from its offsets: a token starts where the last one ended.
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
        raise ModelError("this model's tokenizer names no end-of-sequence token, so no row could end")
    return [] if ids and ids[-1] in tokenizer.eos_token_ids else [tokenizer.eos_token_id]
