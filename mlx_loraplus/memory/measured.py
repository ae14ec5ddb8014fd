"""What a step of a run took on this machine, which corrects the memory plan."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MeasuredStep:
    """What a step of a run's largest batch took.

    Attributes:
        rows: Rows of the batch.
        length: Tokens of its rows.
        grad_checkpoint: Whether blocks were checkpointed.
        seconds: Time of the step.
        peak: Bytes of MLX's arrays at the peak.
    """

    rows: int
    length: int
    grad_checkpoint: bool
    seconds: float
    peak: int
