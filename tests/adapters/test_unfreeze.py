"""Modules that train in full: float32 parameters, outputs in the base's type, a file of their own."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.tuner.utils as stock
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus import AdapterError, ConfigError, fuse_adapter, load_adapter, save_adapter
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig, OptimizerConfig
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head, model_dtype
from mlx_loraplus.training.optimizer import LoRAPlus
from tests.conftest import CONFIGS, TinyModel, randomize_adapters, same

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])
MODULES = ("norms", "embed_tokens")


def attached(model: nn.Module, *modules: str) -> nn.Module:
    attach_adapters(
        model, AdapterConfig(rank=4, target_modules=("q_proj",), train_modules=modules or MODULES)
    )
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_norms_and_embeddings_train_save_load_and_fuse(
    tiny: TinyModel,
    tmp_path: Path,
    kind: str,
):
    model = attached(tiny(kind))
    trained = dict(tree_flatten(model.trainable_parameters()))

    assert any("norm" in name for name in trained)
    assert any(name.endswith("embed_tokens.weight") for name in trained)
    assert mx.array_equal(model(TOKENS), tiny(kind)(TOKENS))

    randomize_adapters(model, size=0.3)
    before = model(TOKENS)
    save_adapter(model, tmp_path)
    loaded = load_adapter(tiny(kind), tmp_path)

    assert mx.array_equal(loaded(TOKENS), before)
    assert same(loaded.trainable_parameters(), model.trainable_parameters())

    fuse_adapter(loaded)

    assert type(loaded.layers[0].self_attn.q_proj) is nn.Linear
    assert {type(module) for _, module in loaded.named_modules()} == {
        type(module) for _, module in tiny(kind).named_modules()
    }
    assert mx.abs(loaded(TOKENS) - before).max() < 1e-5 * mx.abs(before).max() + 1e-5


def test_stock_mlx_lm_loads_the_adapters_without_them(tiny: TinyModel, tmp_path: Path):
    model = attached(tiny("llama"), "norms", "lm_head")
    plain = dict(tree_flatten(tiny("llama").parameters()))
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    model.load_weights(
        [(name, plain[name]) for name in mx.load(str(tmp_path / "modules.safetensors"))],
        strict=False,
    )
    other = stock.load_adapters(tiny("llama"), str(tmp_path))

    assert mx.abs(other(TOKENS) - model(TOKENS)).max() < 1e-5


def test_a_step_too_small_for_bfloat16_is_not_lost(tiny: TinyModel):
    model = tiny("llama")
    model.set_dtype(mx.bfloat16)
    before = dict(tree_flatten(model.parameters()))
    attached(model, "norms", "embed_tokens", "lm_head")

    assert model_dtype(model) == mx.bfloat16
    assert model(TOKENS).dtype == mx.bfloat16
    assert model.model.embed_tokens(TOKENS).dtype == mx.bfloat16

    trunk_and_head = find_trunk_and_head(model)

    assert trunk_and_head is not None
    assert not trunk_and_head.head.is_frozen

    optimizer = LoRAPlus(OptimizerConfig(schedule="constant", warmup=0), total_steps=2)
    optimizer.init(
        model, {name: "embedding" for name, _ in tree_flatten(model.trainable_parameters())}
    )
    rows = (TOKENS[:, :-1], mx.arange(9), TOKENS[0, 1:], mx.ones(9))
    optimizer.update(model, nn.value_and_grad(model, make_loss(trunk_and_head))(model, *rows)[1])
    for name, array in tree_flatten(model.trainable_parameters()):
        assert array.dtype == mx.float32
        if "lora" not in name:
            moved = mx.abs(array - before[name].astype(mx.float32)).max().item()
            assert 0 < moved < 1.1e-6, name
    fuse_adapter(model)

    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.bfloat16}


def test_quantized_modules_are_refused(tiny: TinyModel):
    model = tiny("llama", bits=4)
    with pytest.raises(
        ConfigError, match=r"--train-modules: lm_head is quantized, so it can't train in full"
    ):
        attached(model, "norms", "lm_head")


def test_modules_of_another_shape_raise(tiny: TinyModel, tmp_path: Path):
    save_adapter(attached(tiny("llama"), "norm"), tmp_path)
    mx.save_safetensors(str(tmp_path / "modules.safetensors"), {"model.norm.weight": mx.ones(32)})
    with pytest.raises(
        AdapterError, match=r"model\.norm\.weight has shape \(32,\), the model needs \(64,\)"
    ):
        load_adapter(tiny("llama"), tmp_path)


@pytest.mark.parametrize(
    ("bits", "path"), [(None, "model.layers.0.self_attn.q_proj"), (None, "model"), (4, "lm_head")]
)
def test_modules_that_cannot_train_in_full_raise(
    tiny: TinyModel,
    tmp_path: Path,
    bits: int | None,
    path: str,
):
    """A module with an adapter, one with children and a quantized one, although all shapes fit."""
    model = tiny("llama", bits=bits)
    attach_adapters(model, AdapterConfig(rank=4, target_modules=("q_proj",)))
    save_adapter(model, tmp_path)
    arrays = dict(tree_flatten(dict(tiny("llama", bits=bits).named_modules())[path].parameters()))
    mx.save_safetensors(
        str(tmp_path / "modules.safetensors"), {f"{path}.{name}": a for name, a in arrays.items()}
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"train_modules": [path]}))

    with pytest.raises(AdapterError, match="has no place in the model"):
        load_adapter(tiny("llama", bits=bits), tmp_path)
