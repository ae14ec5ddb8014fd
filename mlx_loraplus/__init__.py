"""LoRA+ fine-tuning of Gemma, Llama and other mlx-lm models in unified memory.

Import this package before ``mlx``: on Linux it gives MLX a fast BLAS first. Nothing heavy is
imported until it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._runtime import prepare
from .errors import (
    AdapterError,
    ConfigError,
    DataError,
    LoRAPlusError,
    ModelError,
    OutputError,
    PeerError,
)

if TYPE_CHECKING:
    from .adapters.storage import load_adapter, save_adapter
    from .export.fuse import fuse_adapter
    from .inference.generate import complete, load
    from .memory.plan import plan_memory
    from .preview import preview
    from .runs.compare import compare_runs
    from .runs.history import Run
    from .sweep.sweep import sweep_rates
    from .training.evaluate import evaluate
    from .training.finetune import finetune
    from .training.optimizer import LoRAPlus

__version__ = "0.1.0"

_HOMES = {
    "load": ".inference.generate", "complete": ".inference.generate", "preview": ".preview",
    "evaluate": ".training.evaluate", "finetune": ".training.finetune", "Run": ".runs.history",
    "LoRAPlus": ".training.optimizer",
    "compare_runs": ".runs.compare", "plan_memory": ".memory.plan", "sweep_rates": ".sweep.sweep",
    "save_adapter": ".adapters.storage", "load_adapter": ".adapters.storage", "fuse_adapter": ".export.fuse",
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
