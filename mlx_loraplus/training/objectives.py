"""The loss of every objective, what is summed with it, and the score of a split."""

from collections.abc import Sequence

import mlx.nn as nn

from ..config import ObjectiveConfig
from ..data.labeled import LabeledExamples
from ..data.pairs import ComparedExamples, Pairs
from ..kernels.choices import StepChoices
from ..kernels.cross_entropy import Loss, make_loss
from ..kernels.trunk_and_head import TrunkAndHead
from ..runs.state import Event
from .distributed import ALONE, World
from .kto import LABELED_SUMS, LabeledLoss, describe_labeled, make_labeled_loss, score_labeled
from .preferences import (
    PAIR_SUMS,
    PairLoss,
    PreferenceScore,
    describe_pairs,
    make_pair_loss,
    score_pairs,
)


def make_objective(
    trunk_and_head: TrunkAndHead | None,
    objective: ObjectiveConfig,
    choices: StepChoices | None = None,
) -> Loss | PairLoss | LabeledLoss:
    """Return the loss of an objective."""
    if objective.is_paired:
        return make_pair_loss(trunk_and_head, objective, choices)
    if objective.is_labeled:
        return make_labeled_loss(trunk_and_head, objective, choices)
    return make_loss(trunk_and_head, choices)


def summed_stats(objective: ObjectiveConfig) -> tuple[str, ...]:
    """Return the names of what an objective's loss returns besides the loss."""
    if objective.is_paired:
        return PAIR_SUMS
    return LABELED_SUMS if objective.is_labeled else ()


def describe_stats(objective: ObjectiveConfig, sums: Sequence[float], examples: float) -> Event:
    """Return the means of an objective's sums over its pairs or answers, by name."""
    if objective.is_paired:
        return describe_pairs(sums, examples)
    return describe_labeled(sums, examples)


def score_preferences(
    model: nn.Module,
    trunk_and_head: TrunkAndHead | None,
    examples: ComparedExamples,
    batch_size: int,
    objective: ObjectiveConfig,
    world: World = ALONE,
    choices: StepChoices | None = None,
) -> PreferenceScore:
    """Score a model on all pairs or labeled answers of a split, shared among the processes.

    ``choices`` give the size of the slices; by default that of the device.
    """
    if isinstance(examples, LabeledExamples):
        return score_labeled(model, trunk_and_head, examples, batch_size, objective, world, choices)
    if isinstance(examples, Pairs):
        return score_pairs(model, trunk_and_head, examples, batch_size, objective, world, choices)
    raise TypeError(f"no preferences: {type(examples).__name__}")
