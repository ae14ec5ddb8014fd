"""What a model can hold: which token ids, how many positions, and how many tokens it was made for.

MLX does not check indices: a token id beyond the embedding, or a position beyond a learned table,
reads other memory and gives plausible numbers. So examples and prompts are compared with the tables
before a model sees them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.tables import POSITION_TABLES, TOKEN_TABLES, table_rows
from ..errors import DataError
from .batches import round_up
from .dataset import Examples
from .sources import SplitName

_CONTEXT = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length", "max_sequence_length",
    "seq_length",
)  # fmt: skip
Log = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """The sizes of a model's tables; None where it has no such table, or none that is known."""

    embedding: int | None = None  # rows: token ids that it can read
    logits: int | None = None  # token ids that it can predict
    positions: int | None = None  # rows of a learned table
    context: int | None = None  # tokens that it was made for; longer rows work, mostly worse

    @property
    def longest(self) -> int | None:
        """The longest example to choose: within the context, and padded within the table of positions."""
        known = [
            size for size in (self.context, self.positions and _round_down(self.positions)) if size
        ]
        return min(known, default=None)


def limits_of(model: nn.Module, *, skeleton: bool = False) -> Limits:
    """Return a model's limits; of a ``skeleton`` nothing is computed, so its head is taken to be its embedding's."""
    embedding, positions = table_rows(model, TOKEN_TABLES), table_rows(model, POSITION_TABLES)
    logits = embedding if skeleton else _count_logits(model)
    return Limits(embedding, logits, positions, context_of(model))


def context_of(model: nn.Module) -> int | None:
    """Return how many tokens a model was made for, stretched by its rope scaling, or None if it does not say."""
    outer: Any = getattr(model, "language_model", model)
    args = getattr(outer, "args", None) or getattr(model, "args", None)
    text = getattr(args, "text_config", None) or {}
    sources = [
        vars(args) if hasattr(args, "__dict__") else {},
        text if isinstance(text, Mapping) else vars(text),
    ]
    for values in sources:
        sizes = (values.get(name) for name in _CONTEXT)
        size = next((size for size in sizes if isinstance(size, int) and size > 0), None)
        if size is not None:
            return _stretched(size, values.get("rope_scaling") or values.get("rope_parameters"))
    return None


def check_examples(
    limits: Limits,
    examples: Mapping[SplitName, Examples],
    tokenizer: TokenizerWrapper,
    log: Log = lambda _: None,
) -> None:
    """Refuse examples that the model can't hold, and tell how many are longer than its context.

    Raises:
        DataError: A token id beyond the embedding or the head, or an example beyond a learned table
            of positions.
    """
    for split, some in examples.items():
        _check_ids(limits, some, tokenizer)
        _check_lengths(limits, split, some, log)


def check_prompt(
    limits: Limits,
    tokens: Sequence[int],
    max_tokens: int,
    tokenizer: TokenizerWrapper,
    log: Log = lambda _: None,
) -> int:
    """Refuse a prompt that the model can't hold; return how many tokens it may generate, ``max_tokens`` at most.

    Raises:
        DataError: A token id beyond the embedding, or no position left for an answer.
    """
    beyond = next(
        (token for token in tokens if limits.embedding and token >= limits.embedding), None
    )
    if beyond is not None:
        raise DataError(
            _refusal("the prompt", beyond, tokenizer, "embedding", limits.embedding or 0)
        )
    if limits.positions and len(tokens) >= limits.positions:
        raise DataError(
            f"the prompt has {len(tokens):,} tokens, and this model has {limits.positions:,}"
            " learned positions for prompt and answer together: shorten the prompt"
        )
    room = (
        max_tokens if limits.positions is None else min(max_tokens, limits.positions - len(tokens))
    )
    if room < max_tokens:
        log(
            f"the answer ends after {room:,} tokens at most: this model has {limits.positions:,}"
            " learned positions"
        )
    if limits.context and len(tokens) > limits.context:
        log(
            f"warning: the prompt has {len(tokens):,} tokens, and this model was made for"
            f" {limits.context:,}"
        )
    return room


def _check_ids(limits: Limits, examples: Examples, tokenizer: TokenizerWrapper) -> None:
    """Raise DataError where the model sees an id beyond its embedding, or has to predict one beyond its head."""
    sizes = {"embedding": limits.embedding, "head": limits.logits}
    for number, shard in enumerate(examples.shards):
        for what, rows in sizes.items():
            if rows is None or shard.largest < rows:
                continue
            # the table's largest id may be where a row was cut: only what an example holds counts
            beyond = np.flatnonzero(shard.tokens >= rows)
            if what == "head":
                beyond = beyond[shard.supervised[beyond]]
            here = np.flatnonzero(examples.spans["shard"] == number)
            starts, stops = examples.spans["start"][here], examples.spans["stop"][here]
            first = np.searchsorted(beyond, starts)
            hit = here[np.searchsorted(beyond, stops) > first]
            if len(hit):
                index = hit[np.argmin(examples.spans["start"][hit])]
                at = beyond[np.searchsorted(beyond, examples.spans["start"][index])]
                where = (
                    f"{len(hit):,} examples hold such tokens, {examples.place(int(index))} first"
                )
                raise DataError(
                    f"{_refusal(examples.place(int(index)), int(shard.tokens[at]), tokenizer, what, rows)}"
                    f" ({where})"
                    if len(hit) > 1
                    else _refusal(
                        examples.place(int(index)), int(shard.tokens[at]), tokenizer, what, rows
                    )
                )


def _refusal(place: str, token: int, tokenizer: TokenizerWrapper, what: str, rows: int) -> str:
    text = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else "no token"  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return (
        f"{place}: token {token} ({text!r:.60}) is beyond the model's {what} of {rows:,} rows (ids"
        f" 0 to {rows - 1:,}): this tokenizer is not the model's, or tokens were added to it and"
        " not to the model; use the tokenizer that the model was made with, or give the model rows"
        " for the added tokens"
    )


def _check_lengths(limits: Limits, split: str, examples: Examples, log: Log) -> None:
    """Raise DataError for examples beyond a table of positions, padding included; tell of those beyond the context."""
    if not len(examples):
        return
    longest = int(examples.lengths.max())
    if limits.positions and round_up(longest) > limits.positions:
        most = _round_down(limits.positions)
        count = int((examples.lengths > most).sum())
        raise DataError(
            f"{count:,} of {len(examples):,} {split} examples have more than {most:,} tokens (the"
            f" longest {longest:,}), and this model has {limits.positions:,} learned positions,"
            f" padding included: give --max-seq-length {most}"
        )
    over = int((examples.lengths > limits.context).sum()) if limits.context else 0
    if over:
        log(
            f"warning: {over:,} of {len(examples):,} {split} examples are longer than the"
            f" {limits.context:,} tokens that this model was made for (the longest {longest:,}):"
            f" give --max-seq-length {limits.context}"
        )


def _count_logits(model: nn.Module) -> int | None:
    """Return how many logits a model gives for a token, by its graph alone, or None where it can't be called so."""
    training = model.training
    model.eval()
    try:
        return model(mx.array([[0]])).shape[-1]
    except Exception:  # whatever a model raises that wants more than tokens  # noqa: BLE001
        return None
    finally:
        model.train(training)


def _stretched(size: int, scaling: Any) -> int:
    """Return a context with what rope scaling adds, as far as the config tells: only warnings follow from it."""
    if not isinstance(scaling, Mapping):
        return size
    factor = scaling.get("factor")
    if not isinstance(factor, int | float) or factor <= 1:
        return size
    original = scaling.get("original_max_position_embeddings")
    return max(size, int(factor * (original if isinstance(original, int) else size)))


def _round_down(count: int) -> int:
    """Return the longest length, padding included, that ``count`` positions hold."""
    return next((length for length in range(count, 0, -1) if round_up(length) <= count), 1)
