"""The settings of a sweep; those of a run are in config.py."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from tyro.conf import OmitArgPrefixes

from ..config import AdapterConfig, Count, DataConfig, OptimizerConfig, Positive, RunConfig, UserPath
from ..settings import configure, setting_names, settings_of


@dataclass(frozen=True)
class SweepConfig:
    """A search for the best rates for a model and its data: many short runs, then a few full ones.

    learning_rate, lr_ratio, rank and alpha are the baseline to beat. All other settings apply to
    every run.
    """

    model: UserPath = "gemma-3"
    """A name from mlx_loraplus.train --list-models, a hub id (org/name), a local folder, or a .gguf file."""
    adapter_path: UserPath = "sweep"
    """Folder of the sweep: trials.jsonl, sweep.yaml, heatmap.png, and best.yaml to train with."""
    learning_rates: tuple[Positive, ...] = ()
    """Peak rates eta to try. Default: 0.25, 1, 4 and 16 times learning_rate."""
    lr_ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 4.0, 16.0)
    """Values of lambda to try; 1 is plain LoRA."""
    ranks: tuple[Count, ...] = ()
    """Ranks to try. Default: rank only."""
    alphas: tuple[Positive, ...] = ()
    """Values of alpha to try. Default: alpha only."""
    iters: Count = 60
    """Optimizer updates of a full run; each earlier round's runs are a third as long."""
    rounds: Count = 3
    """Rounds. Each keeps the best third of its trials for the next; the last are full runs."""
    seeds: Count = 3
    """Seeds for each trial of the last round and for the baseline; their spread is the noise."""
    valid_rows: Count = 100
    """Maximum validation examples to score a trial on; --seed chooses them."""
    grad_accumulation_steps: Count = 1
    """Batches whose gradients make one update, weighted by their supervised tokens."""
    max_minutes: Positive | None = None
    """Stop after this many minutes, as if by Ctrl-C; --resume continues."""
    seed: int = 0
    """Seed of initialization, dropout and data order; the last round also uses the next seeds."""
    resume: bool = False
    """Continue the sweep in adapter_path; trials that have ended are not repeated."""
    overwrite: bool = False
    """Replace the sweep in adapter_path."""
    adapter: OmitArgPrefixes[AdapterConfig] = field(default_factory=AdapterConfig)
    optimizer: OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)

    def run_config(self, **changes: Any) -> RunConfig:
        """Return a run with this sweep's settings, except for ``changes``.

        Raises:
            ConfigError: A change is unknown or not allowed.
        """
        names = setting_names(RunConfig)
        settings = settings_of(self)
        shared = {name: settings[name] for name in settings if name in names}
        return configure(RunConfig, shared | changes)
