"""Every adapter learns, also on experts; checkpointed and compiled steps equal the plain step."""

from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.tuner.utils as stock
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus import fuse_adapter, load_adapter, save_adapter
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig, OptimizerConfig
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.patch import grad_checkpointing, memory_efficient
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.training.optimizer import LoRAPlus
from tests.conftest import TinyModel, same
from tests.training.tiny_models import tiny_llama

ADAPTERS = {
    "lora": {},
    "dora": {"adapter": "dora"},
    "vera": {"adapter": "vera", "rank": 32},
    "pissa": {"init": "pissa"},
    "dora-pissa": {"adapter": "dora", "init": "pissa"},
    "loftq": {"init": "loftq", "quantize_group_size": 32},
    "norms": {"train_modules": ("norms", "embed_tokens")},
}
each_adapter = pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
# Enough tokens that mlx-lm sorts them by expert.
TOKENS = mx.random.randint(1, 128, (2, 41), key=mx.random.key(8))
ROWS = (TOKENS[:, :-1], mx.arange(80), TOKENS[:, 1:].flatten(), mx.ones(80))


@pytest.mark.parametrize("kind", ["mixtral", "llama4", "qwen3_moe"])
@each_adapter
def test_experts_learn_save_load_and_fuse(
    tiny: TinyModel,
    tmp_path: Path,
    kind: str,
    settings: dict,
):
    model = tiny(kind)
    mx.random.seed(2)
    trainable = attach_adapters(model, AdapterConfig(**{"rank": 4, "num_layers": 1, **settings}))

    assert any("experts" in path or "switch_mlp" in path for path in find_adapters(model))

    rate = 2e-2 if settings.get("adapter") == "vera" else 2e-3
    config = OptimizerConfig(
        learning_rate=rate, lr_ratio=4, embedding_learning_rate=1e-3, schedule="constant", warmup=0
    )
    optimizer = LoRAPlus(config, total_steps=10)
    optimizer.init(model, trainable.groups)
    accumulate, update = make_step(
        model, make_loss(find_trunk_and_head(model)), optimizer, compiled=False
    )
    losses = [update(*accumulate(ROWS, None), mx.array(80.0))[0].item() for _ in range(5)]

    assert losses[-1] < 0.98 * losses[0]

    model.eval()

    wanted = model(TOKENS)
    loaded = load_adapter(tiny(kind), save_adapter(model, tmp_path))

    assert same(loaded.parameters(), model.parameters())
    assert (
        mx.abs(loaded(TOKENS) - wanted).max() < 2e-6 * mx.abs(wanted).max()
    )  # the experts' own sums vary by this

    if settings in (ADAPTERS["lora"], ADAPTERS["pissa"]):
        assert (
            mx.abs(stock.load_adapters(tiny(kind), str(tmp_path))(TOKENS) - wanted).max()
            < 2e-5 * mx.abs(wanted).max()
        )
    elif "adapter" in settings:  # stock mlx-lm has no DoRA over experts and no VeRA: it raises
        with pytest.raises(ValueError, match=r"doesn't support DoRA|not an adapter parameter"):
            stock.load_adapters(tiny(kind), str(tmp_path))
    fuse_adapter(loaded, dequantize=True)

    assert mx.abs(loaded(TOKENS) - wanted).max() < 2e-5 * mx.abs(wanted).max()


@each_adapter
def test_checkpointed_and_memory_efficient_gradients_equal_the_plain_ones(
    tiny: TinyModel, settings: dict
):
    found = []
    for context in (nullcontext, grad_checkpointing, memory_efficient):
        model = tiny("llama")
        mx.random.seed(2)
        attach_adapters(model, AdapterConfig(**{"rank": 4, **settings}))
        loss = make_loss(find_trunk_and_head(model))
        model.train()
        with context(model):
            found.append(dict(tree_flatten(nn.value_and_grad(model, loss)(model, *ROWS)[1])))
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for name, gradient in found[0].items():
            np.testing.assert_allclose(
                np.array(gradient), np.array(other[name]), rtol=1e-4, atol=1e-5, err_msg=name
            )


def test_a_compiled_step_equals_the_eager_step():
    """DoRA over PiSSA: the trace must read the constants ‖W‖² and the start from the layer."""
    finals = []
    for compiled in (False, True):
        model = tiny_llama(layers=1)
        mx.random.seed(2)
        settings = {"target_modules": ("q_proj",), "train_modules": ("model.norm",)}
        trainable = attach_adapters(
            model, AdapterConfig(rank=4, adapter="dora", init="pissa", **settings)
        )
        optimizer = LoRAPlus(OptimizerConfig(warmup=0, schedule="constant"), total_steps=3)
        optimizer.init(model, trainable.groups)
        accumulate, update = make_step(
            model, make_loss(find_trunk_and_head(model)), optimizer, compiled=compiled
        )
        tokens = TOKENS[:1, :9] % 20
        for _ in range(3):
            arrays = (tokens[:, :-1], mx.arange(8), tokens[0, 1:], mx.ones(8))
            update(*accumulate(arrays, None), mx.array(8.0))
        finals.append(dict(tree_flatten(model.trainable_parameters())))
    for name, array in finals[0].items():
        np.testing.assert_allclose(
            np.array(array), np.array(finals[1][name]), rtol=1e-4, atol=1e-6, err_msg=name
        )
