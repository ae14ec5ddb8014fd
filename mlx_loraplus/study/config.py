"""The settings of a sweep, as config.py has those of a run."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from tyro.conf import OmitArgPrefixes

from ..config import AdapterConfig, Count, DataConfig, OptimizerConfig, Positive, RunConfig, UserPath
from ..settings import configure, setting_names, settings_of


@dataclass(frozen=True)
class SweepConfig:
    """A search for the rates that suit this model and these rows: many short runs, then a few whole ones.

    learning_rate, lr_ratio, rank and alpha are what it has to beat; every other setting is that of the runs.
    """

    model: UserPath = "gemma-3"
    """A name from mlx_loraplus.train --list-models, a hub id (org/name), a local folder, or a .gguf file."""
    adapter_path: UserPath = "sweep"
    """The sweep's folder: trials.jsonl, sweep.yaml, heatmap.png, and best.yaml to train with."""
    learning_rates: tuple[Positive, ...] = ()
    """Peak rates eta to try; without them a quarter of learning_rate, itself, and 4 and 16 times it."""
    lr_ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 4.0, 16.0)
    """Values of lambda to try; 1 is plain LoRA."""
    ranks: tuple[Count, ...] = ()
    """Ranks to try; without them only rank."""
    alphas: tuple[Positive, ...] = ()
    """Values of alpha to try; without them only alpha."""
    iters: Count = 60
    """Optimizer updates of a whole run; each earlier round's runs are a third as long, warm-up and schedule too."""
    rounds: Count = 3
    """Rounds; each keeps the best third of its trials for the next, and the last are whole runs."""
    seeds: Count = 3
    """Times that the last round trains each of its trials and learning_rate's own: the spread is the noise."""
    valid_rows: Count = 100
    """Most validation rows to score a trial on; a choice by --seed."""
    grad_accumulation_steps: Count = 1
    """Batches whose gradients make one update, weighted by their supervised tokens."""
    max_minutes: Positive | None = None
    """Stop after so many minutes, as Ctrl-C does; --resume goes on."""
    seed: int = 0
    """Seed of the adapters' start, dropout and the order of rows; the last round counts on from it."""
    resume: bool = False
    """Go on with the sweep in adapter_path: trials that have ended are not made again."""
    overwrite: bool = False
    """Replace the sweep that adapter_path holds."""
    adapter: OmitArgPrefixes[AdapterConfig] = field(default_factory=AdapterConfig)
    optimizer: OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)

    def run_config(self, **changes: Any) -> RunConfig:
        """Return the run with this sweep's settings, but for ``changes``.

        Raises:
            ConfigError: They are not allowed.
        """
        names = setting_names(RunConfig)
        shared = {name: value for name, value in settings_of(self).items() if name in names}
        return configure(RunConfig, shared | changes)
