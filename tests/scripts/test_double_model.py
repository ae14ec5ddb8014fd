"""A model in float64 computes what it computes in float32."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import mlx_loraplus as ml
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig
from scripts.judges.double_model import use_double
from scripts.tiny_model import write_tiny_model


def test_a_model_in_float64_differs_by_rounding(tmp_path: Path):
    write_tiny_model(tmp_path)
    model, _ = ml.load(str(tmp_path))
    attach_adapters(model, AdapterConfig(rank=2))
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    tokens = mx.arange(1, 25)[None]
    before = np.array(model(tokens))

    use_double(model)
    logits = model(tokens)
    assert logits.dtype == mx.float64
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == trained
    difference = np.linalg.norm(np.array(logits) - before) / np.linalg.norm(before)
    assert 0 < difference < 1e-5
