"""The terms of the memory law for what only a GPU does, against peaks of the same operations on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx_loraplus  # noqa: F401  # isort: skip  before mlx
import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.device import Machine
from mlx_loraplus.kernels.attention import CausalMask
from mlx_loraplus.kernels.choices import default_choices
from mlx_loraplus.kernels.cross_entropy import head_loss
from mlx_loraplus.kernels.trunk_and_head import Head
from mlx_loraplus.kernels.window_attention import Blocks, window_attention
from mlx_loraplus.memory.blocks import Block
from mlx_loraplus.memory.estimate import BatchShape, Coefficients
from mlx_loraplus.memory.model_shapes import measure
from mlx_loraplus.memory.plan import memory_plan_of
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


CUDA_BLOCK = Block(
    hidden=64, norms=0, heads=4, queries=64, keys=64, kept_twice=False, window=None,
    whole_scores=(0.0, 0.0), mlp=0, joined=0, experts=0, expert_arrays=0, routed=1, widest=64,
    products=4 * 64 * 64, inputs=0, outputs=0,
)  # fmt: skip


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX says that its GPU has a fused gradient of attention, as on CUDA."""
    monkeypatch.setattr(mx, "device_info", lambda: {"compute_capability_major": 8})


@pytest.mark.usefixtures("ampere")
def test_the_padding_of_attention_is_planned_where_it_happens():
    def padding(length: int = 448, itemsize: int = 2, **batch: Any) -> int:
        shape = BatchShape(2, length, itemsize, **{"blocks": True, "backend": "cuda"} | batch)
        return CUDA_BLOCK.kept(shape) - CUDA_BLOCK.kept(replace(shape, backend="metal"))

    # Of q, k, v and the output, and of a logarithm per head; and the output without the padding.
    assert padding() == 2 * (64 * (2 * 4 * 64 + 4 * 4) + 2 * 448 * 64)
    assert padding(512) == 0
    assert padding(300) == 0, "more than a quarter"
    assert padding(itemsize=4) == padding(packed=True) == padding(blocks=False) == 0
    assert padding(backend="cpu") == 0
    for other in ({"window": 100}, {"whole_scores": (1.1, 4.3)}, {"queries": 1024}):
        block = replace(CUDA_BLOCK, **other)
        batch = BatchShape(2, 448, 2, blocks=True, backend="cuda")
        assert block.kept(batch) == block.kept(replace(batch, backend="metal"))

    batch = BatchShape(2, 448, 2, blocks=True, backend="cuda")
    assert CUDA_BLOCK.fused(batch) == 512

    # The plan of a model, with its 16 blocks of attention.
    config = configure(TrainConfig, {"model": "llama-3.2-1b", "grad_checkpoint": "off"})
    mac, cuda = (
        memory_plan_of(config, machine=Machine(kind, 10**11, 10**11, 10**11))
        for kind in ("metal", "cuda")
    )
    assert mac.memory(2, 512).activations == cuda.memory(2, 512).activations
    more = cuda.memory(2, 448).activations - mac.memory(2, 448).activations
    assert more == 16 * 2 * (64 * (2 * 2 * (2048 + 512) + 4 * 32) + 2 * 448 * 2048)


@pytest.mark.usefixtures("ampere")
def test_attention_without_a_fused_gradient_has_scores_that_must_fit_an_array():
    """cuDNN does not support heads that are 256 wide, and Metal does."""
    block = replace(CUDA_BLOCK, queries=4 * 256)
    cuda = BatchShape(2, 4096, 2, blocks=True, backend="cuda")
    assert block.fused(cuda) is None
    assert block.largest_array(cuda) == 2 * 4 * 512 * 4096
    assert block.largest_array(replace(cuda, backend="metal")) == 2 * 4096 * 1024

    # The padding of the queries.
    short = replace(cuda, length=448)
    assert CUDA_BLOCK.largest_array(short) == 2 * 512 * 64


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
