"""Losses, rewards and gradients of A and B equal TRL's (made by scripts/judges/golden_preferences).

Reached on a Linux CPU: within 2e-6 relative.
"""

import json
from collections.abc import Sequence
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
from mlx_loraplus.kernels.log_probs import make_log_probs
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.training.kto import describe_labeled, make_kl_sum, make_labeled_loss
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


def row_of(prompt: list[int], answer: list[int]) -> list[Example]:
    """A prompt and an answer as a row of a batch."""
    tokens = np.array(prompt + answer, np.int32)
    return [Example(tokens, np.arange(len(tokens)) >= len(prompt))]


def with_reference(rows: list[list[Example]]) -> tuple[mx.array, ...]:
    """The arrays of a batch, with the reference of the model without its adapter."""
    arrays = arrays_of(lay_out(rows))
    base = start(with_adapter=False)
    reference, _ = make_log_probs(find_trunk_and_head(base), learning=False)(base, *arrays)
    return *arrays, reference


def batch_arrays(pairs: list[dict[str, list[int]]]) -> tuple[mx.array, ...]:
    """The arrays of a batch of pairs."""
    rows = []
    for pair in pairs:
        rows += [row_of(pair["prompt_ids"], pair[name]) for name in ("chosen_ids", "rejected_ids")]
    return with_reference(rows)


def compare_gradients(found: Any, case: dict[str, Any]) -> None:
    """Compare the gradients of all matrices with TRL's."""
    gradients = dict(tree_flatten(found))
    expected = {our_name(name): np.array(value).T for name, value in case["gradients"].items()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        error = np.abs(np.array(gradients[name]) - gradient).max() / np.abs(gradient).max()
        assert error < 1e-5, (name, error)


def rounding(log_probs: Sequence[float]) -> float:
    """The error of a reward: of the difference of two log-probabilities, each rounded in float32."""
    return 2 * float(np.spacing(np.float32(max(map(abs, log_probs)))))


def cases_of(*objectives: str) -> list[dict[str, Any]]:
    return [case for case in GOLDEN["cases"] if case["settings"]["objective"] in objectives]


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize(
    "case", cases_of("dpo", "ipo", "orpo", "simpo"), ids=lambda case: case["name"]
)
def test_losses_rewards_and_gradients_are_those_of_trl(case: dict[str, Any], sliced: bool):
    objective = ObjectiveConfig(**case["settings"])
    model = start()
    loss = make_pair_loss(find_trunk_and_head(model) if sliced else None, objective)

    # One pair at a time, as TRL had them.
    for pair, expected, rewards in zip(
        GOLDEN["pairs"], case["losses"], case["rewards"], strict=True
    ):
        value, sums = loss(model, *batch_arrays([pair]))
        assert value.item() == pytest.approx(expected, rel=1e-5)
        error = rounding(sums[3:5].tolist())
        assert sums[:2].tolist() == pytest.approx(rewards, rel=1e-5, abs=error)
        assert sums[2].item() == (rewards[0] > rewards[1])

    # All pairs in one batch, padded.
    (total, _), gradients = nn.value_and_grad(model, loss)(model, *batch_arrays(GOLDEN["pairs"]))
    assert total.item() == pytest.approx(sum(case["losses"]), rel=1e-5)
    compare_gradients(gradients, case)


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("case", cases_of("kto"), ids=lambda case: case["name"])
def test_labeled_answers_give_what_they_give_in_trl(case: dict[str, Any], sliced: bool):
    objective = ObjectiveConfig(**case["settings"])
    rows, model = GOLDEN["labeled"], start()
    trunk_and_head = find_trunk_and_head(model) if sliced else None

    # Each prompt with the answer of the row before gives the estimate of the KL.
    answers = [row["completion_ids"] for row in rows]
    prompts = [row["prompt_ids"] for row in rows]
    mismatched = with_reference(
        [row_of(*each) for each in zip(prompts, answers[-1:] + answers[:-1], strict=True)]
    )
    baseline = make_kl_sum(trunk_and_head)(model, *mismatched) / len(rows)
    assert baseline.item() == pytest.approx(case["kl"], rel=1e-5)

    # The losses are summed here, and averaged in TRL.
    batch = with_reference([row_of(*each) for each in zip(prompts, answers, strict=True)])
    padding = [0.0] * (batch[0].shape[0] - len(rows))
    labels = mx.array([float(row["label"]) for row in rows] + padding)
    loss = make_labeled_loss(trunk_and_head, objective)
    (total, sums), gradients = nn.value_and_grad(model, loss)(model, *batch, labels, baseline)
    assert total.item() / len(rows) == pytest.approx(case["losses"][0], rel=1e-5)
    found = describe_labeled(sums.tolist(), len(rows))
    error = rounding([found["logp_chosen"], found["logp_rejected"]])
    assert [found["rewards_chosen"], found["rewards_rejected"]] == pytest.approx(
        case["rewards"], rel=1e-5, abs=error
    )
    assert found["kl"] == pytest.approx(case["kl"], rel=1e-5)
    compare_gradients(gradients, case)
