"""The terms of the memory law for what only a GPU does, against peaks of the same operations on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx_loraplus  # noqa: F401  # isort: skip  before mlx
import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.kernels.attention import CausalMask
from mlx_loraplus.kernels.choices import default_choices
from mlx_loraplus.kernels.cross_entropy import head_loss
from mlx_loraplus.kernels.head import Head
from mlx_loraplus.kernels.window_attention import Blocks, window_attention
from mlx_loraplus.memory.estimate import BatchShape, Coefficients
from mlx_loraplus.memory.model_shapes import measure
from mlx_loraplus.models.skeleton import config_of, make_skeleton
from mlx_loraplus.settings import configure
from scripts.bench.launches import gpu_kernels

GPU = default_choices(gpu=True)


def peak_of(function: Callable[..., Any], *arrays: mx.array, compiled: bool) -> int:
    """Return the bytes that a function needs above its arguments."""
    function = mx.compile(function) if compiled else function
    mx.eval(function(*arrays))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function(*arrays))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_attention_in_blocks_takes_at_most_what_the_law_says(dtype: mx.Dtype, compiled: bool):
    blocks = Blocks(rows=1, heads=2, shared=1, length=2048, window=1024)
    q, k = mx.zeros((1, 2, 2048, 8), dtype), mx.zeros((1, 1, 2048, 8), dtype)
    mx.eval(q, k)

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return window_attention(q, k, v, 0.1, CausalMask(1024)).astype(mx.float32).sum()

    peak = peak_of(mx.value_and_grad(loss, argnums=(0, 1, 2)), q, k, k, compiled=compiled)
    arrays = peak / blocks.group_bytes(dtype.size)
    assert arrays <= (4 if compiled else 11.5)
    assert arrays > 3, "the scores, their softmax and its gradient"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_large_slices_take_what_the_law_says(dtype: mx.Dtype):
    layer = nn.Linear(8, 32_768, bias=False)
    layer.freeze()
    layer.set_dtype(dtype)
    hidden, targets, weights = mx.zeros((1024, 8), dtype), mx.zeros(1024, mx.int32), mx.ones(1024)
    mx.eval(layer.parameters(), hidden)
    choices = replace(GPU, slice_bytes=4 * 2**20)

    def loss(hidden: mx.array) -> mx.array:
        return head_loss(Head(layer), hidden, targets, weights, choices)

    with gpu_kernels():
        peak = peak_of(mx.value_and_grad(loss), hidden, compiled=True)
    sizes = measure(make_skeleton(config_of("gemma-3-270m")), configure(TrainConfig, {}).adapter)
    sizes = replace(
        sizes, choices=choices, vocabulary=32_768, itemsize=dtype.size, hidden=8, sliced=True
    )
    predicted = sizes.head(BatchShape(1, 1024, dtype.size), 1024, Coefficients())
    assert peak == pytest.approx(predicted, rel=0.05)


def test_scores_in_blocks_do_not_grow_beyond_a_group():
    (block,) = {
        each
        for each in measure(
            make_skeleton(config_of("gemma-3-4b")), configure(TrainConfig, {}).adapter
        ).blocks
        if each.window is not None
    }
    parts = Coefficients()
    short, long, longer = (
        block.scores(BatchShape(4, length, 2, blocks=True), parts)
        for length in (1024, 8192, 16_384)
    )
    assert short == block.scores(BatchShape(4, 1024, 2), parts), "the window is the whole row"
    assert long == longer == pytest.approx(11.5 * 256 * 2**20, rel=0.1)
    packed = block.scores(BatchShape(4, 8192, 2, packed=True, blocks=True), parts)
    assert packed == long + 3 * 4 * 8192 * 1280
