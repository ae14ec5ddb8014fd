"""How many steps and batches a run has, and how its rates rise and fall."""

import math
from dataclasses import dataclass
from fractions import Fraction

import mlx.core as mx
import numpy as np

from ..config import OptimizerConfig, TrainConfig


@dataclass(frozen=True)
class Schedule:
    """How long a run is.

    Attributes:
        steps: Optimizer steps.
        batches: Batches of all steps together.
        batches_per_step: Largest number of batches in a step.
    """

    steps: int
    batches: int
    batches_per_step: int


def schedule_of(config: TrainConfig, per_epoch: int) -> Schedule:
    """Return the schedule that iters or epochs define.

    With epochs, the last step may have fewer batches; it is not dropped.
    """
    per_step = config.grad_accumulation_steps
    if config.iters:
        batches = config.iters * per_step
    else:
        # As a fraction, 0.07 epochs are exactly 7/100.
        epochs = Fraction(config.epochs or 1).limit_denominator(10**6)
        batches = max(1, math.ceil(epochs * per_epoch))

    steps = math.ceil(batches / per_step)
    return Schedule(steps=steps, batches=batches, batches_per_step=per_step)


def batches_of_step(step: int, schedule: Schedule) -> range:
    """Return the numbers of the batches that make a step; steps count from 1, batches from 0."""
    return range(
        (step - 1) * schedule.batches_per_step,
        min(step * schedule.batches_per_step, schedule.batches),
    )


def seed_of(seed: int, step: int, shard_index: int) -> int:
    """Return the seed of a step's dropout; processes with different rows draw different masks."""
    sequence = np.random.SeedSequence([seed, step, shard_index])
    return int(sequence.generate_state(1, np.uint64)[0])


def rate_factor(config: OptimizerConfig, step: mx.array, total_steps: int) -> mx.array:
    """Return f(t), the fraction of the peak rate at a step: it rises from 0 to 1, and may fall.

    Args:
        config: The optimizer's settings: ``warmup`` and ``schedule``.
        step: The number of steps before this one, float32.
        total_steps: The step at which a falling schedule reaches 0.
    """
    warmup = config.warmup or 0
    rise = mx.minimum((step + 1) / max(warmup, 1), 1.0)
    if config.schedule == "constant":
        return rise
    done = mx.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
    fall = 1 - done if config.schedule == "linear" else 0.5 * (1 + mx.cos(math.pi * done))
    return rise * fall
