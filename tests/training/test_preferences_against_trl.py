"""Losses, rewards and gradients of A and B equal TRL's (made by scripts/judges/golden_preferences).

Reached on a Linux CPU: within 2e-6 relative.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig, ObjectiveConfig
from mlx_loraplus.data.batches import arrays_of, lay_out
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.kernels.head import split_model
from mlx_loraplus.kernels.log_probs import make_log_probs
from mlx_loraplus.training.preferences import make_pair_loss

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "preferences.json").read_text())
TARGETS = ("q_proj", "v_proj", "down_proj")


def start(*, with_adapter: bool = True) -> nn.Module:
    """The tiny Llama at the stored weights, with its adapter or without."""
    model = llama.Model(llama.ModelArgs(model_type="llama", **GOLDEN["sizes"]))
    weights = {name: mx.array(value) for name, value in GOLDEN["weights"].items()}
    base = {name: value for name, value in weights.items() if "lora_" not in name}
    if not with_adapter:
        model.load_weights(list(base.items()), strict=True)
        return model

    model.load_weights(list(base.items()), strict=True)
    config = AdapterConfig(rank=GOLDEN["rank"], alpha=GOLDEN["alpha"], target_modules=TARGETS)
    attach_adapters(model, config)
    model.load_weights(
        [(our_name(name), value.T) for name, value in weights.items() if "lora_" in name],
        strict=False,
    )
    return model


def our_name(name: str) -> str:
    """The name here of a matrix that PEFT stores transposed."""
    return name.removesuffix(".weight").replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def rows_of(pair: dict[str, list[int]]) -> list[list[Example]]:
    """The two answers of a pair as rows of a batch."""
    rows = []
    for name in ("chosen_ids", "rejected_ids"):
        tokens = np.array(pair["prompt_ids"] + pair[name], np.int32)
        supervised = np.arange(len(tokens)) >= len(pair["prompt_ids"])
        rows.append([Example(tokens, supervised)])
    return rows


def batch_arrays(pairs: list[dict[str, list[int]]]) -> tuple[mx.array, ...]:
    """The arrays of a batch of pairs, with the reference of the model without its adapter."""
    arrays = arrays_of(lay_out([row for pair in pairs for row in rows_of(pair)]))
    base = start(with_adapter=False)
    reference, _ = make_log_probs(split_model(base), learning=False)(base, *arrays)
    return *arrays, reference


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_losses_rewards_and_gradients_are_those_of_trl(case: dict[str, Any], sliced: bool):
    objective = ObjectiveConfig(**case["settings"])
    model = start()
    loss = make_pair_loss(split_model(model) if sliced else None, objective)

    # One pair at a time, as TRL had them.
    for pair, expected, rewards in zip(
        GOLDEN["pairs"], case["losses"], case["rewards"], strict=True
    ):
        value, sums = loss(model, *batch_arrays([pair]))
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert sums[:2].tolist() == pytest.approx(rewards, rel=1e-5, abs=1e-6)
        assert sums[2].item() == (rewards[0] > rewards[1])

    # All pairs in one batch, padded.
    (total, _), gradients = nn.value_and_grad(model, loss)(model, *batch_arrays(GOLDEN["pairs"]))
    assert total.item() == pytest.approx(sum(case["losses"]), rel=1e-5)
    found = dict(tree_flatten(gradients))
    expected = {our_name(name): np.array(value).T for name, value in case["gradients"].items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = np.abs(np.array(found[name]) - gradient).max() / np.abs(gradient).max()
        assert error < 1e-5, (name, error)
