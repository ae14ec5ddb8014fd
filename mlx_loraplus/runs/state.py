"""How far a run has come, and the events that it reports."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config import TrainConfig

Event = dict[str, Any]
"""One line of history.jsonl."""
BAD_BATCH = "not_finite.json"
"""The file that holds a batch whose loss or gradient was not finite."""

Outcome = Literal["finished", "stopped early", "interrupted", "out of time", "failed"]
COMPLETE = ("finished", "stopped early")
"""The outcomes after which there is nothing to resume."""


@dataclass(frozen=True)
class StepStats:
    """One step, for the next report."""

    loss: float  # summed over all supervised tokens, in nats, or over all pairs of answers
    norm: float  # of the gradients, before clipping
    supervised: int  # tokens
    useful: int  # tokens that are not padding
    padded: int  # tokens with padding
    seconds: float
    pairs: int = 0  # of answers
    pair_sums: tuple[float, ...] = ()  # the statistics of the pairs, summed


@dataclass
class Progress:
    """The progress of a run. Together with its arrays, it is all that an exact resume needs."""

    step: int = 0
    window: list[StepStats] = field(default_factory=list)
    """Steps since the last report."""
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0
    """Validations since the best one."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    owes_validation: bool = False
    """Whether the validation after the last step is still to be made."""
    seconds: float = 0.0
    """Time spent in steps, over all sessions."""

    @property
    def took_effect(self) -> bool:
        """Whether a step has changed the model, or none was made yet."""
        return self.skipped < self.step or self.step == 0

    @property
    def mostly_skipped(self) -> bool:
        """Whether more than half of the steps were skipped. Such a run fails at its end."""
        return 2 * self.skipped > self.step

    @property
    def suspects_rate(self) -> bool:
        """Whether the steps were finite up to one, and skipped from there on.

        A rate that is too high spoils all steps from one on, but never the first step. If a step
        after a skipped one is finite, the model is not spoiled, but some rows are.
        """
        return 0 < self.skipped == self.skipped_in_a_row < self.step

    def validated(self, loss: float) -> bool:
        """Record a validation, and return whether it is the best so far."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss, self.stale = self.step, loss, 0
            return True

        self.stale += 1
        return False

    def ended(self, steps: int, config: TrainConfig) -> Outcome | None:
        """Return the outcome if training is complete, else None.

        Args:
            steps: The planned number of steps.
            config: The run's settings.
        """
        if self.step >= steps:
            return "finished"
        if config.patience is not None and self.stale >= config.patience:
            return "stopped early"
        return None


def progress_of(history: Sequence[Event]) -> Progress:
    """Return how far a run has come by its history, which lacks the state inside a session."""
    # The last event has the steps made. Count the skipped ones, and those in a row before it.
    last = history[-1]
    skipped = [event["step"] for event in history if "skipped" in event]
    in_a_row = 0
    while in_a_row < len(skipped) and skipped[-1 - in_a_row] == last["step"] - in_a_row:
        in_a_row += 1

    return Progress(
        last["step"],
        best_step=last.get("best_step"),
        best_loss=last.get("best_loss"),
        skipped=len(skipped),
        skipped_in_a_row=in_a_row,
        seconds=_seconds_in_steps(history),
    )


def _seconds_in_steps(history: Sequence[Event]) -> float:
    """Return the time that the steps of a history have taken."""
    last, reports = history[-1], [event for event in history if "loss" in event]
    if "outcome" in last or not reports:
        return last.get("seconds", 0.0)

    # The steps since the last report were about as fast.
    seconds = sum(report["seconds"] for report in reports)
    return seconds * last["step"] / reports[-1]["step"]
