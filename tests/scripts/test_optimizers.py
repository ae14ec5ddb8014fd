"""The optimizers that are tried in scripts/study/run: what they change does not depend on how a product is split."""

from scripts.study.optimizers import Riemannian, Rite  # isort: skip  before mlx

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from tests.conftest import randomize_adapters
from tests.training.tiny_models import attached, plain_config, tiny_llama, trainables


def product_after(rule, split: mx.array, steps: int = 2) -> np.ndarray:
    """Return A B of one adapter after steps by gradients of a fixed target, from A R and R⁻¹ B with R = split."""
    model, groups = attached(tiny_llama(), "q_proj")
    randomize_adapters(model)
    arrays = trainables(model)
    (a, b), *_ = ((n, n[:-1] + "b") for n in arrays if n.endswith("lora_a"))
    model.update(
        tree_unflatten(
            [(a, arrays[a] @ split), (b, mx.linalg.inv(split, stream=mx.cpu) @ arrays[b])]
        )
    )
    optimizer = rule(plain_config(learning_rate=1e-2, lr_ratio=1.0), total_steps=max(1, steps))
    optimizer.init(model, groups)
    goal = mx.random.normal((arrays[a].shape[0], arrays[b].shape[1]), key=mx.random.key(5))
    for _ in range(steps):
        now = trainables(model)
        slope = now[a] @ now[b] - goal
        gradients = {n: mx.zeros_like(p) for n, p in now.items()} | {
            a: slope @ now[b].T,
            b: now[a].T @ slope,
        }
        optimizer.update(model, tree_unflatten(list(gradients.items())))
    now = trainables(model)
    return np.array(now[a] @ now[b])


def test_rite_does_not_feel_how_the_product_is_split():
    split = mx.random.normal((4, 4), key=mx.random.key(3)) + 2 * mx.eye(4)
    plain, other = product_after(Rite, mx.eye(4)), product_after(Rite, split)
    assert np.abs(plain - product_after(Rite, mx.eye(4), steps=0)).max() > 1e-3
    np.testing.assert_allclose(plain, other, atol=2e-3 * np.abs(plain).max())


@pytest.mark.parametrize("rule", [Riemannian, Rite])
def test_they_start_from_b_zero(rule):
    model, groups = attached(tiny_llama(), "q_proj")
    optimizer = rule(plain_config(lr_ratio=1.0), total_steps=3)
    optimizer.init(model, groups)
    for seed in range(3):
        arrays = trainables(model)
        keys = mx.random.split(mx.random.key(seed), len(arrays))
        gradients = {
            n: mx.random.normal(p.shape, key=key)
            for (n, p), key in zip(arrays.items(), keys, strict=True)
        }
        optimizer.update(model, tree_unflatten(list(gradients.items())))
    assert all(mx.isfinite(array).all().item() for array in trainables(model).values())
    assert all(mx.abs(array).max().item() > 0 for array in trainables(model).values())
