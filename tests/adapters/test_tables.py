"""The ids that a model is tried on are within its embedding, however small that is."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_loraplus.adapters.tables import TOKEN_TABLES, probe_tokens, table_rows
from tests.training.test_soundness import family

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
def test_families_are_tried_on_ids_that_they_have(name: str):
    model = family(name)
    rows = table_rows(model, TOKEN_TABLES)
    assert rows
    assert int(probe_tokens(model, 2 * rows).max().item()) == rows - 1  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rows", [1, 2, 9, 100])
def test_a_small_embedding_has_every_id_that_is_tried(rows: int):
    model = nn.Module()
    model.embed_tokens = nn.Embedding(rows, 4)
    tokens = probe_tokens(model, 12)
    assert tokens.shape == (1, 12)
    assert mx.all(tokens < rows).item()
