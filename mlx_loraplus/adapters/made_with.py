"""The settings that adapters were made with, which their arrays do not show.

Every adapter keeps them in ``made_with``, and ``adapter_config.json`` stores them under the same
name. Runs of older versions have them in ``run.yaml`` only.
"""

from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..config import AdapterConfig
from ..errors import ConfigError
from ..models.moved_run_paths import read_run_settings
from ..settings import configure, settings_of
from .base_layers import QUANTIZED, quantization
from .damaged_files import RUN_SETTINGS
from .full import trains_weights
from .lora import Adapter, LoRA
from .stored_files import StoredConfig
from .trainable import find_adapters

START = ("init", "quantize", "quantize_group_size", "loftq_iters", "svd")
SCALE = ("alpha", "rslora")
SELECTION = ("target_modules", "num_layers")

_RECORDED = (*START, *SCALE, *SELECTION, "train_modules")


def record(model: nn.Module, config: AdapterConfig | None) -> None:
    """Record the settings that the adapters of ``model`` were made with; None: unknown."""
    for adapter in find_adapters(model).values():
        adapter.made_with = config


def recorded_settings(adapter: Adapter) -> dict[str, Any]:
    """Return the settings that an adapter was made with; empty if they are unknown."""
    if adapter.made_with is None:
        return {}
    settings = settings_of(adapter.made_with)
    return {name: settings[name] for name in _RECORDED}


def read_record(stored: StoredConfig, folder: Path) -> AdapterConfig | None:
    """Return the settings that a stored adapter was made with; None if they can't be read.

    Args:
        stored: The adapter's config.
        folder: The adapter's folder, which may be that of its run.
    """
    try:
        found = stored.made_with
        if found is None:
            found = read_run_settings(folder / RUN_SETTINGS)
        known = {name: found[name] for name in _RECORDED if name in found}
        return configure(AdapterConfig, known) if known else None
    except ConfigError:
        return None


def possible_inits(adapter: Adapter) -> tuple[str, ...]:
    """Return the inits that an adapter may have, as its arrays show; the likeliest comes first."""
    if not isinstance(adapter, LoRA):
        return ("init1",)
    if adapter.has_start:
        return ("pissa",)
    if adapter.owns_base:
        return ("loftq", "pissa")
    return ("init1", "init2")


def recorded_start(adapter: Adapter) -> dict[str, Any]:
    """Return the recorded settings of how an adapter was initialized.

    They are empty if they are unknown, or if the adapter does not agree with them.
    """
    recorded = recorded_settings(adapter)
    if not recorded:
        return {}
    start = {name: recorded[name] for name in START}
    fits = start["init"] in possible_inits(adapter)
    return start if fits and AdapterConfig(**start).quantization == _packing(adapter) else {}


def shown_start(adapter: Adapter) -> dict[str, Any]:
    """Return the settings of how an adapter was initialized, as far as its arrays show them."""
    start: dict[str, Any] = {"init": possible_inits(adapter)[0]}
    packing = _packing(adapter)
    if packing is None:
        return start
    if packing["mode"] != "affine":
        return start | {"quantize": packing["mode"]}
    return start | {"quantize": str(packing["bits"]), "quantize_group_size": packing["group_size"]}


def trained_with(model: nn.Module) -> AdapterConfig:
    """Return the adapter's kind and start that decide the default rates of a model."""
    if trains_weights(model):
        return AdapterConfig(adapter="full")
    first = next(iter(find_adapters(model).values()), None)
    if first is None:
        return AdapterConfig()
    kind: Any = first.kind
    return AdapterConfig(adapter=kind, **(recorded_start(first) or shown_start(first)))


def _packing(adapter: Adapter) -> dict[str, Any] | None:
    """Return how the base that an adapter brings is quantized; None if it brings none."""
    is_packed = adapter.owns_base and isinstance(adapter.base, QUANTIZED)
    return quantization(adapter.base) if is_packed else None
