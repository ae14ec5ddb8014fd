"""The adapters that a run starts from, and the settings that are taken from them.

A run starts from new adapters, from the adapters in its checkpoint, or from existing adapters (in
``resume_adapter_file`` or on the model). Settings that are not given are taken from the existing
adapters, so that the run's record is correct and its default rates fit the adapters. A given
setting must equal the adapters' own setting; only dropout may be changed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..adapters.dropout import Dropout
from ..adapters.excluded_layers import find_unusable
from ..adapters.lora import Adapter, LoRA
from ..adapters.made_with import (
    SCALE,
    SELECTION,
    START,
    possible_inits,
    record,
    recorded_settings,
    recorded_start,
    shown_start,
)
from ..adapters.storage import load_adapter
from ..adapters.target_modules import choose_targets, find_trained
from ..adapters.tensor_parallel import is_sharded
from ..adapters.trainable import (
    TrainableParams,
    find_adapters,
    find_fully_trained,
    trainable_summary,
)
from ..config import AdapterConfig, TrainConfig
from ..conflicts import adapter_conflicts
from ..errors import ConfigError, join_problems
from ..models.loading import shared_copy
from ..runs.history import SETTINGS
from ..runs.progress import Log
from ..settings import configure, settings_of
from ..settings_file import read_settings
from .checkpoint import Checkpoint
from .run_checks import check_fresh

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class ExistingAdapters:
    """The adapters that a run starts from.

    Attributes:
        tuned: The model with the adapters.
        base: The model without them.
    """

    tuned: nn.Module
    base: nn.Module

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by the path of their module."""
        return find_adapters(self.tuned)

    @property
    def first(self) -> Adapter:
        """One of the adapters; all have the same kind, start and scale."""
        return next(iter(self.adapters.values()))

    @property
    def ranks(self) -> list[int]:
        """The ranks of the adapters, each once; a run's ``rank`` is the last, the largest."""
        return sorted({_rank_of(adapter) for adapter in self.adapters.values()})

    def recorded_among(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return the settings among ``names`` that the adapters were made with, if recorded."""
        recorded = recorded_settings(self.first)
        return {name: recorded[name] for name in names if name in recorded}

    def selected_by(self, config: AdapterConfig) -> bool:
        """Return whether a config's targets select the adapted modules, and no others."""
        try:
            targets, _ = choose_targets(
                self.base, config.target_modules, config.num_layers, self.ranks[-1], self.unusable
            )
        except ConfigError:
            return False
        return targets.keys() == self.adapters.keys()

    @cached_property
    def unusable(self) -> Mapping[str, str]:
        """Path → reason for the layers of the base that no adapter can replace."""
        return {} if is_sharded(self.base) else find_unusable(self.base)

    def trains(self, config: AdapterConfig) -> bool:
        """Return whether a config's ``train_modules`` are the modules that train in full."""
        named: Mapping[str, Any] = {}
        if config.train_modules:
            try:
                named = find_trained(self.base, config.train_modules, config.num_layers)
            except ConfigError:
                return False
        return named.keys() == find_fully_trained(self.tuned).keys()

    def scaled_by(self, config: AdapterConfig) -> bool:
        """Return whether a config's alpha and rslora give the adapters' scale s.

        s = alpha / rank, or alpha / √rank with rslora.
        """
        rank = self.ranks[-1]
        divisor = math.sqrt(rank) if config.rslora else rank
        return math.isclose(config.alpha / divisor, self.first.scale, rel_tol=1e-6)


def resolve_config(model: nn.Module, settings: Settings) -> TrainConfig:
    """Return a run's config; defaults come from the adapters that it starts from, if any.

    Args:
        model: The model, which may have adapters.
        settings: The settings that are given.

    Raises:
        ConfigError: A setting is not allowed, or differs from the adapters' own; or as for
            ``check_fresh``.
        AdapterError: ``resume_adapter_file`` holds no adapter, or an adapter that does not fit.
    """
    given = _without_none(settings)
    asked = configure(TrainConfig, given, whole=False)
    check_fresh(model, asked)

    # A resumed run takes its adapters from its own folder, even if it started from other adapters.
    starts_from_existing = asked.resume_adapter_file is not None or bool(find_adapters(model))
    if not starts_from_existing:
        return configure(TrainConfig, given)
    if asked.resume:
        return configure(TrainConfig, _recorded_settings(asked.adapter_path) | given)

    existing = _find_existing(model, asked.resume_adapter_file)
    theirs = _describe(existing)

    # A selection or a scale that equals the adapters' own is as good as not given.
    own = settings_of(asked.adapter)
    for name in (*SELECTION, *SCALE, "train_modules"):
        if name in given and _is_equal(own[name], theirs.get(name)):
            del given[name]
    _check_given(existing, asked.adapter, theirs, given)

    # Of settings that express the same thing, all come from the adapters, or none.
    inherited = {name: value for name, value in theirs.items() if name not in given}
    for names in (SELECTION, SCALE):
        if not given.keys().isdisjoint(names):
            inherited |= {name: own[name] for name in names if name not in given}
    if not given.keys().isdisjoint(SELECTION):
        inherited["train_modules"] = list(find_fully_trained(existing.tuned))
    config = configure(TrainConfig, inherited | given)
    problems = adapter_conflicts(config.adapter, settings_of(config), settings_of(TrainConfig()))
    if problems:
        raise ConfigError(join_problems(problems))
    return config


def with_recorded(config: TrainConfig, given: Settings) -> TrainConfig:
    """Return a config with the adapter's settings of the run that it resumes, as defaults.

    They change nothing unless that run started from another adapter, which had its own settings.

    Args:
        config: The run's settings.
        given: Those that were given.
    """
    if not config.resume or config.resume_adapter_file is None:
        return config
    return configure(TrainConfig, _recorded_settings(config.adapter_path) | _without_none(given))


def _without_none(settings: Settings) -> dict[str, Any]:
    """Return settings without a rank or quantize of None, which is the same as not giving it."""
    is_none = {name for name in ("rank", "quantize") if settings.get(name, 0) is None}
    return {name: value for name, value in settings.items() if name not in is_none}


def _is_equal(one: Any, other: Any) -> bool:
    """Return whether two settings are equal; a list equals a tuple."""
    both = [list(each) if isinstance(each, list | tuple) else each for each in (one, other)]
    return both[0] == both[1]


def continues(model: nn.Module, config: TrainConfig, checkpoint: Checkpoint | None) -> bool:
    """Return whether a run starts from adapters that exist, and not from new ones."""
    # The weights of adapter full are in the model already; a checkpoint's are restored later.
    if config.adapter.adapter == "full":
        return False
    is_adapted = bool(find_adapters(model))
    return is_adapted or checkpoint is not None or config.resume_adapter_file is not None


def continue_adapters(
    model: nn.Module, config: TrainConfig, checkpoint: Checkpoint | None, log: Log
) -> TrainableParams:
    """Load the adapters of the checkpoint or of ``resume_adapter_file``.

    Adapters that are on the model already are kept. When a run resumes, their values are restored
    later.
    """
    is_adapted = bool(find_adapters(model))
    if checkpoint is not None:
        saved = None if is_adapted else checkpoint.folder.absolute()
    else:
        saved = config.resume_adapter_file
        log(f"training starts from {saved or 'the adapters on the model'}")

    if saved is not None:
        load_adapter(model, saved)
    _set_dropout(model, config.adapter.dropout)
    record(model, config.adapter)
    return trainable_summary(model)


def _set_dropout(model: nn.Module, p: float) -> None:
    """Set the dropout of the adapters of ``model``."""
    for adapter in find_adapters(model).values():
        if adapter.dropout.p != p:
            adapter.dropout = Dropout(p)


def _find_existing(model: nn.Module, resume_adapter_file: str | None) -> ExistingAdapters:
    """Return the adapters in ``resume_adapter_file`` or on the model, without changing them."""
    if resume_adapter_file is not None:
        tuned = shared_copy(model)
        load_adapter(tuned, resume_adapter_file)
        return ExistingAdapters(tuned, model)

    base = shared_copy(model)
    plain = [(path, adapter.base) for path, adapter in find_adapters(base).items()]
    base.update_modules(tree_unflatten(plain))
    return ExistingAdapters(shared_copy(model), base)


def _recorded_settings(folder: str | Path) -> dict[str, Any]:
    """Return the adapter settings in a run's folder; empty if it has no valid run.yaml."""
    try:
        config = configure(TrainConfig, read_settings(Path(folder) / SETTINGS), whole=False)
    except ConfigError:
        return {}
    recorded = settings_of(config.adapter)
    return {name: value for name, value in recorded.items() if value is not None}


def _describe(existing: ExistingAdapters) -> dict[str, Any]:
    """Return the settings of existing adapters.

    Several settings can express the same thing. Those of the run's record are preferred if they
    agree with the adapters.
    """
    first = existing.first
    found: dict[str, Any] = {
        "adapter": first.kind,
        "rank": existing.ranks[-1],
        "dropout": first.dropout.p,
    }

    # How the adapters were initialized.
    found |= recorded_start(first) or shown_start(first)

    # The scale.
    scale = existing.recorded_among(SCALE)
    if first.projections is None and not existing.scaled_by(AdapterConfig(**scale)):
        scale = {"alpha": first.scale * existing.ranks[-1], "rslora": False}
    found |= scale

    # The adapted modules: the recorded selection or the default if it fits, else a list of paths.
    selection: dict[str, Any] = {"target_modules": list(existing.adapters), "num_layers": -1}
    for candidate in (existing.recorded_among(SELECTION), {}):
        if existing.selected_by(AdapterConfig(**candidate)):
            selection = candidate
            break
    found |= selection

    # The modules that are trained in full: as recorded if that fits, else a list of paths.
    recorded = existing.recorded_among(("train_modules",))
    if not existing.trains(AdapterConfig(**selection | recorded)):
        recorded = {"train_modules": list(find_fully_trained(existing.tuned))}
    return found | recorded


def _check_given(
    existing: ExistingAdapters, asked: AdapterConfig, theirs: Settings, given: Settings
) -> None:
    """Check that the given settings equal those of existing adapters.

    Raises:
        ConfigError: Some differ; the message lists them all.
    """
    # Settings that are compared by their value.
    different: list[str] = []
    if "adapter" in given and asked.adapter != theirs["adapter"]:
        different.append("adapter")
    if "rank" in given and asked.rank != existing.ranks[-1]:
        different.append("rank")
    different += _find_different_start(existing, asked, theirs, given)

    # Scale and selection are compared by their effect. Projections have no scale.
    scale = [name for name in SCALE if name in given]
    has_scale = existing.first.projections is None
    if scale and has_scale and not existing.scaled_by(asked):
        different += scale

    selection = [name for name in SELECTION if name in given]
    if selection and not existing.selected_by(asked):
        different += selection

    num_layers = asked.num_layers if selection else theirs.get("num_layers", -1)
    trained = replace(asked, num_layers=num_layers)
    if "train_modules" in given and not existing.trains(trained):
        different.append("train_modules")

    # Report all that differ.
    if not different:
        return
    defaults = settings_of(AdapterConfig())
    problems: list[str] = []
    for name in different:
        value = theirs.get(name, defaults[name])
        if name == "rank":
            value = " and ".join(map(str, existing.ranks))
        shown = "none" if value is None else f"{value!s:.80}"
        problems.append(f"{name} {getattr(asked, name)} (theirs: {shown})")
    raise ConfigError(
        "the run starts from adapters with other settings:"
        f" {join_problems(problems)}; leave these settings out to train the adapters further, or"
        " start without the adapters"
    )


def _find_different_start(
    existing: ExistingAdapters, asked: AdapterConfig, theirs: Settings, given: Settings
) -> list[str]:
    """Return the given settings of the initialization that the adapters do not have.

    If their own initialization is not recorded, any that their arrays allow is accepted. Settings
    that the adapters' init does not use are left to ``adapter_conflicts``.
    """
    own = AdapterConfig(**{name: theirs[name] for name in START if name in theirs})
    wanted = replace(own, **{name: getattr(asked, name) for name in START if name in given})
    is_recorded = bool(recorded_start(existing.first))

    different: list[str] = []
    if wanted.init not in ([own.init] if is_recorded else possible_inits(existing.first)):
        different.append("init")
    if wanted.quantization != own.quantization:
        names = ("quantize", "quantize_group_size")
        different += [name for name in names if getattr(wanted, name) != getattr(own, name)]
    if is_recorded and own.init == "loftq" and wanted.loftq_iters != own.loftq_iters:
        different.append("loftq_iters")
    if is_recorded and own.init in ("pissa", "loftq") and wanted.svd != own.svd:
        different.append("svd")
    return different


def _rank_of(adapter: Adapter) -> int:
    if isinstance(adapter, LoRA):
        return adapter.rank
    lora_a, _ = adapter.lora_matrices()
    return lora_a.shape[1]
