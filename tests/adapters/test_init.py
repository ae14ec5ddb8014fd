"""The initial A and B, and the low-rank approximations that PiSSA and LoftQ use."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.tuner.utils as stock
import numpy as np
import pytest

from mlx_loraplus import ConfigError, fuse_adapter, load_adapter, save_adapter
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.base_layers import full_weight
from mlx_loraplus.adapters.init import loftq, low_rank
from mlx_loraplus.adapters.lora import LoRA
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from tests.conftest import CONFIGS, TinyModel, randomize_adapters

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])


def decaying(*shape: int) -> mx.array:
    """Return a matrix whose singular values decrease as 0.8^k."""
    rng = np.random.default_rng(0)
    u, s, v = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    return mx.array(((u * 0.8 ** np.arange(s.shape[-1])) @ v).astype(np.float32))


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (3, 40, 70)])
@pytest.mark.parametrize("exact", [True, False])
def test_low_rank_is_the_best_approximation_with_balanced_halves(
    shape: tuple[int, ...], exact: bool
):
    weight = decaying(*shape)
    left, right = low_rank(weight, 5, exact=exact)
    u, s, v = np.linalg.svd(np.array(weight, np.float64), full_matrices=False)
    best = (u[..., :5] * s[..., None, :5]) @ v[..., :5, :]
    np.testing.assert_allclose(np.array(left @ right), best, atol=2e-6 if exact else 2e-4)
    for half, axis in ((left, -2), (right, -1)):
        np.testing.assert_allclose(
            np.array(mx.linalg.norm(half, axis=axis)) ** 2, s[..., :5], rtol=1e-3
        )


@pytest.mark.parametrize("exact", [True, False])
def test_low_rank_is_finite_for_a_weight_of_lower_rank(exact: bool):
    weight = decaying(40, 3) @ decaying(3, 60)
    left, right = low_rank(weight, 8, exact=exact)
    np.testing.assert_allclose(np.array(left @ right), np.array(weight), atol=1e-5)
    assert np.abs(np.array(left)).max() < 10


def test_more_iterations_of_loftq_reduce_the_error():
    mx.random.seed(1)
    weight = mx.random.normal((96, 64))

    def rounded(weight: mx.array) -> mx.array:
        return mx.dequantize(*mx.quantize(weight, 32, 3), 32, 3)

    def lost(iters: int) -> float:
        rest, left, right = loftq(weight, 8, iters, rounded, exact=True)
        return mx.linalg.norm(weight - rounded(rest) - left @ right).item()

    assert lost(5) < lost(1) < mx.linalg.norm(weight - rounded(weight)).item()


def test_init2_starts_with_a_zero_a(tiny: TinyModel):
    model = tiny("mixtral")
    attach_adapters(model, AdapterConfig(rank=4, init="init2"))
    for adapter in find_adapters(model).values():
        assert isinstance(adapter, LoRA)
        assert mx.abs(adapter.lora_a).max() == 0
        assert 0.4 < mx.abs(adapter.lora_b).max() <= 0.5  # 1 / √rank


def test_rslora_scales_by_the_root_of_the_rank(tiny: TinyModel):
    for rslora, scale in ((False, 2.0), (True, 4.0)):
        model = tiny("llama")
        attach_adapters(model, AdapterConfig(rank=4, alpha=8, rslora=rslora))
        assert {adapter.scale for adapter in find_adapters(model).values()} == {scale}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("bits", [None, 4])
def test_stock_mlx_lm_loads_pissa_on_the_model_as_it_was(
    tiny: TinyModel,
    tmp_path: Path,
    kind: str,
    bits: int | None,
):
    model = tiny(kind, bits=bits)
    attach_adapters(model, AdapterConfig(rank=4, init="pissa", alpha=8, num_layers=1))
    for adapter in find_adapters(model).values():  # W's first four singular values
        values = np.linalg.svd(np.array(full_weight(adapter.base, mx.float32)), compute_uv=False)[
            ..., :4
        ]
        half = np.array(adapter.factors()[0][..., :4])  # then those that are taken off again
        np.testing.assert_allclose(
            np.linalg.norm(half, axis=-2) ** 2 * adapter.scale, values, rtol=0.05
        )
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    other = stock.load_adapters(tiny(kind, bits=bits), str(tmp_path))
    wanted = model(TOKENS)

    assert mx.abs(other(TOKENS) - wanted).max() < 2e-5 * mx.abs(wanted).max()

    again = load_adapter(tiny(kind, bits=bits), tmp_path)

    assert {adapter.rank for adapter in find_adapters(again).values()} == {4}


@pytest.mark.parametrize("quantize", ["2", "4", "8", "mxfp4", "nvfp4", "mxfp8"])
def test_loftq_brings_its_base_along(
    tiny: TinyModel,
    tmp_path: Path,
    quantize: str,
):
    model = tiny("llama")
    size = {"quantize_group_size": 32} if quantize.isdigit() else {}
    trainable = attach_adapters(
        model, AdapterConfig(rank=4, init="loftq", quantize=quantize, **size)
    )

    assert len(trainable.residuals) == 21
    assert all(after < before for before, after in trainable.residuals.values())

    randomize_adapters(model, size=0.01)
    save_adapter(model, tmp_path)
    loaded = load_adapter(tiny("llama"), tmp_path)

    assert mx.array_equal(loaded(TOKENS), model(TOKENS))
    with pytest.raises(
        ValueError, match=r"q_proj\.linear\.(weight|scales|biases): not an adapter parameter"
    ):
        stock.load_adapters(
            tiny("llama"), str(tmp_path)
        )  # on the unquantized base it would be silently wrong

    wanted = model(TOKENS)
    fuse_adapter(loaded, dequantize=True)

    assert mx.linalg.norm(loaded(TOKENS) - wanted) < 2e-3 * mx.linalg.norm(wanted)


def test_quantizing_needs_full_weights_in_whole_groups(tiny: TinyModel):
    for init, quantize in (("loftq", None), ("pissa", "3")):
        model = tiny("llama", bits=4)
        config = AdapterConfig(rank=4, init=init, quantize=quantize, quantize_group_size=32)
        with pytest.raises(
            ConfigError, match=r"q_proj has 4 bits already: load the original$"
        ) as error:
            attach_adapters(model, config)
        assert "\n" not in str(error.value)
        assert not find_adapters(model)
    model = tiny("llama")

    with pytest.raises(
        ConfigError,
        match=r"mlp.down_proj has 96 columns, which is not a multiple of the group size 64",
    ):
        attach_adapters(model, AdapterConfig(rank=4, init="loftq"))
    assert not find_adapters(model)
    assert isinstance(model.layers[0].mlp.down_proj, nn.Linear)
