"""LoRA+ fine-tuning of Gemma, Llama and other mlx-lm models in unified memory.

Import this package before ``mlx``: on Linux it gives MLX a fast BLAS first. Nothing heavy is imported until it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import AdapterError, ConfigError, DataError, LoRAPlusError, ModelError, OutputError, PeerError
from .runtime import prepare

if TYPE_CHECKING:
    from .adapters.storage import load_adapter, save_adapter
    from .comparison import compare_runs
    from .evaluation import evaluate
    from .export.fused import fuse_adapter
    from .generation import complete, load
    from .inspection import preview
    from .planning import plan_memory
    from .study.sweep import sweep_rates
    from .training.history import Run
    from .training.optimizer import LoRAPlus
    from .training.run import finetune

__version__ = "0.1.0"

_HOMES = {
    "load": ".generation", "complete": ".generation", "preview": ".inspection", "evaluate": ".evaluation",
    "finetune": ".training.run", "Run": ".training.history", "LoRAPlus": ".training.optimizer",
    "compare_runs": ".comparison", "plan_memory": ".planning", "sweep_rates": ".study.sweep",
    "save_adapter": ".adapters.storage", "load_adapter": ".adapters.storage", "fuse_adapter": ".export.fused",
}  # fmt: skip

__all__ = [
    "AdapterError", "ConfigError", "DataError", "LoRAPlus", "LoRAPlusError", "ModelError", "OutputError", "PeerError",
    "Run", "compare_runs", "complete", "evaluate", "finetune", "fuse_adapter", "load", "load_adapter", "plan_memory",
    "preview", "save_adapter", "sweep_rates",
]  # fmt: skip

prepare()


def __getattr__(name: str) -> Any:
    """Import a public name's home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
