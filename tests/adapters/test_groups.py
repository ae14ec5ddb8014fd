"""The LoRA+ group of every parameter, by name; lambda = 1 is plain LoRA."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.adapters.vera import VeRALinear
from mlx_loraplus.config import AdapterConfig, OptimizerConfig
from mlx_loraplus.training.optimizer import LoRAPlus
from tests.conftest import TinyModel

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])
BLOCK = "model.layers.1.block_sparse_moe.switch_mlp.up_proj"
QUERY = "model.layers.1.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"
LORA = {"lora_a": "lora_a", "lora_b": "lora_b"}
OWN_RATE = {"lora_a": "embedding", "lora_b": "embedding"}


@pytest.mark.parametrize(
    ("settings", "leaves", "of_embedding"),
    [
        ({"init": "init1"}, LORA, OWN_RATE),
        ({"init": "init2"}, LORA, OWN_RATE),
        ({"init": "pissa"}, LORA, OWN_RATE),
        ({"init": "loftq", "quantize_group_size": 32}, LORA, OWN_RATE),
        ({"rslora": True}, LORA, OWN_RATE),
        ({"adapter": "dora"}, LORA | {"m": "magnitude"}, OWN_RATE | {"m": "embedding"}),
        ({"adapter": "vera"}, {"vera_d": "lora_a", "vera_b": "lora_b"}, None),
    ],
)
def test_the_summary_has_every_parameter(
    tiny: TinyModel,
    settings: dict,
    leaves: dict,
    of_embedding: dict | None,
):
    model = tiny("mixtral")
    targets = ("q_proj", "up_proj") + (("embed_tokens",) if of_embedding else ())
    trained = ("model.norm", "input_layernorm")
    trainable = attach_adapters(
        model,
        AdapterConfig(
            rank=4, num_layers=1, target_modules=targets, train_modules=trained, **settings
        ),
    )
    expected = {
        f"{path}.{leaf}": group for path in (QUERY, BLOCK) for leaf, group in leaves.items()
    }
    expected |= {f"{EMBEDDING}.{leaf}": group for leaf, group in (of_embedding or {}).items()}
    expected |= {
        "model.norm.weight": "embedding",
        "model.layers.1.input_layernorm.weight": "embedding",
    }

    assert trainable.groups == expected
    assert dict(tree_flatten(model.trainable_parameters())).keys() == expected.keys()


def test_vera_shares_its_projections_and_counts_only_its_vectors(tiny: TinyModel):
    model, plain = tiny("llama"), tiny("llama")
    total = sum(array.size for _, array in tree_flatten(plain.parameters()))
    trainable = attach_adapters(model, AdapterConfig(adapter="vera"))
    found = [
        adapter for adapter in find_adapters(model).values() if isinstance(adapter, VeRALinear)
    ]

    assert len(found) == 21

    first = found[0].projections

    assert [side.shape for side in first] == [(96, 256), (256, 96)]
    assert all(
        side is other
        for adapter in found
        for side, other in zip(adapter.projections, first, strict=True)
    )
    assert trainable.trainable == sum(256 + adapter.vera_b.size for adapter in found)
    assert trainable.total == total + trainable.trainable


@pytest.mark.parametrize(
    "settings",
    [
        {"init": "init1"},
        {"init": "init2"},
        {"init": "pissa"},
        {"adapter": "dora"},
        {"adapter": "vera", "rank": 16},
    ],
    ids=lambda settings: "-".join(settings.values()) if "rank" not in settings else "vera",
)
def test_at_lambda_one_it_is_plain_lora(tiny: TinyModel, settings: dict):
    def start() -> tuple[nn.Module, dict[str, str]]:
        model = tiny("llama")
        mx.random.seed(3)
        return model, dict(attach_adapters(model, AdapterConfig(**{"rank": 4, **settings})).groups)

    def gradients(model: nn.Module) -> dict:
        return nn.value_and_grad(
            model, lambda: nn.losses.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:]).mean()
        )()[1]

    ours, groups = start()
    plus = LoRAPlus(
        OptimizerConfig(
            learning_rate=1e-3, lr_ratio=1, schedule="constant", warmup=0, max_grad_norm=0
        ),
        total_steps=5,
    )
    plus.init(ours, groups)
    plain, _ = start()
    adam = optim.Adam(1e-3, bias_correction=True)
    for _ in range(5):
        plus.update(ours, gradients(ours))
        adam.update(plain, gradients(plain))
    expected = dict(tree_flatten(plain.trainable_parameters()))
    for name, array in tree_flatten(ours.trainable_parameters()):
        np.testing.assert_allclose(
            np.array(array), np.array(expected[name]), rtol=1e-6, atol=1e-8, err_msg=name
        )
