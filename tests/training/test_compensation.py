"""The update of weights without adapters: bfloat16 loses nothing, and the plan counts its memory."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig, OptimizerConfig, TrainConfig
from mlx_loraplus.memory.model_shapes import measure
from mlx_loraplus.settings import configure
from mlx_loraplus.training.compensation import narrowed, widened
from mlx_loraplus.training.optimizer import LoRAPlus
from tests.conftest import TinyModel
from tests.training.tiny_models import equal_bits, random_like, tiny_llama, trainables

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])


def full(**settings: Any) -> OptimizerConfig:
    plain = {
        "learning_rate": 1e-3, "lr_ratio": 1.0, "schedule": "constant", "warmup": 0, "max_grad_norm": 0.0,
    }  # fmt: skip
    return OptimizerConfig(**plain | settings)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_float32_steps_are_those_of_mlx(decay: float):
    """Matrices of blocks decay; norms, embeddings and the head do not, and the ends have their own rate."""
    model = tiny_llama()
    trainable = attach_adapters(model, AdapterConfig(adapter="full"))
    config = full(weight_decay=decay, embedding_learning_rate=1e-4)
    ours = LoRAPlus(config, 9)
    ours.init(model, trainable.groups)

    expected = {name: mx.array(array) for name, array in trainables(model).items()}
    rules: dict[str, optim.Optimizer] = {}
    for name, array in expected.items():
        is_end = trainable.groups[name] == "embedding"
        rate = 1e-4 if is_end else 1e-3
        share = 0.0 if is_end or array.ndim < 2 else decay
        rules[name] = optim.AdamW(rate, weight_decay=share, bias_correction=True)
    for step in range(3):
        gradients = random_like(expected, step)
        flat: dict[str, mx.array] = dict(tree_flatten(gradients))
        for name, rule in rules.items():
            expected[name] = rule.apply_gradients({"p": flat[name]}, {"p": expected[name]})["p"]
        ours.update(model, gradients)
    for name, array in trainables(model).items():
        assert mx.allclose(array, expected[name], rtol=0, atol=1e-6).item(), name


def changed(dtype: mx.Dtype, optimizer: str, rate: float) -> tuple[dict[str, mx.array], LoRAPlus]:
    """Make 100 steps with the same gradients; the weights start from numbers that bfloat16 has."""
    model = tiny_llama()
    model.set_dtype(mx.bfloat16)
    model.set_dtype(dtype)
    trainable = attach_adapters(model, AdapterConfig(adapter="full"))
    rule = LoRAPlus(full(learning_rate=rate, optimizer=optimizer, weight_decay=0.0), 100)
    rule.init(model, trainable.groups)
    shapes = {name: array.astype(mx.float32) for name, array in trainables(model).items()}
    for step in range(100):
        rule.update(model, random_like(shapes, step % 3))
        mx.eval(model.parameters(), rule.state)
    return trainables(model), rule


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "adafactor", "muon"])
def test_bfloat16_weights_are_updated_as_float32_weights_to_the_bit(optimizer: str):
    exact, _ = changed(mx.float32, optimizer, 1e-5)
    weights, rule = changed(mx.bfloat16, optimizer, 1e-5)
    for name, weight in weights.items():
        assert weight.dtype == mx.bfloat16
        kept = rule.state["compensation"][name]
        assert mx.array_equal(widened(weight, kept), exact[name]).item(), name
        unit = 2.0**-8 * mx.abs(exact[name])
        assert (mx.abs(weight.astype(mx.float32) - exact[name]) <= unit).all().item(), name


def test_float16_weights_follow_float32():
    """Weight and compensation have 19 bits together, so a few percent of a small step may be lost."""
    exact, _ = changed(mx.float32, "adamw", 1e-5)
    weights, rule = changed(mx.float16, "adamw", 1e-5)
    for name, weight in weights.items():
        value = widened(weight, rule.state["compensation"][name])
        assert mx.allclose(value, exact[name], rtol=0, atol=5e-5).item(), name


def test_numbers_of_every_size_are_split_and_joined():
    bits = mx.random.randint(0, 2**31 - 1, (10_000,), key=mx.random.key(0)).astype(mx.uint32)
    bits = mx.concatenate(
        [bits, bits | 0x80000000, mx.array([0, 0x80000000, 0x3F808000], mx.uint32)]
    )
    exact = bits.view(mx.float32)
    exact = mx.where(mx.isfinite(exact) & (mx.abs(exact) < 1e38), exact, 1.0)
    weight, low = narrowed(exact, mx.bfloat16)
    assert mx.array_equal(widened(weight, low).view(mx.uint32), exact.view(mx.uint32)).item()
    off = mx.abs(weight.astype(mx.float32) - exact)
    assert (off <= 2.0**-8 * mx.abs(exact) + 1e-38).all().item()


def test_plain_bfloat16_loses_what_compensation_keeps():
    """Adam's steps of 1e-5 on weights of about 0.25: below 2^-9 of them, so plain rounding keeps none."""
    start = (0.25 + 0.1 * mx.random.uniform(shape=(64, 64), key=mx.random.key(0))).astype(
        mx.bfloat16
    )
    gradient = mx.ones((64, 64))

    plain = start
    rule = optim.Adam(1e-5, bias_correction=True)
    model = nn.Linear(64, 64, bias=False)
    model.weight = start
    ours = LoRAPlus(full(learning_rate=1e-5), 300)
    ours.init(model, {"weight": "weights"})
    for _ in range(300):
        plain = rule.apply_gradients({"w": gradient.astype(mx.bfloat16)}, {"w": plain})["w"]
        ours.update(model, {"weight": gradient})
        mx.eval(plain, model.parameters(), ours.state)

    assert mx.array_equal(plain, start).item()
    exact = widened(model.weight, ours.state["compensation"]["weight"])
    change = exact - start.astype(mx.float32)
    assert mx.allclose(change, mx.full(change.shape, -300 * 1e-5), rtol=0.01, atol=0).item()
    assert not mx.any(model.weight == start).item()


def test_a_step_that_is_not_finite_changes_no_bit():
    model = tiny_llama()
    model.set_dtype(mx.bfloat16)
    trainable = attach_adapters(model, AdapterConfig(adapter="full"))
    rule = LoRAPlus(full(), 9)
    rule.init(model, trainable.groups)
    gradients = random_like(trainables(model), 0)
    rule.update(model, gradients)
    before = trainables(model), rule.arrays()
    mx.eval(before)
    gradients["lm_head"]["weight"] = gradients["lm_head"]["weight"] * mx.inf
    rule.update(model, gradients)
    assert equal_bits(trainables(model), before[0])
    after = rule.arrays()
    assert equal_bits(
        {name: a for name, a in after.items() if name.startswith("compensation.")},
        {name: a for name, a in before[1].items() if name.startswith("compensation.")},
    )


def test_the_state_is_restored_with_the_compensation():
    models = []
    for _ in range(2):
        model = tiny_llama()
        model.set_dtype(mx.bfloat16)
        models.append(model)
    groups = [attach_adapters(model, AdapterConfig(adapter="full")).groups for model in models]
    first, second = (LoRAPlus(full(learning_rate=1e-5), 9) for _ in models)
    first.init(models[0], groups[0])
    second.init(models[1], groups[1])
    for step in range(3):
        first.update(models[0], random_like(trainables(models[0]), step))
    assert any(name.startswith("compensation.") for name in first.arrays())
    models[1].load_weights(list(trainables(models[0]).items()))
    second.restore(first.arrays())
    for model, rule in zip(models, (first, second), strict=True):
        rule.update(model, random_like(trainables(model), 7))
    assert equal_bits(trainables(models[0]), trainables(models[1]))
    assert equal_bits(first.arrays(), second.arrays())


# Memory


def test_the_plan_counts_weights_gradients_moments_and_compensation(tiny: TinyModel):
    config = configure(TrainConfig, {"adapter": "full"}).adapter
    count = sum(array.size for _, array in tree_flatten(tiny("llama").parameters()))
    for dtype in (mx.float32, mx.bfloat16):
        model = tiny("llama")
        model.set_dtype(dtype)
        before = measure(model, config)
        trainable = attach_adapters(model, config)
        rule = LoRAPlus(full(), 2)
        rule.init(model, trainable.groups)
        state = sum(array.nbytes for array in rule.arrays().values() if array.ndim)
        weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))

        assert before.trainable == count
        assert before.weights + before.adapters() + before.moments("adamw") == weights + state
        assert measure(model, config) == before


def test_what_does_not_fit_names_what_helps():
    from dataclasses import replace

    from mlx_loraplus.device import simulate_mac
    from mlx_loraplus.memory.plan import memory_plan_of

    plan = memory_plan_of(configure(TrainConfig, {"model": "gemma-3-270m", "adapter": "full"}))
    plan = replace(plan, machine=simulate_mac("8GB"))
    big = replace(plan, sizes=replace(plan.sizes, trained=((1 << 16, 1 << 16),)))
    suggestions = big.suggestions(8, 512)
    assert any(line.startswith("--adapter lora") for line in suggestions)
    assert not any("4 bits" in line for line in suggestions)


def test_gradients_of_bfloat16_weights_stay_near_those_of_float32(tiny: TinyModel):
    """The compensation repairs the update only; this bounds what the gradients themselves lose."""
    norms = []
    for dtype in (mx.float32, mx.bfloat16):
        model = tiny("llama")
        model.set_dtype(dtype)
        attach_adapters(model, AdapterConfig(adapter="full"))
        _, tree = nn.value_and_grad(model, lambda m: m(TOKENS).astype(mx.float32).square().mean())(
            model
        )
        norms.append({name: array.astype(mx.float32) for name, array in tree_flatten(tree)})
    off = np.sqrt(sum(float((norms[1][n] - norms[0][n]).square().sum()) for n in norms[0]))
    assert off < 0.05 * np.sqrt(sum(float(a.square().sum()) for a in norms[0].values()))
