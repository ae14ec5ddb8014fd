"""Attaching leaves the outputs unchanged, and the summary counts what trains."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus import AdapterError, ConfigError
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_loraplus.adapters.trainable import find_adapters, trainable_summary
from mlx_loraplus.config import AdapterConfig
from tests.conftest import CONFIGS, TinyModel, randomize_adapters

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])
BASES = [
    (None, "affine"),
    *((bits, "affine") for bits in (2, 3, 4, 5, 6, 8)),
    (4, "mxfp4"),
    (4, "nvfp4"),
    (8, "mxfp8"),
]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("bits", [None, 4])
def test_attaching_changes_no_logit(
    tiny: TinyModel,
    kind: str,
    bits: int | None,
):
    model = tiny(kind, bits=bits)
    before = model(TOKENS)
    attach_adapters(model, AdapterConfig(rank=4))
    assert mx.array_equal(model(TOKENS), before)
    randomize_adapters(model)
    assert not mx.allclose(model(TOKENS), before, atol=1e-3)


@pytest.mark.parametrize(("bits", "mode"), BASES)
def test_every_width_and_mode_takes_adapters_on_linears_and_embeddings(
    tiny: TinyModel,
    bits: int | None,
    mode: str,
):
    model = tiny("gemma3", bits=bits, mode=mode)
    before = model(TOKENS)
    targets = ("all-linear", "embed_tokens")
    trainable = attach_adapters(model, AdapterConfig(rank=4, target_modules=targets))

    assert mx.array_equal(model(TOKENS), before)
    assert {
        group: list(trainable.groups.values()).count(group)
        for group in set(trainable.groups.values())
    } == {
        "lora_a": 21,
        "lora_b": 21,
        "embedding": 2,
    }


def test_the_base_is_frozen_and_the_adapters_are_float32_over_a_bfloat16_base(tiny: TinyModel):
    model = tiny("llama")
    model.set_dtype(mx.bfloat16)
    trainable = attach_adapters(
        model, AdapterConfig(rank=4, target_modules=("q_proj", "embed_tokens", "lm_head"))
    )
    trained = dict(tree_flatten(model.trainable_parameters()))

    assert trained.keys() == trainable.groups.keys()
    assert {array.dtype for array in trained.values()} == {mx.float32}
    assert model(TOKENS).dtype == mx.bfloat16
    assert sum(array.size for array in trained.values()) == trainable.trainable


def test_shapes_are_those_of_mlx_lm(tiny: TinyModel):
    model = tiny("mixtral")
    attach_adapters(
        model, AdapterConfig(rank=4, target_modules=("k_proj", "down_proj", "embed_tokens"))
    )
    found = find_adapters(model)
    linear = found["model.layers.0.self_attn.k_proj"]
    experts = found["model.layers.1.block_sparse_moe.switch_mlp.down_proj"]
    embedding = found["model.embed_tokens"]

    assert isinstance(linear, LoRALinear)
    assert isinstance(experts, LoRASwitchLinear)
    assert isinstance(embedding, LoRAEmbedding)
    assert (linear.lora_a.shape, linear.lora_b.shape) == ((64, 4), (4, 32))
    assert (experts.lora_a.shape, experts.lora_b.shape) == ((4, 4, 96), (4, 64, 4))
    assert (embedding.lora_a.shape, embedding.lora_b.shape) == ((128, 4), (4, 64))


def test_num_layers_takes_the_last_blocks(tiny: TinyModel):
    model = tiny("llama")
    trainable = attach_adapters(
        model, AdapterConfig(rank=4, num_layers=1, target_modules=("q_proj",))
    )

    assert set(trainable.groups) == {
        f"model.layers.2.self_attn.q_proj.lora_{half}" for half in "ab"
    }


def test_all_linear_leaves_out_head_embedding_and_routers(tiny: TinyModel):
    model = tiny("mixtral")
    attach_adapters(model, AdapterConfig(rank=4))
    leaves = {path.rsplit(".", 1)[-1] for path in find_adapters(model)}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("q_porj",)}, "nothing matches 'q_porj' (did you mean 'q_proj'"),
        ({"num_layers": 9}, "--num-layers 9 is above the model's 3 blocks"),
        ({"rank": 33}, "rank 33 is above 32, the smaller side of model.layers.0.self_attn"),
        ({"init": "pissa", "rank": 33}, "rank 33 is above 32"),
        ({"adapter": "vera", "init": "loftq"}, "vera has no init loftq"),
        (
            {"adapter": "vera", "target_modules": ("q_proj", "embed_tokens")},
            "vera can't adapt the embedding model.emb",
        ),
        (
            {"train_modules": ("nrom",)},
            "--train-modules: nothing matches 'nrom' (did you mean 'norm'",
        ),
        (
            {"train_modules": ("q_proj",)},
            "self_attn.q_proj is in --target-modules and in --train-modules",
        ),
        (
            {"train_modules": ("q_proj",), "target_modules": ("v_proj",), "num_layers": 9},
            "--num-layers 9 is above",
        ),
        ({"rank": 0}, "rank must be greater than or equal to 1"),
        ({"alpha": float("nan")}, "alpha must be"),
    ],
)
def test_an_invalid_setting_raises_and_leaves_the_model_unchanged(
    tiny: TinyModel,
    settings: dict,
    message: str,
):
    model = tiny("llama")

    with pytest.raises(ConfigError) as error:
        attach_adapters(model, AdapterConfig(**settings))
    assert message in str(error.value)
    assert not find_adapters(model)


def test_attaching_twice_is_refused(tiny: TinyModel):
    model = tiny("llama")
    attach_adapters(model, AdapterConfig(rank=4))
    with pytest.raises(AdapterError, match="has adapters already"):
        attach_adapters(model, AdapterConfig(rank=4))


def test_the_summary_raises_without_parameters_and_for_stray_ones(tiny: TinyModel):
    model = tiny("llama")
    model.freeze()

    with pytest.raises(AdapterError, match="nothing trains"):
        trainable_summary(model)

    attach_adapters(model, AdapterConfig(rank=4))
    model.model.norm.unfreeze()

    with pytest.raises(AdapterError, match=r"model\.norm\.weight"):
        trainable_summary(model)


def test_the_summary_counts_quantized_parameters_as_if_unpacked(tiny: TinyModel):
    plain, packed = tiny("llama"), tiny("llama", bits=4)
    config = AdapterConfig(rank=4)
    assert attach_adapters(plain, config).total == attach_adapters(packed, config).total


def test_dropout_acts_in_training_only():
    mx.random.seed(3)
    adapter = LoRALinear(nn.Linear(16, 8), 4, 2.0, dropout=0.5)
    adapter.lora_b = mx.random.normal((4, 8))
    x = mx.random.normal((5, 16))
    adapter.eval()

    assert mx.array_equal(adapter(x), adapter(x))

    adapter.train()
    mean = mx.stack([adapter(x) for _ in range(3000)]).mean(axis=0)
    adapter.eval()

    assert mx.abs(mean - adapter(x)).max() < 0.25
