"""The token ids that probe a model are within its embedding, even a small one."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_loraplus.adapters.token_tables import TOKEN_TABLES, probe_tokens, table_rows
from tests.training.test_self_consistency import family

NAMES = [
    "gpt2",
    "gpt_neox",
    "mamba",
    "mamba2",
    "rwkv7",
    "llama4",
    "gemma3n",
    "qwen3_5",
    "internlm2",
    "dbrx",
    "phi3",
    "minicpm",
]


@pytest.mark.parametrize("name", NAMES)
def test_families_are_probed_with_valid_ids(name: str):
    model = family(name)
    rows = table_rows(model, TOKEN_TABLES)
    assert rows
    assert int(probe_tokens(model, 2 * rows).max().item()) == rows - 1  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rows", [1, 2, 9, 100])
def test_a_small_embedding_is_probed_with_valid_ids(rows: int):
    model = nn.Module()
    model.embed_tokens = nn.Embedding(rows, 4)
    tokens = probe_tokens(model, 12)
    assert tokens.shape == (1, 12)
    assert mx.all(tokens < rows).item()
