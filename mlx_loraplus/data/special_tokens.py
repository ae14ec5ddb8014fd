"""A tokenizer's fast version, and its special tokens: BOS, EOS, unknown, end of turn, control."""

import re
from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer

from ..errors import ModelError


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


def leading_bos(tokenizer: TokenizerWrapper) -> list[int]:
    """Return [BOS] if the tokenizer puts BOS before every text, else []."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer.encode("")[:1] == [bos]:
        return [bos]
    return []


def closing_eos(ids: Sequence[int], tokenizer: TokenizerWrapper) -> list[int]:
    """Return [EOS], or [] if ``ids`` already end with a token that ends generation."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "this model's tokenizer has no end-of-sequence token, so the model could not learn"
            " where to stop; use a model that has one"
        )
    if ids and ids[-1] in tokenizer.eos_token_ids:
        return []
    return [tokenizer.eos_token_id]


def has_unknown(ids: Sequence[int], text: str, tokenizer: TokenizerWrapper) -> bool:
    """Return whether a text has characters that became the token for unknown text."""
    unknown = tokenizer.unk_token_id

    # Tokenizers that have a token for every byte often use the end token's id here.
    if unknown is None or unknown in (tokenizer.bos_token_id, *tokenizer.eos_token_ids):
        return False
    return unknown in ids and str(tokenizer.unk_token) not in text


def end_tokens(tokenizer: TokenizerWrapper) -> list[str]:
    """Return the tokens that end generation, as text."""
    tokens = tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
    return [str(token) for token in tokens if token]


def control_token_pattern(tokenizer: TokenizerWrapper) -> re.Pattern[str] | None:
    """Return a pattern that matches the tokenizer's special tokens, or None if it has none."""
    added = fast_tokenizer(tokenizer).get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    names = [name for name in special.union(end_tokens(tokenizer)) if name.strip()]
    if not names:
        return None

    # Longer tokens come first, because one token may be a prefix of another.
    names.sort(key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in names))
