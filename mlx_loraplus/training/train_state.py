"""What the phases of a run share: its session, and the state that training changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import RunConfig
from ..data.batches import Batches
from ..data.dataset import Examples
from ..data.sources import SplitName
from ..kernels.head import TrunkAndHead
from ..runs.history import Run
from ..runs.progress import Callback, Log
from ..runs.state import Event, Progress
from .checkpoint import Checkpoint
from .distributed import World
from .optimizer import LoRAPlus
from .probes import ModelProbes
from .trainer import Schedule


@dataclass(frozen=True)
class Session:
    """One process's session of a run, from its start or resume to its end.

    Attributes:
        run: The run, whose history grows. Its folder is locked by the main process.
        tokenizer: The model's tokenizer.
        examples: The training and validation examples.
        checkpoint: The checkpoint to resume from, or None.
        world: The processes that train together.
        log: Called with each line to show.
        callbacks: Called with the run and each of its events.
    """

    run: Run
    tokenizer: TokenizerWrapper
    examples: Mapping[SplitName, Examples]
    checkpoint: Checkpoint | None
    world: World
    log: Log
    callbacks: Sequence[Callback]

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self.run.config

    def show(self, event: Event) -> None:
        """Pass an event to the callbacks."""
        for callback in self.callbacks:
            callback(self.run, event)


@dataclass(frozen=True)
class TrainState:
    """What the training loop works on. The loop updates the model, optimizer and progress in place.

    Random numbers need no state: every step seeds them from the run's seed and the step's number.

    Attributes:
        model: The model with its adapters.
        optimizer: The optimizer with its state.
        progress: How far the run has come.
        batches: The training batches.
        schedule: The number of steps and batches.
        split: The model's trunk and head, or None.
        probes: What was found out about the model.
        grad_checkpoint: Whether blocks are checkpointed.
    """

    model: nn.Module
    optimizer: LoRAPlus
    progress: Progress
    batches: Batches
    schedule: Schedule
    split: TrunkAndHead | None
    probes: ModelProbes
    grad_checkpoint: bool
