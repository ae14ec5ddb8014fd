"""Identify a tokenizer's vocabulary, so that an adapter is not used with another one."""

import hashlib
from functools import cached_property
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


class _Vocabulary:
    """The vocabulary of a tokenizer, whose digest is computed on first use."""

    def __init__(self, tokenizer: TokenizerWrapper):
        self.tokenizer = tokenizer

    @cached_property
    def digest(self) -> str | None:
        return vocabulary_digest(self.tokenizer)


def set_vocabulary(model: nn.Module, tokenizer: TokenizerWrapper) -> None:
    """Let a model know its tokenizer, whose vocabulary is stored and checked with adapters."""
    known: _Vocabulary | None = getattr(model, "vocabulary", None)
    if known is None or known.tokenizer is not tokenizer:
        model.vocabulary = _Vocabulary(tokenizer)


def known_vocabulary(model: nn.Module) -> str | None:
    """Return the digest of the vocabulary of a model's tokenizer, or None if it is not known."""
    known: _Vocabulary | None = getattr(model, "vocabulary", None)
    return None if known is None else known.digest


def describe_other_tokenizer(model: nn.Module, tokenizer: TokenizerWrapper) -> str:
    """Return a warning if a tokenizer gives other ids than the one known to the model, or ""."""
    known: _Vocabulary | None = getattr(model, "vocabulary", None)
    if known is None or known.tokenizer is tokenizer:
        return ""
    if known.digest == vocabulary_digest(tokenizer):
        return ""
    return (
        "warning: the tokenizer gives other ids than the one that the model was loaded with: is it"
        " another model's? load returns a model and its tokenizer together"
    )
