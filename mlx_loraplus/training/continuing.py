"""A run that starts from adapters that are there already: which of its settings they decide, and what may be asked.

What was not given is taken from the adapters, so that a run records, and derives its default rates
from, what trains. What was given acts (dropout) or equals theirs; everything else is refused.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..adapters.adapter import Adapter
from ..adapters.attach import find_adapters, find_fully_trained, find_targets, find_trained
from ..adapters.dropout import Dropout
from ..adapters.lora import LoRA
from ..adapters.storage import adapter_folder, load_adapter
from ..config import AdapterConfig, RunConfig
from ..errors import ConfigError, join_problems
from ..models.loading import shared_copy
from ..runs.history import SETTINGS
from ..settings import configure, read_settings, settings_of

_NAMES = [field.name for field in fields(AdapterConfig)]
_SELECTION = ("target_modules", "num_layers")
_START = ("init", "quantize", "quantize_group_size", "loftq_iters", "svd")
_REMEDY = "leave them out to train these adapters on, or start without them to get others"


def take_over(model: nn.Module, settings: Mapping[str, Any]) -> RunConfig:
    """Return a run's config, what is not in ``settings`` being that of the adapters that it starts from, if it does.

    Raises:
        ConfigError: A setting that is not allowed, or that these adapters can't follow.
        AdapterError: ``resume_adapter_file`` holds no adapter, or one that does not fit.
    """
    given = {
        name: value
        for name, value in settings.items()
        if value is not None or name not in ("rank", "quantize")
    }
    asked = configure(RunConfig, given, whole=False)
    if asked.resume:
        return configure(
            RunConfig, _of_run(asked.adapter_path) | given if asked.resume_adapter_file else given
        )
    if asked.resume_adapter_file is None and not find_adapters(model):
        return configure(RunConfig, given)
    tuned, base = shared_copy(model), model
    if asked.resume_adapter_file is None:
        base = shared_copy(model)
        base.update_modules(
            tree_unflatten([(path, one.base) for path, one in find_adapters(base).items()])
        )
        recorded: dict[str, Any] = {}
    else:
        load_adapter(tuned, asked.resume_adapter_file)
        recorded = _of_run(adapter_folder(asked.resume_adapter_file))
    theirs = _describe(tuned, base, recorded)
    _check(tuned, base, asked.adapter, theirs, given)
    inherited = {name: value for name, value in theirs.items() if name not in given}
    if not given.keys().isdisjoint(_SELECTION):  # what was given selects the same modules
        inherited |= {
            name: getattr(asked.adapter, name) for name in _SELECTION if name not in given
        }
    if not given.keys().isdisjoint({"alpha", "rslora"}):  # and gives the same scale
        inherited |= {
            name: getattr(asked.adapter, name) for name in ("alpha", "rslora") if name not in given
        }
    return configure(RunConfig, inherited | given)


def set_dropout(model: nn.Module, share: float) -> None:
    """Give the adapters of ``model`` another dropout."""
    for adapter in find_adapters(model).values():
        if adapter.dropout.p != share:
            adapter.dropout = Dropout(share)


def _of_run(folder: str | Path) -> dict[str, Any]:
    """Return the adapter's settings in a run's folder, none where it holds no run.yaml."""
    with suppress(ConfigError):
        recorded = settings_of(
            configure(RunConfig, read_settings(Path(folder) / SETTINGS), whole=False).adapter
        )
        return {name: value for name, value in recorded.items() if value is not None}
    return {}


def _describe(tuned: nn.Module, base: nn.Module, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the adapters on ``tuned`` have, from a run's record where it agrees with them."""
    adapters = find_adapters(tuned)
    first = next(iter(adapters.values()))
    found: dict[str, Any] = {
        "adapter": first.kind,
        "rank": _rank(first),
        "dropout": first.dropout.p,
    }
    found |= {name: recorded[name] for name in _START if name in recorded}
    if isinstance(first, LoRA) and first.has_start:
        found["init"] = "pissa"
    elif first.owns_base and found.get("init") is None:
        found["init"] = "loftq"

    # the scale, and which modules are adapted, can be said in several ways
    alphas = {name: recorded[name] for name in ("alpha", "rslora") if name in recorded}
    if first.projections is None and not _same_scale(AdapterConfig(**alphas), first):
        alphas = {"alpha": first.scale * _rank(first), "rslora": False}
    found |= alphas
    ways = [{name: recorded[name] for name in _SELECTION if name in recorded}, {}]
    whole = {"target_modules": list(adapters), "num_layers": -1}
    found |= next((way for way in ways if _selects(base, AdapterConfig(**way), adapters)), whole)
    if trained := list(find_fully_trained(tuned)):
        found["train_modules"] = trained
    return found


def _check(
    tuned: nn.Module,
    base: nn.Module,
    asked: AdapterConfig,
    theirs: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    """Raise ConfigError for what was ``given`` and differs from what the adapters on ``tuned`` have."""
    defaults, adapters = settings_of(AdapterConfig()), find_adapters(tuned)
    first = next(iter(adapters.values()))
    differ = [
        name
        for name in ("adapter", "rank", *_START)
        if name in given and getattr(asked, name) != theirs.get(name, defaults[name])
    ]
    scales = [name for name in ("alpha", "rslora") if name in given]
    if scales and first.projections is None and not _same_scale(asked, first):
        differ += scales
    selection = [name for name in _SELECTION if name in given]
    if selection and not _selects(base, asked, adapters):
        differ += selection
    if "train_modules" in given:
        wanted = (
            find_trained(base, asked.train_modules, asked.num_layers) if asked.train_modules else {}
        )
        differ += ["train_modules"] if wanted.keys() != find_fully_trained(tuned).keys() else []
    if differ:
        shown = [
            f"{name} {getattr(asked, name)} (theirs: {theirs.get(name, defaults[name])!s:.80})"
            for name in differ
        ]
        raise ConfigError(
            f"the run starts from adapters that have other settings: {join_problems(shown)};"
            f" {_REMEDY}"
        )


def _rank(adapter: Adapter) -> int:
    return adapter.rank if isinstance(adapter, LoRA) else adapter.lora_matrices()[0].shape[1]


def _same_scale(config: AdapterConfig, adapter: Adapter) -> bool:
    rank = _rank(adapter)
    scale = config.alpha / (math.sqrt(rank) if config.rslora else rank)
    return math.isclose(scale, adapter.scale, rel_tol=1e-6)


def _selects(base: nn.Module, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> bool:
    with suppress(ConfigError):
        return (
            find_targets(base, config.target_modules, config.num_layers).keys() == adapters.keys()
        )
    return False
