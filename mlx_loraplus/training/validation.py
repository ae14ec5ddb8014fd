"""The loss and the accuracy of a model on examples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..config import ObjectiveConfig
from ..data.batches import arrays_of, in_order, trimmed
from ..data.pairs import ComparedExamples
from ..data.tokenize import Example
from ..device import on_gpu
from ..kernels.choices import StepChoices
from ..kernels.cross_entropy import make_score
from ..kernels.trunk_and_head import TrunkAndHead
from ..models.derived_weights import start_inference
from ..runs.state import Event
from .distributed import ALONE, World
from .objectives import score_preferences


@dataclass(frozen=True)
class EvalResult:
    """How well a model predicts the supervised tokens.

    Attributes:
        loss: Mean per token, in nats.
        accuracy: Fraction of the tokens that the model ranks first.
    """

    loss: float
    accuracy: float


def score(
    model: nn.Module,
    trunk_and_head: TrunkAndHead | None,
    examples: Sequence[Example],
    batch_size: int,
    world: World = ALONE,
    choices: StepChoices | None = None,
) -> EvalResult:
    """Score a model on all supervised tokens of ``examples``, shared among the processes.

    ``choices`` give the size of the slices; by default that of the device.
    """
    start_inference(model)
    score_batch = make_score(trunk_and_head, choices)
    size = math.ceil(batch_size / world.data_shards)

    # Sum the loss, the correct tokens and all tokens over this process's batches.
    total, tokens = mx.zeros(2), 0
    for batch in in_order(examples, size, world.row_slice):
        arrays = arrays_of(batch if on_gpu() else trimmed(batch))
        total = total + score_batch(model, *arrays)
        world.compute(total)
        tokens += batch.target_count

    # Sum over the processes.
    sums = mx.concatenate([total, mx.array([float(tokens)])])
    loss, right, tokens = world.sum_shards(sums).tolist()
    return EvalResult(loss / tokens, right / tokens)


def validate(
    model: nn.Module,
    trunk_and_head: TrunkAndHead | None,
    examples: Sequence[Example],
    batch_size: int,
    objective: ObjectiveConfig,
    world: World,
    choices: StepChoices,
) -> tuple[float, Event]:
    """Return the loss of an objective on validation examples, and all scores by name."""
    if isinstance(examples, ComparedExamples):
        ranked = score_preferences(
            model, trunk_and_head, examples, batch_size, objective, world, choices
        )
        scores = {f"valid_{name}": value for name, value in ranked.stats.items()}
        return ranked.loss, {"valid_loss": ranked.loss, **scores}

    found = score(model, trunk_and_head, examples, batch_size, world, choices)
    return found.loss, {"valid_loss": found.loss, "valid_accuracy": found.accuracy}
