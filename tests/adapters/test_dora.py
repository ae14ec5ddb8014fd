"""DoRA: the expansion of the row norms, rows of zeros, and the format of mlx-lm."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.tuner.utils as stock
import numpy as np
import pytest

from mlx_loraplus import save_adapter
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.base_layers import full_weight
from mlx_loraplus.adapters.dora import DoRAEmbedding, DoRALinear
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from tests.conftest import TinyModel, randomize_adapters

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])


@pytest.mark.parametrize("size", [1e-3, 0.1, 10.0])
def test_expanded_row_norms_equal_those_of_the_sum(size: float):
    mx.random.seed(4)
    adapter = DoRALinear(nn.Linear(48, 80), 4, 2.0)
    adapter.lora_b = size * mx.random.normal(adapter.lora_b.shape)
    direct = np.linalg.norm(
        np.array(full_weight(adapter.base, mx.float32) + adapter.delta(), np.float64), axis=1
    )
    np.testing.assert_allclose(np.array(adapter.row_norms()), direct, rtol=1e-6)


def test_row_norms_are_finite_if_the_adapter_cancels_most_of_the_weight():
    mx.random.seed(4)
    adapter = DoRALinear(nn.Linear(8, 8, bias=False), 8, 1.0)
    adapter.set_factors(
        -0.999 * adapter.base.weight, mx.eye(8)
    )  # V = W / 1000: the sum cancels six digits
    norms = np.array(adapter.row_norms())
    direct = 1e-3 * np.linalg.norm(np.array(adapter.base.weight, np.float64), axis=1)

    assert np.isfinite(norms).all()

    np.testing.assert_allclose(norms, direct, rtol=0.2)


def test_a_row_of_zeros_gives_zeros_and_no_nan():
    embedding = nn.Embedding(16, 8)
    embedding.weight[3] = 0.0
    adapter = DoRAEmbedding(embedding, 4, 2.0)
    loss_and_gradients = nn.value_and_grad(adapter, lambda: (adapter(mx.array([3, 5])) ** 2).sum())
    loss, gradients = loss_and_gradients()

    assert mx.isfinite(loss)
    assert all(mx.isfinite(gradients[name]).all() for name in ("lora_a", "lora_b", "m"))
    assert mx.abs(adapter(mx.array([3]))).max() == 0


@pytest.mark.parametrize(
    ("bits", "mode"), [(None, "affine"), (4, "affine"), (8, "affine"), (4, "mxfp4"), (8, "mxfp8")]
)
def test_stock_mlx_lm_loads_dora_where_its_own_layers_work(
    tiny: TinyModel,
    tmp_path: Path,
    bits: int | None,
    mode: str,
):
    """Stock mlx-lm has no DoRA for 3, 5 and 6 bits, quantized embeddings and experts."""
    model = tiny("llama", bits=bits, mode=mode)
    targets = ("all-linear", "embed_tokens") if bits is None else ("all-linear",)
    attach_adapters(model, AdapterConfig(adapter="dora", rank=4, alpha=12, target_modules=targets))
    start = {path: adapter.m for path, adapter in find_adapters(model).items()}
    randomize_adapters(model)
    for path, adapter in find_adapters(model).items():
        adapter.m = start[path] * (1 + adapter.m)
    save_adapter(model, tmp_path)
    other = stock.load_adapters(tiny("llama", bits=bits, mode=mode), str(tmp_path))
    wanted = model(TOKENS)

    # Stock dequantizes microscaling weights to bfloat16.
    assert mx.linalg.norm(other(TOKENS) - wanted) < (
        1e-5 if mode == "affine" else 1e-2
    ) * mx.linalg.norm(wanted)
