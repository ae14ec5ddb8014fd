"""LoRAPlus: lambda holds at every step, in every mode; so do the rules around it (decay, clipping, state)."""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig, OptimizerConfig, TrainConfig
from mlx_loraplus.errors import ConfigError
from mlx_loraplus.settings import configure
from mlx_loraplus.training.optimizer import LoRAPlus
from tests.training.tiny_models import (
    OPTIMIZERS,
    attached,
    equal_bits,
    plain_config,
    random_like,
    tiny_llama,
    trainables,
)

STEPS = 6


# --- lambda, measured on the steps really taken
# --------------------------------------------------------------------


class Steps:
    """Steps that an optimizer takes from one fixed point, given gradients, so that two optimizers can be compared."""

    def __init__(
        self, config: OptimizerConfig, *targets: str, compiled: bool = False, adapter: str = "lora"
    ):
        targets = targets or ("q_proj", "down_proj", "embed_tokens")
        self.model, groups = attached(tiny_llama(layers=1), *targets, adapter=adapter)
        self.groups = groups
        self.optimizer = LoRAPlus(config, total_steps=STEPS)
        self.optimizer.init(self.model, groups)
        self.start = trainables(self.model)
        captured = [self.model.state, self.optimizer.state]

        def update(gradients: dict) -> mx.array:
            return self.optimizer.update(self.model, gradients)

        self.step = mx.compile(update, inputs=captured, outputs=captured) if compiled else update

    def take(self, seed: int) -> dict[str, np.ndarray]:
        """Go back to the start, step once with the gradients of ``seed``, return path → change."""
        self.model.update(tree_unflatten(list(self.start.items())))
        self.step(random_like(self.start, seed))
        return {name: np.array(p - self.start[name]) for name, p in trainables(self.model).items()}


def everything(optimizer: str) -> OptimizerConfig:
    """A config with every rule at work, for the compiled tests.

    They share it, and one layer, because MLX on a CPU runs g++ for every new constant and shape:
    half a second each.
    """
    decay = 0.1 if optimizer == "adamw" else 0.0
    return plain_config(
        optimizer=optimizer, schedule="cosine", warmup=2, weight_decay=decay, max_grad_norm=3.0
    )


def expect_ratio(plus: Steps, lora: Steps, seed: int, ratio: float, rtol: float = 1e-4) -> None:
    """Check one step: B moved ``ratio`` times as far as under plain LoRA, A and embeddings just as far."""
    ours, plain = plus.take(seed), lora.take(seed)
    for name, group in plus.groups.items():
        factor = ratio if group == "lora_b" else 1.0
        # A starts off zero, so its change is a difference of rounded numbers of size <= 1
        np.testing.assert_allclose(
            ours[name], factor * plain[name], rtol=rtol, atol=2e-7, err_msg=name
        )
        assert np.abs(ours[name]).max() > 2e-6, f"{name} did not move"
    assert plus.optimizer.rates["lora_b"] == pytest.approx(
        ratio * plus.optimizer.rates["lora_a"], rel=1e-6
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lambda_holds_at_every_update_of_every_optimizer(optimizer: str, schedule: str):
    settings = {
        "optimizer": optimizer,
        "schedule": schedule,
        "warmup": 2,
        "embedding_learning_rate": 5e-4,
    }
    plus, lora = (Steps(plain_config(lr_ratio=ratio, **settings)) for ratio in (16.0, 1.0))
    for seed in range(STEPS):
        expect_ratio(plus, lora, seed, 16.0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_compiled_update_is_the_eager_one(optimizer: str):
    eager, compiled = (
        Steps(everything(optimizer), "q_proj", compiled=compiled) for compiled in (False, True)
    )
    for seed in range(STEPS):
        if seed == 3:  # a new rate reaches a step that was traced with the old one
            eager.optimizer.learning_rate = compiled.optimizer.learning_rate = 3e-3
        one, other = eager.take(seed), compiled.take(seed)
        assert eager.optimizer.rates == compiled.optimizer.rates
        assert compiled.optimizer.rates["lora_b"] == pytest.approx(
            16 * compiled.optimizer.rates["lora_a"], rel=1e-6
        )
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=3e-7, err_msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_setting_the_rate_moves_both_and_keeps_lambda(optimizer: str):
    settings = {"optimizer": optimizer, "schedule": "linear", "embedding_learning_rate": 5e-4}
    plus, lora, untouched = (
        Steps(plain_config(lr_ratio=ratio, **settings)) for ratio in (16.0, 1.0, 16.0)
    )
    assert plus.optimizer.learning_rate == pytest.approx(1e-3)
    for seed in range(STEPS):
        if seed == 2:
            plus.optimizer.learning_rate = lora.optimizer.learning_rate = 4e-3
            assert plus.optimizer.learning_rate == pytest.approx(4e-3)
        expect_ratio(plus, lora, seed, 16.0)
        before = untouched.optimizer
        untouched.take(seed)
        factor = 4.0 if seed >= 2 else 1.0  # the schedule goes on underneath
        for group in ("lora_a", "lora_b"):
            assert plus.optimizer.rates[group] == pytest.approx(
                factor * before.rates[group], rel=1e-6
            )
        assert plus.optimizer.rates["embedding"] == before.rates["embedding"]


@pytest.mark.parametrize("rate", [0.0, -1e-3, float("nan"), float("inf")])
def test_a_rate_that_is_no_rate_is_refused(rate: float):
    optimizer = LoRAPlus(plain_config(), total_steps=10)
    with pytest.raises(ConfigError, match="learning_rate must be above 0"):
        optimizer.learning_rate = rate
    assert optimizer.learning_rate == pytest.approx(1e-3)


def test_sgd_steps_are_the_rates_times_the_gradients():
    steps = Steps(
        plain_config(
            optimizer="sgd", lr_ratio=16.0, learning_rate=0.01, embedding_learning_rate=0.05
        )
    )
    gradients = dict(tree_flatten(random_like(steps.start, seed=0)))
    rates = {"lora_a": 0.01, "lora_b": 0.16, "embedding": 0.05}
    for name, change in steps.take(seed=0).items():
        expected = -rates[steps.groups[name]] * np.array(gradients[name])
        np.testing.assert_allclose(change, expected, rtol=1e-5, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "lion"])
def test_the_first_step_of_a_sign_like_rule_is_the_rate_itself(optimizer: str):
    """Adam with bias correction moves every entry by its rate at first; without, by 3.16 times that."""
    steps = Steps(plain_config(optimizer=optimizer, lr_ratio=16.0, embedding_learning_rate=5e-4))
    rates = {"lora_a": 1e-3, "lora_b": 16e-3, "embedding": 5e-4}
    for name, change in steps.take(seed=0).items():
        np.testing.assert_allclose(
            np.abs(change), rates[steps.groups[name]], rtol=1e-3, err_msg=name
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twice_the_rate_is_twice_the_step(optimizer: str):
    """Adafactor, left to itself, would ignore the rate."""
    once, twice = (
        Steps(plain_config(optimizer=optimizer, learning_rate=rate, embedding_learning_rate=rate))
        for rate in (1e-3, 2e-3)
    )
    short, long = once.take(seed=0), twice.take(seed=0)
    for name in short:
        np.testing.assert_allclose(long[name], 2 * short[name], rtol=1e-4, atol=4e-7, err_msg=name)


# --- schedule
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 2, [0.5, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ("cosine", 12, [1 / 12, 2 / 12, 3 / 12, 4 / 12, 5 / 12, 6 / 12]),
    ],
)
def test_rates_follow_the_schedule(schedule: str, warmup: int, expected: list[float]):
    config = plain_config(
        optimizer="sgd", schedule=schedule, warmup=warmup, embedding_learning_rate=7e-5
    )
    steps = Steps(config)
    seen = []
    for seed in range(STEPS):
        steps.take(seed)
        seen.append(steps.optimizer.rates)
    for group, peak in (("lora_a", 1e-3), ("lora_b", 16e-3), ("embedding", 7e-5)):
        np.testing.assert_allclose(
            [rates[group] for rates in seen], peak * np.array(expected), rtol=1e-5
        )


# --- decay and clipping
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adam"])
def test_decay_shrinks_a_and_b_by_the_rate_of_a_and_leaves_embeddings(optimizer: str):
    model, groups = attached(tiny_llama(layers=1), "q_proj", "embed_tokens")
    for name, value in dict(tree_flatten(random_like(trainables(model), seed=9))).items():
        model.update(tree_unflatten([(name, value)]))
    start = {name: np.array(value) for name, value in trainables(model).items()}
    config = plain_config(optimizer=optimizer, weight_decay=10.0, schedule="linear", warmup=2)
    plus = LoRAPlus(config, total_steps=4)
    plus.init(model, groups)
    zeros = tree_unflatten(
        [(name, mx.zeros_like(value)) for name, value in trainables(model).items()]
    )
    kept = 1.0
    for factor in (0.5, 1.0, 1.0, 0.5):
        plus.update(model, zeros)
        kept *= 1 - 1e-3 * factor * 10.0
    for name, value in trainables(model).items():
        expected = start[name] if groups[name] == "embedding" else kept * start[name]
        np.testing.assert_allclose(np.array(value), expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adam"])
def test_decay_is_decoupled(optimizer: str):
    """The step on top of the decay is the one without: moments and orthogonalization never see the weights."""
    plain, decayed = (
        Steps(plain_config(optimizer=optimizer, weight_decay=decay)) for decay in (0.0, 5.0)
    )
    for seed in range(3):
        without, with_decay = plain.take(seed), decayed.take(seed)
        for name, group in plain.groups.items():
            shrunk = 0.0 if group == "embedding" else 1e-3 * 5.0 * np.array(plain.start[name])
            np.testing.assert_allclose(
                with_decay[name], without[name] - shrunk, atol=3e-7, err_msg=name
            )


@pytest.mark.parametrize("limit", [0.0, 2.0, 1e6])
def test_clipping_acts_on_the_norm_of_all_gradients_together(limit: float):
    rates = {"lora_a": 0.01, "lora_b": 0.16, "embedding": 0.05}
    steps = Steps(
        plain_config(
            optimizer="sgd", learning_rate=0.01, embedding_learning_rate=0.05, max_grad_norm=limit
        ),
    )
    gradients = {n: np.array(g) for n, g in tree_flatten(random_like(steps.start, seed=0))}
    norm = float(np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in gradients.values())))
    assert norm > 10
    shrink = limit / norm if limit == 2.0 else 1.0
    for name, change in steps.take(seed=0).items():
        expected = -rates[steps.groups[name]] * shrink * gradients[name]
        np.testing.assert_allclose(change, expected, rtol=1e-4, atol=2e-7, err_msg=name)
    reported = steps.optimizer.update(steps.model, random_like(steps.start, seed=0))
    assert reported.item() == pytest.approx(norm, rel=1e-5)  # the norm before clipping


# --- state
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_run_goes_on_bit_for_bit(optimizer: str, compiled: bool, tmp_path: Path):
    def run(steps: Steps, seeds: range) -> None:
        for seed in seeds:
            steps.step(random_like(steps.start, seed))

    first, second = (Steps(everything(optimizer), "q_proj", compiled=compiled) for _ in range(2))
    run(first, range(3))
    first.optimizer.learning_rate = 2e-3
    mx.save_safetensors(str(tmp_path / "optimizer.safetensors"), first.optimizer.arrays())
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), trainables(first.model))
    run(first, range(3, STEPS))

    run(second, range(7, 9))  # other moments, another step, and a traced step: all must give way
    saved = mx.load(str(tmp_path / "optimizer.safetensors"))
    assert isinstance(saved, dict)
    second.optimizer.restore(saved)
    second.model.load_weights(str(tmp_path / "adapters.safetensors"), strict=False)
    assert second.optimizer.learning_rate == pytest.approx(2e-3)
    run(second, range(3, STEPS))
    assert equal_bits(trainables(first.model), trainables(second.model))
    assert equal_bits(first.optimizer.arrays(), second.optimizer.arrays())
    assert first.optimizer.rates == second.optimizer.rates
    assert second.optimizer.rates["lora_b"] == pytest.approx(
        16 * second.optimizer.rates["lora_a"], rel=1e-6
    )


def test_a_state_of_another_optimizer_is_refused():
    adam, sgd = (Steps(plain_config(optimizer=name)).optimizer for name in ("adamw", "sgd"))
    before = {name: mx.array(value) for name, value in adam.arrays().items()}
    rounded = before | {
        name: value.astype(mx.bfloat16) for name, value in before.items() if name.endswith(".m")
    }
    for other in (sgd.arrays(), rounded):
        with pytest.raises(ConfigError, match=r"belongs to another optimizer .* arrays, such as '"):
            adam.restore(other)
    assert equal_bits(before, adam.arrays())


# --- settings
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("optimizer", "lion"),
        ("learning_rate", 3e-4),
        ("lr_ratio", 2.0),
        ("magnitude_lr_ratio", 4.0),
        ("embedding_learning_rate", 1e-4),
        ("weight_decay", 0.1),
        ("schedule", "linear"),
        ("warmup", 3),
        ("max_grad_norm", 0.5),
    ],
)
def test_every_setting_changes_what_is_learned(setting: str, value: Any):
    finals = []
    default: dict[str, Any] = {"warmup": 2}
    for settings in (default, default | {setting: value}):
        steps = Steps(OptimizerConfig(**settings), adapter="dora")
        for seed in range(STEPS):
            steps.step(random_like(steps.start, seed))
        finals.append(trainables(steps.model))
    assert not equal_bits(*finals)


def test_every_setting_is_tried():
    marks = test_every_setting_changes_what_is_learned.pytestmark
    assert {case[0] for case in marks[0].args[1]} == {
        field.name for field in dataclasses.fields(OptimizerConfig)
    }


# --- default rates


@pytest.mark.parametrize(
    "settings",
    [{}, {"init": "init2"}, {"init": "pissa"}, {"adapter": "dora"}, {"adapter": "vera"}, {"adapter": "full"}],
)  # fmt: skip
def test_default_rates_are_those_of_a_run_with_these_adapters(settings: dict[str, Any]):
    model = tiny_llama(layers=1)
    groups = attach_adapters(model, AdapterConfig(**settings)).groups
    for given in ({}, {"lr_ratio": 1.0}, {"learning_rate": 3e-3}):
        expected = configure(TrainConfig, settings | given).optimizer
        optimizer = LoRAPlus(OptimizerConfig(**given), total_steps=STEPS)
        optimizer.init(model, groups)
        assert optimizer.learning_rate == pytest.approx(expected.learning_rate)
        assert optimizer.config == dataclasses.replace(expected, warmup=0)


def test_a_rate_that_was_set_before_init_stays():
    model = tiny_llama(layers=1)
    groups = attach_adapters(model, AdapterConfig(init="init2")).groups
    optimizer = LoRAPlus(OptimizerConfig(), total_steps=STEPS)
    optimizer.learning_rate = 7e-3
    optimizer.init(model, groups)
    assert optimizer.learning_rate == pytest.approx(7e-3)
