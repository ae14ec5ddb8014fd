"""A model's embedding and its learned positions: how many rows they have, and ids that they hold."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .adapter import base_of

TOKEN_TABLES = (
    "embed_tokens", "wte", "word_embeddings", "embeddings", "embedding", "embed_in", "tok_embeddings",
    "token_embeddings", "embed", "token_embedding", "word_embedding",
)  # fmt: skip
"""What mlx-lm's models call the embedding of their tokens."""
POSITION_TABLES = (
    "wpe", "embed_positions", "position_embeddings", "position_embedding", "pos_embed", "pos_emb", "pos_embeddings",
)  # fmt: skip
"""What they call a learned table of positions."""


def table_rows(model: nn.Module, names: Sequence[str]) -> int | None:
    """Return the rows of the outermost module with one of these names, or None."""
    found: list[tuple[int, int]] = []
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in names and "weight" in base_of(module):
            found.append((path.count("."), base_of(module)["weight"].shape[0]))
    return min(found)[1] if found else None


def probe_tokens(model: nn.Module, count: int) -> mx.array:
    """Return one row of ``count`` token ids to try a model on, all within its embedding.

    MLX does not check indices: an id beyond the table reads other memory, and gives other logits
    each time.
    """
    rows = table_rows(model, TOKEN_TABLES) or 2
    return mx.array([[(5 * place + 1) % rows for place in range(count)]])
