"""Objectives that compare two answers to one prompt: DPO, IPO, ORPO and SimPO.

With y_w the chosen answer, y_l the rejected one, log pi(y) = log pi(y | x) summed over an answer's
supervised tokens, and |y| their number, the loss of a pair is:

    h     = [log pi(y_w) - log pi_ref(y_w)] - [log pi(y_l) - log pi_ref(y_l)]
    DPO     -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)  e is label_smoothing
    IPO     (h' - 1 / (2 beta))**2                                 h' is h of means over the tokens
    ORPO    -m_w - lambda log sigmoid(o(m_w) - o(m_l))             m = log pi(y) / |y|
            o(m) = m - log(1 - exp(m))
    SimPO   -log sigmoid(beta m_w - beta m_l - gamma)

The rewards that are reported are beta (log pi - log pi_ref) for DPO and IPO, lambda m for ORPO and
beta m for SimPO. These are TRL's conventions. IPO's paper sums over the tokens; its authors
confirmed the mean. The first term of ORPO is a mean over the tokens of each chosen answer, not over
those of all chosen answers as in TRL, so that a step does not depend on how its pairs are divided
into batches.

Sources: DPO arXiv 2305.18290, label smoothing from its authors' note on cDPO, IPO 2310.12036, ORPO
2403.07691, SimPO 2405.14734.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import ObjectiveConfig
from ..data.batches import arrays_of, lay_out, ordered_rows, trimmed
from ..data.dataset import Examples
from ..data.pairs import Pairs, pairs_in_order
from ..data.tokenize import Example
from ..device import on_gpu
from ..kernels.choices import StepChoices
from ..kernels.log_probs import make_log_probs
from ..kernels.trunk_and_head import TrunkAndHead, find_trunk_and_head
from ..models.derived_weights import start_inference
from ..runs.state import Event
from .distributed import ALONE, World

PairLoss = Callable[..., tuple[mx.array, mx.array]]

BETA = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "kto": 0.1}
GAMMA, LAMBDA = 1.0, 0.1
"""The defaults of ``simpo_gamma`` and ``orpo_lambda``."""

SUMS = ("rewards_chosen", "rewards_rejected", "reward_accuracy", "logp_chosen", "logp_rejected")
"""What is summed over the examples of every objective for preferences besides the loss."""
PAIR_SUMS = (*SUMS, "preferred")
"""What is summed over pairs; ``preferred``: the chosen answer has the higher mean log-probability
per token."""


def pair_losses(
    objective: ObjectiveConfig, log_probs: mx.array, counts: mx.array, reference: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the loss of each pair, (pairs,), and the rewards of its answers, (pairs, 2).

    Args:
        objective: The objective and its settings.
        log_probs: log pi(y) of the chosen and the rejected answers, (pairs, 2).
        counts: |y|, the number of their supervised tokens, (pairs, 2).
        reference: log pi_ref(y), (pairs, 2); ignored by ORPO and SimPO.
    """
    name = objective.objective
    beta = objective.beta or BETA.get(name, 1.0)
    means = log_probs / counts

    if name == "dpo":
        rewards = beta * (log_probs - reference)
        smoothing = objective.label_smoothing
        margin = rewards[:, 0] - rewards[:, 1]
        losses = -(1 - smoothing) * nn.log_sigmoid(margin) - smoothing * nn.log_sigmoid(-margin)
    elif name == "ipo":
        rewards = beta * (log_probs - reference)
        ratios = (log_probs - reference) / counts
        losses = mx.square(ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta))
    elif name == "orpo":
        weight = objective.orpo_lambda or LAMBDA
        rewards = weight * means
        odds = means - _log1mexp(means)
        losses = -means[:, 0] - weight * nn.log_sigmoid(odds[:, 0] - odds[:, 1])
    elif name == "simpo":
        gamma = GAMMA if objective.simpo_gamma is None else objective.simpo_gamma
        rewards = beta * means
        losses = -nn.log_sigmoid(rewards[:, 0] - rewards[:, 1] - gamma)
    else:
        raise ValueError(f"objective {name} does not compare pairs of answers")
    return losses, rewards


def _log1mexp(values: mx.array) -> mx.array:
    """Return log(1 - exp(values)) for negative values, exact for small and for large ones."""
    # An answer with probability 1 would have infinite odds.
    values = mx.minimum(values, -1e-7)
    is_small = values > -0.6931472  # -log 2

    # Each branch gets values for which its gradient is finite.
    near = mx.log(-mx.expm1(mx.where(is_small, values, -1.0)))
    far = mx.log1p(-mx.exp(mx.where(is_small, -1.0, values)))
    return mx.where(is_small, near, far)


def make_pair_loss(
    trunk_and_head: TrunkAndHead | None,
    objective: ObjectiveConfig,
    choices: StepChoices | None = None,
    *,
    learning: bool = True,
) -> PairLoss:
    """Return ``loss(model, tokens, positions, targets, weights, reference)`` for batches of pairs.

    ``loss`` returns the loss summed over the pairs, a float32 scalar, and ``PAIR_SUMS``. Its
    arguments are those of ``Batch``; rows beyond the pairs are empty.

    Args:
        trunk_and_head: The model's trunk and head, or None.
        objective: The objective and its settings.
        choices: The size of the slices; by default that of the device.
        learning: Whether the loss needs a gradient.
    """
    log_probs = make_log_probs(trunk_and_head, choices, learning=learning)

    def loss(model: Any, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        *batch, reference = arrays
        sums, counts = log_probs(model, *batch)

        # Reshape to (pairs, 2). Rows without an answer have no tokens, and are ignored.
        sums = sums.reshape(-1, 2)
        counts = counts.reshape(-1, 2)
        reference = reference.reshape(-1, 2)
        is_pair = counts[:, 0] > 0
        counts = mx.maximum(counts, 1.0)
        losses, rewards = pair_losses(objective, sums, counts, reference)
        losses = mx.where(is_pair, losses, 0.0)
        rewards = mx.where(is_pair[:, None], rewards, 0.0)

        # The statistics, in the order of ``PAIR_SUMS``.
        is_right = rewards[:, 0] > rewards[:, 1]
        means = sums / counts
        is_preferred = means[:, 0] > means[:, 1]
        parts = [*rewards.sum(axis=0), is_right.sum(), *sums.sum(axis=0), is_preferred.sum()]
        stats = mx.stack([part.astype(mx.float32) for part in parts])
        return losses.sum(), mx.stop_gradient(stats)

    return loss


def describe_pairs(sums: Sequence[float], pairs: float, prefix: str = "") -> Event:
    """Return the means of ``PAIR_SUMS`` over the pairs, and the margin, by name."""
    means = {name: total / pairs for name, total in zip(PAIR_SUMS, sums, strict=True)}
    means["reward_margin"] = means["rewards_chosen"] - means["rewards_rejected"]
    return {prefix + name: value for name, value in means.items()}


@dataclass(frozen=True)
class PreferenceScore:
    """How well a model prefers the chosen or desirable answers.

    Attributes:
        loss: Mean of the objective per pair or labeled answer.
        stats: Other means, by name.
    """

    loss: float
    stats: dict[str, float]


def score_pairs(
    model: nn.Module,
    trunk_and_head: TrunkAndHead | None,
    pairs: Pairs,
    batch_size: int,
    objective: ObjectiveConfig,
    world: World = ALONE,
    choices: StepChoices | None = None,
) -> PreferenceScore:
    """Score a model on all pairs, shared among the processes."""
    start_inference(model)
    loss_of = make_pair_loss(trunk_and_head, objective, choices, learning=False)
    total = mx.zeros(1 + len(PAIR_SUMS))
    size = math.ceil(batch_size / world.data_shards)
    for batch in pairs_in_order(pairs, size, world.row_slice):
        loss, sums = loss_of(model, *arrays_of(batch if on_gpu() else trimmed(batch)))
        total = total + mx.concatenate([loss[None], sums])
        world.compute(total)
    summed, *stats = world.sum_shards(total).tolist()
    return PreferenceScore(summed / len(pairs), describe_pairs(stats, len(pairs)))


def answer_log_probs(
    model: nn.Module,
    trunk_and_head: TrunkAndHead | None,
    answers: Examples,
    batch_size: int,
    world: World = ALONE,
    choices: StepChoices | None = None,
) -> np.ndarray:
    """Return log pi(y) of this process's part of the answers, (answers,) float32; others are 0.

    ``choices`` give the size of the slices; by default that of the device.
    """
    start_inference(model)
    log_probs = make_log_probs(trunk_and_head, choices, learning=False)
    found = np.zeros(len(answers), np.float32)
    size = math.ceil(batch_size / world.data_shards)
    for members, length, targets in ordered_rows(answers, size, world.row_slice):
        filled = [[answers[int(index)]] for index in members]
        empty: list[list[Example]] = [[]] * (size - len(filled))
        batch = lay_out([*filled, *empty], length, targets)
        sums, _ = log_probs(model, *arrays_of(batch if on_gpu() else trimmed(batch)))
        world.compute(sums)
        found[members] = np.array(sums)[: len(members)]
    return found


def fraction_preferred(model: nn.Module, pairs: Pairs, batch_size: int) -> float:
    """Return the fraction of pairs whose chosen answer has the higher mean log-probability.

    The mean is that of an answer's supervised tokens.
    """
    trunk_and_head = find_trunk_and_head(model)
    chosen = (
        answer_log_probs(model, trunk_and_head, pairs.chosen, batch_size)
        / pairs.chosen.target_counts
    )
    rejected = (
        answer_log_probs(model, trunk_and_head, pairs.rejected, batch_size)
        / pairs.rejected.target_counts
    )
    return float((chosen > rejected).mean())
