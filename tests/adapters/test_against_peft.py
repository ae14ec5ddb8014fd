"""Every adapter's outputs, gradients and ten LoRA+ steps, and LoftQ's loop, equal PEFT's.

The golden values come from scripts/judges/golden_peft.

Reached on a Linux CPU: outputs within 1e-6, gradients 2e-6, losses 6e-6 of their size, entries of A
and B 8e-7.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.init import loftq
from mlx_loraplus.adapters.lora import LoRA
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.adapters.vera import VeRALinear
from mlx_loraplus.config import AdapterConfig, OptimizerConfig
from mlx_loraplus.training.optimizer import LoRAPlus

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "adapters.json").read_text())
BASE = {name: mx.array(array) for name, array in GOLDEN["base"].items()}
X, Y = mx.array(GOLDEN["x"]), mx.array(GOLDEN["y"])  # (step, batch, in), (step, batch, out)
SETTINGS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"adapter": "dora"},
    "pissa": {"init": "pissa", "svd": "exact"},
    "vera": {"adapter": "vera"},
}
LIKE = {"rtol": 1e-5, "atol": 1e-5}


class Network(nn.Module):
    """down(tanh(up(x)))."""

    layers = ()  # no blocks: the targets are named in full

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 7)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(mx.tanh(self.up(x)))


def attached(name: str) -> tuple[Network, dict[str, str]]:
    model = Network()
    model.load_weights(list(BASE.items()))
    settings = SETTINGS[name] if name == "vera" else {"alpha": GOLDEN["alpha"], **SETTINGS[name]}
    config = AdapterConfig(rank=GOLDEN["rank"], target_modules=("up", "down"), **settings)
    return model, dict(attach_adapters(model, config).groups)


def start(name: str) -> tuple[Network, dict[str, str]]:
    """The network with PEFT's start."""
    model, groups = attached(name)
    golden = {key: mx.array(array) for key, array in GOLDEN["adapters"][name]["start"].items()}
    shapes = {key: array.shape for key, array in tree_flatten(model.trainable_parameters())}

    assert shapes == {key: array.shape for key, array in golden.items()}

    model.update(tree_unflatten(list(golden.items())))
    for adapter in find_adapters(model).values():
        if isinstance(adapter, LoRA) and name == "pissa":
            adapter.subtract_start()
        if isinstance(adapter, VeRALinear):
            first, second = (mx.array(side) for side in GOLDEN["adapters"]["vera"]["projections"])
            assert [side.shape for side in adapter.projections] == [first.shape, second.shape]
            adapter._projections = (first, second)
    return model, groups


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_gradients_and_ten_steps_equal_pefts(name: str):
    golden = GOLDEN["adapters"][name]
    model, groups = start(name)
    np.testing.assert_allclose(np.array(model(X[0])), golden["outputs"], **LIKE)
    ratio = GOLDEN["lr_ratio"]
    optimizer = LoRAPlus(
        OptimizerConfig(
            learning_rate=GOLDEN["learning_rate"], lr_ratio=ratio, magnitude_lr_ratio=ratio, schedule="constant",
            warmup=0, max_grad_norm=0,
        ),
        total_steps=len(X),
    )  # fmt: skip
    optimizer.init(model, groups)
    loss_and_gradients = nn.value_and_grad(model, lambda x, y: nn.losses.mse_loss(model(x), y))
    losses = []
    for x, y in zip(X, Y, strict=True):
        loss, gradients = loss_and_gradients(x, y)
        if not losses:
            for key, gradient in tree_flatten(gradients):
                np.testing.assert_allclose(
                    np.array(gradient), golden["gradients"][key], **LIKE, err_msg=key
                )
        optimizer.update(model, gradients)
        losses.append(loss.item())
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-5)
    for key, array in tree_flatten(model.trainable_parameters()):
        np.testing.assert_allclose(np.array(array), golden["final"][key], **LIKE, err_msg=key)
        assert np.abs(np.array(array) - np.array(golden["start"][key])).max() > 2e-3, (
            f"{key} did not move"
        )


def test_pissa_starts_where_pefts_does():
    ours, _ = attached("pissa")
    theirs, _ = start("pissa")
    for path, adapter in find_adapters(ours).items():
        other = find_adapters(theirs)[path]
        for half in ("lora_a", "lora_b"):  # the sign of a singular vector is arbitrary
            np.testing.assert_allclose(
                np.abs(np.array(adapter[half])), np.abs(np.array(other[half])), **LIKE
            )
        np.testing.assert_allclose(
            np.array(adapter.lora_a @ adapter.lora_b), np.array(other.lora_a @ other.lora_b), **LIKE
        )


@pytest.mark.parametrize("case", GOLDEN["loftq"]["runs"], ids=lambda case: f"{case['iters']}-turns")
def test_loftqs_loop_equals_pefts(case: dict):
    weight = mx.array(GOLDEN["loftq"]["weight"])

    def round_to_four_levels(weight: mx.array) -> mx.array:
        low, high = weight.min(axis=1, keepdims=True), weight.max(axis=1, keepdims=True)
        step = (high - low) / 3
        return low + mx.round((weight - low) / step) * step

    rest, left, right = loftq(
        weight, GOLDEN["rank"], case["iters"], round_to_four_levels, exact=True
    )
    np.testing.assert_allclose(np.array(round_to_four_levels(rest)), case["quantized"], **LIKE)
    np.testing.assert_allclose(np.array(left @ right), case["low_rank"], **LIKE)
