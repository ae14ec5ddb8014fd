"""Identify a tokenizer's vocabulary, so that an adapter is not used with another one."""

import hashlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

# Copies of a model may differ in tokens such as <pad>, [UNK] and <unused3>
_OPENING, _CLOSING = "<[", ">]"


def vocabulary_digest(tokenizer: TokenizerWrapper) -> str | None:
    """Return a digest of the ids of a tokenizer's ordinary tokens.

    Tokens that were added to the vocabulary, and those in brackets, do not count.

    Returns:
        The digest, or None if the tokenizer has no fast version.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    ordinary = [
        f"{number} {token}"
        for token, number in backend.get_vocab().items()
        if token not in added and not (token[:1] in _OPENING and token[-1:] in _CLOSING)
    ]
    return hashlib.sha256("\n".join(sorted(ordinary)).encode()).hexdigest()


def set_vocabulary(model: nn.Module, tokenizer: TokenizerWrapper) -> None:
    """Let a model know its tokenizer, whose vocabulary is stored and checked with adapters."""
    model.vocabulary_digest = cache(partial(vocabulary_digest, tokenizer))


def known_vocabulary(model: nn.Module) -> str | None:
    """Return the digest of the vocabulary of a model's tokenizer, or None if it is not known."""
    digest: Callable[[], str | None] | None = getattr(model, "vocabulary_digest", None)
    return digest() if digest else None
