"""The optimizer against trainings with MLX's own: at ratio 1, and where lambda is a scale."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_loraplus.training.optimizer import LoRAPlus
from tests.training.tiny_models import (
    attached,
    equal_bits,
    plain_config,
    tiny_llama,
    trainables,
)


def next_token_step(
    model: nn.Module, update: Callable, loss_scale: float = 1.0
) -> Callable[[mx.array], mx.array]:
    """A training step on a batch of token ids (batch, seq)."""

    def loss(tokens: mx.array) -> mx.array:
        return loss_scale * nn.losses.cross_entropy(
            model(tokens[:, :-1]), tokens[:, 1:], reduction="mean"
        )

    loss_and_gradients = nn.value_and_grad(model, loss)

    def step(tokens: mx.array) -> mx.array:
        value, gradients = loss_and_gradients(tokens)
        update(model, gradients)
        return value

    return step


def batches(count: int) -> list[mx.array]:
    return [
        mx.random.randint(0, 20, (4, 9), key=mx.random.key(100 + index)) for index in range(count)
    ]


# --- against other trainings
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_ratio_one_is_lora_with_mlx_adamw_bit_for_bit(schedule: str, decay: float):
    ours, groups = attached(tiny_llama())
    plus = LoRAPlus(
        plain_config(lr_ratio=1.0, weight_decay=decay, schedule=schedule, warmup=3), total_steps=20
    )
    plus.init(ours, groups)
    plain, _ = attached(tiny_llama())
    adamw = optim.AdamW(
        1e-3, betas=[0.9, 0.999], eps=1e-8, weight_decay=decay, bias_correction=True
    )
    assert equal_bits(trainables(ours), trainables(plain))
    our_step, plain_step = next_token_step(ours, plus.update), next_token_step(plain, adamw.update)
    for tokens in batches(20):
        our_loss = our_step(tokens)
        adamw.learning_rate = plus.rates["lora_a"]
        assert our_loss.item() == plain_step(tokens).item()
    assert equal_bits(trainables(ours), trainables(plain))


@pytest.mark.parametrize(("optimizer", "ratio"), [("adamw", 16.0), ("adam", 5.0)])
def test_adam_at_rates_1_and_lambda_is_adam_at_lambda_times_the_scale(optimizer: str, ratio: float):
    """(eta, lambda eta, s) = (eta, eta, lambda s): B is lambda times larger in the first, A and the losses the same.

    Exact for B = 0 at the start, no decay, no clipping and eps → 0. The loss times 2²⁰ makes Adam's
    1e-8 small enough. With lambda = 16 every number of one run is the other's times a power of two:
    equal to the last bit. With lambda = 5 the roundings differ: losses by 2e-7 relative, entries by
    4e-7.
    """
    data, runs = batches(5) * 20, []
    for lr_ratio, alpha in ((ratio, 8.0), (1.0, 8.0 * ratio)):
        model, groups = attached(tiny_llama(), alpha=alpha)
        plus = LoRAPlus(plain_config(optimizer=optimizer, lr_ratio=lr_ratio), total_steps=100)
        plus.init(model, groups)
        step = next_token_step(model, plus.update, loss_scale=2.0**20)
        losses = [step(tokens).item() / 2**20 for tokens in data]
        runs.append((losses, {name: np.array(value) for name, value in trainables(model).items()}))
    (plus_losses, plus_final), (lora_losses, lora_final) = runs
    tolerance = 0 if ratio == 16 else 1e-5
    np.testing.assert_allclose(plus_losses, lora_losses, rtol=tolerance)
    for name, value in plus_final.items():
        factor = ratio if name.endswith("lora_b") else 1.0
        np.testing.assert_allclose(
            value, factor * lora_final[name], rtol=0, atol=tolerance, err_msg=name
        )
    assert plus_losses[-1] < 0.7 * plus_losses[0], "little was learned, so little was compared"
