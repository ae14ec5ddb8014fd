"""What the phases of a run share: the run, its examples, its checkpoint, processes and outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import TrainConfig
from ..data.dataset import Examples
from ..data.sources import SplitName
from ..runs.history import Run
from ..runs.progress import Callback, Log
from ..runs.state import Event
from .checkpoint import Checkpoint
from .distributed import World


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
    def config(self) -> TrainConfig:
        """The run's settings."""
        return self.run.config

    def show(self, event: Event) -> None:
        """Pass an event to the callbacks."""
        for callback in self.callbacks:
            callback(self.run, event)
