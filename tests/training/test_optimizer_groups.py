"""LoRAPlus's groups: every trainable is in one, by exact name, and learns at its rate, on every kind of base."""

import itertools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus.errors import ConfigError
from mlx_loraplus.training.optimizer import LoRAPlus
from tests.training.tiny_models import (
    OPTIMIZERS,
    Arrays,
    attached,
    equal_bits,
    plain_config,
    random_like,
    tiny_llama,
    tiny_mixtral,
    trainables,
)

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EXPERTS = [f"block_sparse_moe.switch_mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]


def linear_groups(layers: int, modules: list[str]) -> dict[str, str]:
    paths = [
        f"model.layers.{layer}.{module}"
        for layer, module in itertools.product(range(layers), modules)
    ]
    return {f"{path}.{leaf}": leaf for path in paths for leaf in ("lora_a", "lora_b")}


def frozen(model: nn.Module, groups: dict[str, str]) -> Arrays:
    everything: Arrays = dict(tree_flatten(model.parameters()))
    return {name: value for name, value in everything.items() if name not in groups}


def quantized(model: nn.Module) -> nn.Module:
    nn.quantize(model, group_size=32, bits=4)
    return model


EMBEDDING = {"model.embed_tokens.lora_a": "embedding", "model.embed_tokens.lora_b": "embedding"}
HEAD = {"lm_head.lora_a": "lora_a", "lm_head.lora_b": "lora_b"}


@pytest.mark.parametrize(
    ("build", "targets", "expected"),
    [
        (tiny_llama, (), linear_groups(2, ATTENTION + MLP)),
        (tiny_llama, ("embed_tokens", "lm_head"), EMBEDDING | HEAD),
        (lambda: quantized(tiny_llama(hidden=64)), (), linear_groups(2, ATTENTION + MLP)),
        (lambda: quantized(tiny_llama(hidden=64)), ("embed_tokens", "lm_head"), EMBEDDING | HEAD),
        (tiny_mixtral, (), linear_groups(1, [*ATTENTION, *EXPERTS])),
    ],
    ids=["linear", "embedding", "quantized-linear", "quantized-embedding", "experts"],
)
def test_groups_name_every_trainable_and_no_update_misses_one(
    build: Callable[[], nn.Module], targets: tuple[str, ...], expected: dict[str, str]
):
    model, groups = attached(build(), *targets)
    assert groups == expected
    assert groups.keys() == trainables(model).keys()
    base = frozen(model, groups)
    plus = LoRAPlus(plain_config(embedding_learning_rate=5e-4), total_steps=4)
    plus.init(model, groups)
    assert plus.rates.keys() == set(expected.values())
    before = trainables(model)
    plus.update(model, random_like(before, seed=0))
    rates = {"lora_a": 1e-3, "lora_b": 16e-3, "embedding": 5e-4}
    for name, value in trainables(model).items():
        change = np.abs(np.array(value - before[name]))
        np.testing.assert_allclose(change, rates[groups[name]], rtol=1e-3, err_msg=name)
    assert equal_bits(base, frozen(model, groups))


def test_groups_that_do_not_cover_what_trains_are_refused():
    model, groups = attached(tiny_llama(layers=1), "q_proj")
    optimizer = LoRAPlus(plain_config(), total_steps=4)
    missing = dict(list(groups.items())[:1])
    with pytest.raises(ConfigError, match=r"q_proj\.lora_b trains, but is in no group"):
        optimizer.init(model, missing)
    with pytest.raises(ConfigError, match=r"lm_head\.lora_a does not train"):
        optimizer.init(model, groups | {"lm_head.lora_a": "lora_a"})


def test_muon_refuses_experts_in_one_line():
    model, groups = attached(tiny_mixtral(), "up_proj", "q_proj")
    optimizer = LoRAPlus(plain_config(optimizer="muon"), total_steps=4)
    with pytest.raises(ConfigError, match=r"muon.*up_proj\.lora_a.*3 dimensions") as caught:
        optimizer.init(model, groups)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "muon"])
def test_experts_learn_at_lambda_too(optimizer: str):
    changes = []
    for ratio in (16.0, 1.0):
        model, groups = attached(tiny_mixtral(), "up_proj")
        plus = LoRAPlus(plain_config(optimizer=optimizer, lr_ratio=ratio), total_steps=4)
        plus.init(model, groups)
        before = trainables(model)
        plus.update(model, random_like(before, seed=0))
        changes.append(
            {name: np.array(value - before[name]) for name, value in trainables(model).items()}
        )
    for name, group in groups.items():
        factor = 16.0 if group == "lora_b" else 1.0
        np.testing.assert_allclose(
            changes[0][name], factor * changes[1][name], rtol=1e-4, atol=2e-7, err_msg=name
        )


@pytest.mark.parametrize("group", ["magnitude", "embedding"])
def test_magnitudes_and_embeddings_learn_at_their_own_rate_and_do_not_decay(group: str):
    model = nn.Linear(4, 3)
    config = plain_config(
        optimizer="sgd", weight_decay=10.0, magnitude_lr_ratio=3, embedding_learning_rate=5e-4
    )
    optimizer = LoRAPlus(config, total_steps=4)
    optimizer.init(model, {"weight": "lora_a", "bias": group})
    weight, bias = np.array(model.weight), np.array(model.bias)
    optimizer.update(model, {"weight": mx.zeros((3, 4)), "bias": mx.ones(3)})
    np.testing.assert_allclose(np.array(model.weight), (1 - 1e-3 * 10) * weight, rtol=1e-6)
    np.testing.assert_allclose(
        np.array(model.bias), bias - {"magnitude": 3e-3, "embedding": 5e-4}[group], rtol=1e-6
    )


def test_muon_updates_vectors_as_adamw_does():
    model, groups = attached(tiny_llama(), adapter="dora", train_modules=("norms",))
    before = trainables(model)
    vectors = [name for name, array in before.items() if array.ndim < 2]
    assert vectors
    results = []
    for optimizer in ("muon", "adamw"):
        model.load_weights(list(before.items()), strict=False)
        rule = LoRAPlus(plain_config(optimizer=optimizer, embedding_learning_rate=1e-3), 10)
        rule.init(model, groups)
        for seed in (1, 2):
            rule.update(model, random_like(before, seed))
        results.append(trainables(model))
    muon, adamw = results
    assert equal_bits(
        {name: muon[name] for name in vectors}, {name: adamw[name] for name in vectors}
    )
    assert not any(mx.array_equal(muon[name], adamw[name]) for name in muon if name not in vectors)
