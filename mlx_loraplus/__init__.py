"""LoRA+ fine-tuning of Gemma, Llama and other mlx-lm models in unified memory.

Import this package before ``mlx``: on Linux, it loads a fast BLAS for MLX first. Everything heavy
is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# First, because it handles Ctrl-C while the others are imported.
from . import interrupted_imports as _early  # noqa: F401  # pyright: ignore[reportUnusedImport]
from ._runtime import check_backend, prepare
from .errors import (
    AdapterError,
    BackendError,
    ConfigError,
    DataError,
    DeviceError,
    LoRAPlusError,
    ModelError,
    OutputError,
    PeerError,
    nearest,
)

if TYPE_CHECKING:
    from .adapters.attach import attach_adapters
    from .adapters.storage import load_adapter, save_adapter
    from .config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
    from .export.fuse import fuse_adapter
    from .inference.generate import complete, load
    from .memory.plan_view import plan_memory
    from .runs.compare import compare_runs
    from .runs.history import Run
    from .sweep.sweep import sweep_rates
    from .training.data_preview import preview
    from .training.evaluate import evaluate
    from .training.find_rate import find_rate
    from .training.finetune import finetune
    from .training.optimizer import LoRAPlus

__version__ = "0.1.0"

_HOMES = {
    "AdapterConfig": ".config",
    "DataConfig": ".config",
    "LoRAPlus": ".training.optimizer",
    "OptimizerConfig": ".config",
    "Run": ".runs.history",
    "TrainConfig": ".config",
    "attach_adapters": ".adapters.attach",
    "compare_runs": ".runs.compare",
    "complete": ".inference.generate",
    "evaluate": ".training.evaluate",
    "find_rate": ".training.find_rate",
    "finetune": ".training.finetune",
    "fuse_adapter": ".export.fuse",
    "load": ".inference.generate",
    "load_adapter": ".adapters.storage",
    "plan_memory": ".memory.plan_view",
    "preview": ".training.data_preview",
    "save_adapter": ".adapters.storage",
    "sweep_rates": ".sweep.sweep",
}
"""Names that are imported on first use → their modules."""

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "BackendError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DeviceError",
    "LoRAPlus",
    "LoRAPlusError",
    "ModelError",
    "OptimizerConfig",
    "OutputError",
    "PeerError",
    "Run",
    "TrainConfig",
    "attach_adapters",
    "compare_runs",
    "complete",
    "evaluate",
    "find_rate",
    "finetune",
    "fuse_adapter",
    "load",
    "load_adapter",
    "plan_memory",
    "preview",
    "save_adapter",
    "sweep_rates",
]

prepare()


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use.

    Raises:
        BackendError: MLX can't start on this machine.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_meant(name)}")
    check_backend()

    # The messages of functions name keywords, because they were not called by a command.
    value = getattr(import_module(_HOMES[name], __name__), name)
    if not isinstance(value, type):
        value = import_module(".python_messages", __name__).speak_keywords(value)
    globals()[name] = value
    return value


def _meant(name: str) -> str:
    """Return the public name that is probably meant, in parentheses."""
    commands = {
        "chat": "complete",
        "compare": "compare_runs",
        "fuse": "fuse_adapter",
        "generate": "complete",
        "plan": "plan_memory",
        "sweep": "sweep_rates",
        "train": "finetune",
    }
    if name.startswith("_"):
        return ""
    return nearest(commands.get(name, name), __all__)
