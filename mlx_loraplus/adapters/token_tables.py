"""Find a model's token and position tables, and make token ids for a trial run of the model."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .lora import base_of

TOKEN_TABLES = (
    "embed_tokens", "wte", "word_embeddings", "embeddings", "embedding", "embed_in",
    "tok_embeddings", "token_embeddings", "embed", "token_embedding", "word_embedding",
)  # fmt: skip
"""Names of the token embedding in mlx-lm's models."""

POSITION_TABLES = (
    "wpe", "embed_positions", "position_embeddings", "position_embedding", "pos_embed", "pos_emb",
    "pos_embeddings",
)  # fmt: skip
"""Names of the learned position embedding in mlx-lm's models."""


def table_rows(model: nn.Module, names: Sequence[str]) -> int | None:
    """Return the number of rows of the outermost table with one of these names, or None."""
    found: list[tuple[int, int]] = []
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name not in names:
            continue

        table = base_of(module)
        if "weight" in table:
            depth = path.count(".")
            found.append((depth, table["weight"].shape[0]))

    return min(found)[1] if found else None


def probe_tokens(model: nn.Module, count: int) -> mx.array:
    """Return token ids for a trial run of a model, (1, count), all within its embedding.

    MLX does not check indices. An id beyond the table reads unrelated memory, so the logits would
    differ from call to call.
    """
    rows = table_rows(model, TOKEN_TABLES) or 2
    return mx.array([[(5 * place + 1) % rows for place in range(count)]])
