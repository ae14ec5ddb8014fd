"""The objective over answers that are labeled desirable or undesirable: KTO.

With r = log pi(y) - log pi_ref(y), summed over an answer's supervised tokens, and the weights w_D
and w_U of ``kto_weights``, the loss of an answer is:

    desirable      w_D (1 - sigmoid(beta (r - z0)))
    undesirable    w_U (1 - sigmoid(beta (z0 - r)))
    z0 = max(0, mean of log pi(y') - log pi_ref(y'))        y' are mismatched answers

z0 estimates the KL divergence from the reference. It has no gradient. It is the mean over all
batches and processes of a step, so that a step does not depend on how its examples are divided;
TRL takes the mean of each batch. In validation it is the mean over all examples.

Sources: KTO arXiv 2402.01306, equations 7 and 8; TRL's KTOTrainer, which has the same loss of a
batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import ObjectiveConfig
from ..data.batches import Batch, arrays_of
from ..data.labeled import LabeledExamples
from ..kernels.choices import StepChoices
from ..kernels.log_probs import make_log_probs
from ..kernels.trunk_and_head import TrunkAndHead
from ..runs.state import Event
from .compiled import CompiledByShape, Traces
from .distributed import ALONE, World
from .preferences import BETA, SUMS, PreferenceScore, answer_log_probs

LABELED_SUMS = (*SUMS, "desirable", "kl")
"""What is summed over the examples besides the loss: ``SUMS``, with the desirable answers as the
chosen ones, then the number of desirable answers, and z0."""

_ARRAYS = 6
"""The number of arrays of a batch of labeled answers."""

LabeledLoss = Callable[..., tuple[mx.array, mx.array]]


def labeled_losses(
    objective: ObjectiveConfig, log_ratios: mx.array, labels: mx.array, baseline: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the loss and the reward of each answer, both (answers,).

    Args:
        objective: The objective and its settings.
        log_ratios: r, the log-probability less that of the reference, (answers,).
        labels: 1 for a desirable answer, else 0, (answers,).
        baseline: z0, a scalar.
    """
    beta = objective.beta or BETA["kto"]
    desirable, undesirable = objective.kto_weights

    # 1 - sigmoid(z) is sigmoid(-z).
    away = beta * (log_ratios - baseline)
    losses = mx.where(labels > 0, desirable * mx.sigmoid(-away), undesirable * mx.sigmoid(away))
    return losses, beta * log_ratios


def make_labeled_loss(
    trunk_and_head: TrunkAndHead | None,
    objective: ObjectiveConfig,
    choices: StepChoices | None = None,
) -> LabeledLoss:
    """Return ``loss(model, tokens, positions, targets, weights, reference, labels, baseline)``.

    ``loss`` returns the loss summed over the answers, a float32 scalar, and ``LABELED_SUMS``. Its
    arguments are those of ``Batch``; rows beyond the answers are empty. ``baseline`` is z0; without
    it, z0 is 0.

    Args:
        trunk_and_head: The model's trunk and head, or None.
        objective: The objective and its settings.
        choices: The size of the slices; by default that of the device.
    """
    log_probs = make_log_probs(trunk_and_head, choices)

    def loss(model: Any, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        *batch, reference, labels = arrays[:_ARRAYS]
        baseline = arrays[_ARRAYS] if len(arrays) > _ARRAYS else mx.array(0.0)
        sums, counts = log_probs(model, *batch)
        losses, rewards = labeled_losses(objective, sums - reference, labels, baseline)

        # Rows without an answer have no tokens, and count for nothing.
        is_answer = counts > 0
        stats = _sum_stats(objective, (sums, rewards, labels, baseline), is_answer)
        return mx.where(is_answer, losses, 0.0).sum(), mx.stop_gradient(stats)

    return loss


def _sum_stats(
    objective: ObjectiveConfig, found: tuple[mx.array, ...], is_answer: mx.array
) -> mx.array:
    """Return ``LABELED_SUMS``: (sums,) float32.

    Args:
        objective: The objective and its settings.
        found: log pi(y), the rewards and the labels, each (answers,), and z0.
        is_answer: Which of them count, (answers,).
    """
    sums, rewards, labels, baseline = found
    beta = objective.beta or BETA["kto"]
    good = is_answer & (labels > 0)
    bad = is_answer & (labels == 0)

    # A desirable answer should be above z0, an undesirable one below it.
    above = rewards > beta * baseline
    below = rewards < beta * baseline
    parts = [
        mx.where(good, rewards, 0.0),
        mx.where(bad, rewards, 0.0),
        (good & above) | (bad & below),
        mx.where(good, sums, 0.0),
        mx.where(bad, sums, 0.0),
        good,
        mx.where(is_answer, baseline, 0.0),
    ]
    return mx.stack([part.astype(mx.float32).sum() for part in parts])


def make_kl_sum(
    trunk_and_head: TrunkAndHead | None, choices: StepChoices | None = None
) -> Callable[..., mx.array]:
    """Return ``kl_sum(model, tokens, positions, targets, weights, reference)``.

    ``kl_sum`` returns the sum of log pi(y') - log pi_ref(y') over the mismatched answers of a
    batch, a float32 scalar. It has no gradient.
    """
    log_probs = make_log_probs(trunk_and_head, choices, learning=False)

    def kl_sum(model: Any, *arrays: mx.array) -> mx.array:
        *batch, reference = arrays
        sums, counts = log_probs(model, *batch)
        return mx.where(counts > 0, sums - reference, 0.0).sum()

    return kl_sum


class KLEstimate:
    """Estimates the KL divergence from the reference for a step, z0, if the objective is KTO.

    Args:
        model: The model that trains.
        trunk_and_head: The model's trunk and head, or None.
        choices: The size of the slices.
        objective: The objective.
        traces: What keeps the compiled forward passes; None to compute them eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        trunk_and_head: TrunkAndHead | None,
        choices: StepChoices,
        objective: ObjectiveConfig,
        traces: Traces | None,
    ):
        self.is_needed = objective.is_labeled
        kl_sum = make_kl_sum(trunk_and_head, choices)

        def measure(arrays: tuple[mx.array, ...]) -> mx.array:
            return kl_sum(model, *arrays)

        self.measure: Callable[[tuple[mx.array, ...]], mx.array] = measure
        if traces is not None:
            self.measure = CompiledByShape(measure, [model.state, mx.random.state], traces)

    def __call__(self, parts: Sequence[Batch], world: World) -> tuple[mx.array, ...]:
        """Return z0, from the mismatched answers of all processes; nothing if it is not needed."""
        if not self.is_needed:
            return ()

        total = mx.zeros(2)
        for part in parts:
            if part.mismatched is not None:
                kl = self.measure(arrays_of(part.mismatched))
                total = total + mx.stack([kl, mx.array(float(part.pairs))])
                world.compute(total)
        kl, count = world.sum_shards(total)
        return (mx.maximum(kl / count, 0.0),)

    def count_step(self, parts: Sequence[Batch]) -> tuple[mx.array, ...]:
        """Count the calls of an earlier session's step, and return 0 in place of z0.

        See ``CompiledByShape.count_call``.
        """
        if not self.is_needed:
            return ()

        for part in parts:
            if part.mismatched is not None and isinstance(self.measure, CompiledByShape):
                self.measure.count_call(arrays_of(part.mismatched))
        return (mx.array(0.0),)


def describe_labeled(sums: Sequence[float], examples: float, prefix: str = "") -> Event:
    """Return the means of ``LABELED_SUMS`` over the examples, by name.

    Means over the desirable or the undesirable answers are left out if there are no such answers.
    """
    totals = dict(zip(LABELED_SUMS, sums, strict=True))
    counts = {"chosen": totals["desirable"], "rejected": examples - totals["desirable"]}

    # The second word of a name says which answers it covers; reward_accuracy covers all.
    event: Event = {}
    for name in SUMS:
        _, _, kind = name.partition("_")
        count = counts.get(kind, examples)
        if count:
            event[name] = totals[name] / count
    if "rewards_chosen" in event and "rewards_rejected" in event:
        event["reward_margin"] = event["rewards_chosen"] - event["rewards_rejected"]
    event["kl"] = totals["kl"] / examples
    return {prefix + name: value for name, value in event.items()}


def score_labeled(
    model: nn.Module,
    trunk_and_head: TrunkAndHead | None,
    examples: LabeledExamples,
    batch_size: int,
    objective: ObjectiveConfig,
    world: World = ALONE,
    choices: StepChoices | None = None,
) -> PreferenceScore:
    """Score a model on all labeled answers, divided among the processes."""
    # Each process computes its part. The others' values are 0, so the sum joins the parts.
    columns = [
        answer_log_probs(model, trunk_and_head, answers, batch_size, world, choices)
        for answers in examples.both
    ]
    log_probs = world.sum_shards(mx.array(np.stack(columns, axis=1)))
    ratios = log_probs - mx.array(examples.reference)

    # The second column has the mismatched answers.
    labels = mx.array(examples.is_desirable.astype(np.float32))
    baseline = mx.maximum(ratios[:, 1].mean(), 0.0)
    losses, rewards = labeled_losses(objective, ratios[:, 0], labels, baseline)
    everything = mx.ones(len(examples), mx.bool_)
    sums = _sum_stats(objective, (log_probs[:, 0], rewards, labels, baseline), everything)
    stats: Any = sums.tolist()
    return PreferenceScore(float(np.array(losses.mean())), describe_labeled(stats, len(examples)))


def fraction_ranked_right(
    model: nn.Module,
    trunk_and_head: TrunkAndHead | None,
    examples: LabeledExamples,
    batch_size: int,
) -> float | None:
    """Return the fraction of pairs of a desirable and an undesirable answer that are ranked right.

    The desirable one should have the higher mean log-probability per token. Returns None if there
    are no such pairs.
    """
    means = answer_log_probs(model, trunk_and_head, examples, batch_size) / examples.target_counts
    good = means[examples.is_desirable]
    bad = np.sort(means[~examples.is_desirable])
    if not len(good) or not len(bad):
        return None
    return float(np.searchsorted(bad, good).sum() / (len(good) * len(bad)))
