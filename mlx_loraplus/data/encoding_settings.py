"""Everything that determines how rows become tokens."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .chat_renderer import TrainOn
from .rows import MakeRow, make_row
from .special_tokens import fast_tokenizer


@dataclass(frozen=True)
class EncodingSettings:
    """Everything that determines how rows become tokens.

    Attributes:
        tokenizer: The model's tokenizer.
        train_on: Which tokens are supervised.
        names: The column of each field, from the setting ``fields``.
        log: Called regularly with a line about the progress.
        make: Makes a ``Row`` of each raw row, such as ``rows.make_row``.
    """

    tokenizer: TokenizerWrapper
    train_on: TrainOn
    names: Mapping[str, str]
    log: Callable[[str], None]
    make: MakeRow = make_row

    @cached_property
    def digest(self) -> str:
        """Return a digest of everything that token ids and supervision depend on."""
        tokenizer = self.tokenizer
        template = tokenizer._chat_template  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        packages = ("mlx_loraplus", "transformers", "tokenizers")
        parts = [
            fast_tokenizer(tokenizer).to_str(),
            str(tokenizer.chat_template),
            getattr(template, "__module__", ""),
            tokenizer.encode(""),
            tokenizer.bos_token_id,
            sorted(tokenizer.eos_token_ids),
            [version(package) for package in packages],
            self.train_on,
            self.make.__name__,
            sorted(self.names.items()),
        ]
        return cache_key(parts)


def cache_key(parts: Sequence[Any]) -> str:
    """Return a digest of JSON values, for the name of a folder in the cache."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
