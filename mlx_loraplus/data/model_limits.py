"""Find the limits of a model, and check examples and prompts against them.

A model limits the token ids, the positions, and the number of tokens in its context. MLX does not
check indices. A token id beyond the embedding, or a position beyond a learned table, reads
unrelated memory and gives plausible numbers. Examples and prompts are therefore checked before they
are passed to a model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.token_tables import POSITION_TABLES, TOKEN_TABLES, table_rows
from ..errors import DataError, counted
from .batches import round_up
from .dataset import Examples
from .sources import SplitName

_CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
)
"""The names of the context length in model configs."""

_VOCABULARY_TOLERANCE = 1.01
"""A vocabulary may be larger than the embedding by this factor, because some models leave out the
last few tokens, such as placeholders for images."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """The sizes of a model's tables; None if the model has no such table or its size is unknown."""

    embedding: int | None = None  # rows, one for each token id that the model can read
    logits: int | None = None  # token ids that the model can predict
    positions: int | None = None  # rows of a learned table of positions
    context: int | None = None  # tokens of the context; longer rows usually give worse results
    window: int | None = None  # a sliding window that mlx-lm does not apply to this model

    @property
    def longest(self) -> int | None:
        """The longest example that fits the context and, with padding, the positions."""
        known: list[int] = []
        if self.context:
            known.append(self.context)
        if self.positions:
            known.append(_round_down(self.positions))
        return min(known, default=None)


def limits_of(model: nn.Module, *, skeleton: bool = False) -> Limits:
    """Return a model's limits.

    Args:
        model: The model, with adapters or without.
        skeleton: Whether the model has no weights. In this case nothing is computed, and the head
            is assumed to be as large as the embedding.
    """
    embedding = table_rows(model, TOKEN_TABLES)
    positions = table_rows(model, POSITION_TABLES)
    logits = embedding if skeleton else _count_logits(model)
    window = getattr(model, "ignored_window", None)
    return Limits(embedding, logits, positions, context_of(model), window)


def context_of(model: nn.Module) -> int | None:
    """Return a model's context length, extended by its rope scaling, or None if it is unknown."""
    # A vision model stores the sizes in its language model or under text_config.
    language_model: Any = getattr(model, "language_model", model)
    args = getattr(language_model, "args", None) or getattr(model, "args", None)
    text_config = getattr(args, "text_config", None) or {}

    for config in (args, text_config):
        values = _as_mapping(config)
        scaling = values.get("rope_scaling") or values.get("rope_parameters")
        for name in _CONTEXT_NAMES:
            size = values.get(name)
            if isinstance(size, int) and size > 0:
                return _extend_context(size, scaling)
    return None


def _as_mapping(config: Any) -> Mapping[str, Any]:
    """Return the values of a config, which is a mapping, an object or None."""
    if isinstance(config, Mapping):
        return config
    return vars(config) if hasattr(config, "__dict__") else {}


def _extend_context(size: int, scaling: Any) -> int:
    """Return a context length extended by the rope scaling in the config; only for warnings.

    Args:
        size: The context in the config.
        scaling: The config's ``rope_scaling``, of any form.
    """
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    if not isinstance(factor, int | float) or factor <= 1:
        return size
    original = scaling.get("original_max_position_embeddings")
    if not isinstance(original, int):
        original = size
    return max(size, int(factor * original))


def _count_logits(model: nn.Module) -> int | None:
    """Return the number of logits per token, or None if the model needs more inputs than tokens.

    Only the graph is built; nothing is computed.
    """
    training = model.training
    model.eval()
    try:
        return model(mx.array([[0]])).shape[-1]
    except Exception:  # noqa: BLE001 (a model may raise anything if it needs more inputs)
        return None
    finally:
        model.train(training)


# --- checks ---------------------------------------------------------------------------------------


def check_examples(
    limits: Limits,
    examples: Mapping[SplitName, Examples],
    tokenizer: TokenizerWrapper,
    log: Log = lambda _: None,
) -> None:
    """Check all examples against a model's limits, and warn of examples beyond its context.

    Args:
        limits: The model's limits.
        examples: The examples of each split.
        tokenizer: The tokenizer that the examples were made with.
        log: Receives the warnings.

    Raises:
        DataError: A token id is beyond the embedding or the head, an example is longer than a
            learned table of positions, or the tokenizer belongs to another model.
    """
    for split, split_examples in examples.items():
        _check_ids(limits, split_examples, tokenizer)
        _check_lengths(limits, split, split_examples, log)
    _check_tokenizer(limits, tokenizer)


def check_prompt(
    limits: Limits,
    tokens: Sequence[int],
    max_tokens: int,
    tokenizer: TokenizerWrapper,
    log: Log = lambda _: None,
) -> int:
    """Check a prompt against a model's limits, and return how many tokens can be generated.

    Args:
        limits: The model's limits.
        tokens: The token ids of the prompt.
        max_tokens: Number of tokens that the caller asks for.
        tokenizer: The tokenizer that the prompt was encoded with.
        log: Receives the warnings.

    Raises:
        DataError: A token id is beyond the embedding, no position is left for an answer, or the
            tokenizer belongs to another model.
    """
    # The model must be able to read every token.
    if limits.embedding:
        for token in tokens:
            if token >= limits.embedding:
                problem = _describe_unknown_token(token, tokenizer, "embedding", limits.embedding)
                raise DataError(f"the prompt: {problem}")
    _check_tokenizer(limits, tokenizer)

    # The prompt and the answer share the positions.
    room = max_tokens
    if limits.positions:
        left = limits.positions - len(tokens)
        if left <= 0:
            raise DataError(
                f"the prompt has {len(tokens):,} tokens, and this model has {limits.positions:,}"
                " learned positions for prompt and answer together; shorten the prompt"
            )
        room = min(max_tokens, left)
    if room < max_tokens:
        log(
            f"the answer is limited to {room:,} tokens, because this model has"
            f" {limits.positions:,} learned positions"
        )

    # A prompt beyond the context is possible, but usually gives worse answers.
    if limits.context and len(tokens) > limits.context:
        log(
            f"warning: the prompt has {len(tokens):,} tokens, which is more than this model's"
            f" context of {limits.context:,} tokens"
        )
    return room


def _check_tokenizer(limits: Limits, tokenizer: TokenizerWrapper) -> None:
    """Refuse a tokenizer with a vocabulary that is much larger than the model's embedding.

    Otherwise, such a tokenizer would not be noticed if the tokens that occur all have a row. Tokens
    that were added to the vocabulary are not counted; they are refused where they are used.
    """
    own = getattr(tokenizer, "vocab_size", 0)
    if limits.embedding and own > _VOCABULARY_TOLERANCE * limits.embedding:
        raise DataError(
            f"the tokenizer has a vocabulary of {own:,} tokens, and the model's embedding has"
            f" {counted(limits.embedding, 'row')}, so this tokenizer belongs to another model; use"
            " the model's own tokenizer"
        )


def _check_ids(limits: Limits, examples: Examples, tokenizer: TokenizerWrapper) -> None:
    """Check that examples hold no token id that the model can't read or predict."""
    sizes = {"embedding": limits.embedding, "head": limits.logits}
    for number, table in enumerate(examples.tables):
        for layer, rows in sizes.items():
            if rows is None or table.largest < rows:
                continue

            # The model does not have to predict tokens that are not supervised.
            places = np.flatnonzero(table.tokens >= rows)
            if layer == "head":
                places = places[table.supervised[places]]

            # A token may be in the part of a row that was cut off.
            holders = _examples_with(examples, number, places)
            if not len(holders):
                continue

            # Report the example that comes first in the file.
            starts = examples.spans["start"][holders]
            first = int(holders[np.argmin(starts)])
            place = places[np.searchsorted(places, starts.min())]
            problem = _describe_unknown_token(int(table.tokens[place]), tokenizer, layer, rows)
            message = f"{examples.place(first)}: {problem}"
            if len(holders) > 1:
                count = f"{len(holders):,} examples hold such tokens"
                message = f"{message} ({count}, {examples.place(first)} first)"
            raise DataError(message)


def _examples_with(examples: Examples, table_number: int, places: np.ndarray) -> np.ndarray:
    """Return the indices of the examples that contain any of these tokens of a table.

    Args:
        examples: The examples.
        table_number: The index of the table.
        places: Sorted indices into the table's tokens.
    """
    indices = np.flatnonzero(examples.spans["table"] == table_number)
    before_start = np.searchsorted(places, examples.spans["start"][indices])
    before_stop = np.searchsorted(places, examples.spans["stop"][indices])
    return indices[before_stop > before_start]


def _describe_unknown_token(token: int, tokenizer: TokenizerWrapper, table: str, rows: int) -> str:
    """Describe a token id that is beyond a model's table, and say what to do."""
    text: Any = "no token"
    if token < len(tokenizer):  # pyright: ignore[reportArgumentType]
        text = tokenizer.convert_ids_to_tokens(token)  # pyright: ignore[reportAttributeAccessIssue]
    return (
        f"token {token} ({text!r:.60}) is beyond the model's {table} of {counted(rows, 'row')} (ids"
        f" 0 to {rows - 1:,}), so this tokenizer belongs to another model, or tokens were added to"
        " it and not to the model; use the model's own tokenizer, or add rows for the new tokens to"
        " the model"
    )


def _check_lengths(limits: Limits, split: str, examples: Examples, log: Log) -> None:
    """Check that padded examples fit the positions, and warn of examples beyond the context."""
    if not len(examples):
        return
    longest = int(examples.lengths.max())

    # Padding tokens use positions too.
    if limits.positions and round_up(longest) > limits.positions:
        most = _round_down(limits.positions)
        count = int((examples.lengths > most).sum())
        raise DataError(
            f"{count:,} of {counted(len(examples), f'{split} example')}"
            f" {'has' if count == 1 else 'have'} more than {most:,} tokens (the"
            f" longest has {longest:,}), and this model has {limits.positions:,} learned positions,"
            f" which padding uses too; use --max-seq-length {most}"
        )

    _warn_beyond(limits.context, "this model's context of {} tokens", split, examples, log)
    window = (
        "the sliding window of {} tokens that this model was made with and mlx-lm does not apply:"
        " their tokens attend further back than in other programs"
    )
    _warn_beyond(limits.window, window, split, examples, log)


def _warn_beyond(limit: int | None, what: str, split: str, examples: Examples, log: Log) -> None:
    """Warn of examples that are longer than a limit, which replaces {} in ``what``."""
    longest = int(examples.lengths.max())
    if limit is None or longest <= limit:
        return

    count = int((examples.lengths > limit).sum())
    log(
        f"warning: {count:,} of {counted(len(examples), f'{split} example')}"
        f" {'is' if count == 1 else 'are'} longer than"
        f" {what.format(f'{limit:,}')} (the longest has {longest:,}); use --max-seq-length {limit}"
    )


def _round_down(count: int) -> int:
    """Return the maximum length that fits ``count`` positions after padding."""
    for length in range(count, 0, -1):
        if round_up(length) <= count:
            return length
    return 1
