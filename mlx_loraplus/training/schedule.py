"""How many steps and batches a run has."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """How long a run is.

    Attributes:
        steps: Optimizer steps.
        batches: Batches of all steps together.
        window: Largest number of batches in a step.
    """

    steps: int
    batches: int
    window: int


def schedule_of(config: TrainConfig, per_epoch: int) -> Schedule:
    """Return the schedule that iters or epochs define.

    With epochs, the last window may be short; it is not dropped.
    """
    window = config.grad_accumulation_steps
    epochs = Fraction(config.epochs or 1).limit_denominator(10**6)  # 0.07 is exactly 7/100
    batches = config.iters * window if config.iters else max(1, math.ceil(epochs * per_epoch))
    return Schedule(steps=-(-batches // window), batches=batches, window=window)


def window_of(step: int, schedule: Schedule) -> range:
    """Return the numbers of the batches that make a step; steps count from 1, batches from 0."""
    return range((step - 1) * schedule.window, min(step * schedule.window, schedule.batches))


def seed_of(seed: int, step: int, part: int) -> int:
    """Return the seed of a step's dropout; processes with different rows draw different masks."""
    return int(np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0])
