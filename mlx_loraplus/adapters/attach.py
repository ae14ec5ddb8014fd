"""Attach adapters to a model: check the settings against its layers, then adapt each target."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..config import AdapterConfig
from ..errors import AdapterError, ConfigError, ModelError, counted
from ..models.damaged_weights import describe_damage
from ..settings import checked
from . import dora, lora, vera
from .base_layers import EMBEDDINGS, QUANTIZED, SHARDED, base_shape
from .excluded_layers import find_unusable, has_no_effect
from .full import check_full, unfreeze_weights
from .init import initialize
from .lora import Adapter, LoRA, Projections
from .made_with import record
from .sharded_lora import ShardedLoRALinear
from .target_modules import choose_targets, find_trained
from .tensor_parallel import check_sharded, is_sharded
from .trainable import (
    TrainableParams,
    check_no_foreign_adapters,
    find_adapters,
    trainable_summary,
)
from .unfreeze import train_in_full

_LAYERS: Mapping[str, Mapping[Any, type[Adapter]]] = {
    "lora": {SHARDED: ShardedLoRALinear, **lora.LAYERS},
    "dora": dora.LAYERS,
    "vera": vera.LAYERS,
}


def attach_adapters(
    model: nn.Module, config: AdapterConfig, original: str = "the original"
) -> TrainableParams:
    """Freeze ``model`` and put an adapter on every target, or with adapter full train its weights.

    The outputs do not change, except for the rounding if ``quantize`` is set.

    Args:
        model: A model without adapters.
        config: The adapters' settings.
        original: Name of the unquantized model, for the error message if ``model`` must not be
            quantized.

    Raises:
        ConfigError: A target matches no module, ``num_layers`` or ``rank`` is too large, or a
            module does not support a setting. The model is not changed.
        AdapterError: The model already has adapters, here or of another program.
        ModelError: mlx-lm cannot run the model.
    """
    if find_adapters(model):
        raise AdapterError(
            "the model has adapters already: fuse them or load the model again before attaching"
            " others"
        )
    check_no_foreign_adapters(model)
    config = checked(config)
    if config.adapter == "full" and not is_sharded(model):
        unfreeze_weights(model, config.num_layers, original)
        return trainable_summary(model)

    # Sharded models are checked when they are divided, so they need no trial run here.
    unusable: Mapping[str, str] = {}
    if is_sharded(model):
        check_sharded(config)
    else:
        unusable = find_unusable(model)

    # Find all problems before the model changes.
    try:
        targets, trained, skipped = check_targets(model, config, unusable, original)
    except ConfigError as problem:
        if not has_no_effect(model, unusable):
            raise
        kind = getattr(model, "model_type", type(model).__name__)
        raise ModelError(
            f"the layers of this {kind} model have no effect on its logits:"
            f" {describe_damage(model)}"
        ) from problem

    # Make the adapters one by one, so that only one full weight is in memory at a time.
    assert config.rank is not None
    projections = _make_projections(config, targets.values())
    adapters: dict[str, Adapter] = {}
    residuals: dict[str, tuple[float, float]] = {}
    for path, module in targets.items():
        adapter = adapt(
            config.adapter, module, config.rank, config.scale, config.dropout, projections
        )
        if isinstance(adapter, LoRA):
            # With init1, the default, a layer keeps the A and B that it was made with.
            rounding = initialize(adapter, config)
            if rounding is not None:
                residuals[path] = rounding
        adapters[path] = adapter

    # Put them on the model. The summary gives each trainable parameter its LoRA+ group.
    put_adapters(model, adapters, trained)
    record(model, config)
    return replace(trainable_summary(model, residuals), skipped=skipped)


def check_targets(
    model: nn.Module,
    config: AdapterConfig,
    unusable: Mapping[str, str],
    original: str = "the original",
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], dict[str, str]]:
    """Choose and check the modules that get adapters.

    Returns path → module to adapt, path → module to train in full, and path → why a module is
    skipped.

    Args:
        model: A loaded model, or a skeleton.
        config: The adapters' settings, with the defaults filled in.
        unusable: Path → reason for the layers that no adapter can replace.
        original: As for ``attach_adapters``.

    Raises:
        ConfigError: As for ``attach_adapters``.
    """
    if config.adapter == "full":
        check_full(model, config.num_layers, original)
        return {}, {}, {}

    targets, skipped = choose_targets(
        model, config.target_modules, config.num_layers, config.rank or 1, unusable
    )
    trained = find_trained(model, config.train_modules, config.num_layers)
    for path, module in targets.items():
        _check_target(path, module, config, original)
        if path in trained:
            raise ConfigError(
                f"{path} is in --target-modules and in --train-modules: leave it out of one of them"
            )
    return targets, trained, skipped


def _make_projections(config: AdapterConfig, modules: Iterable[nn.Module]) -> Projections | None:
    """Return the projections that the adapters over ``modules`` share, if their kind has any."""
    assert config.rank is not None
    for layer_class in layer_classes(config.adapter).values():
        if layer_class.make_projections is not None:
            shapes = [base_shape(module) for module in modules]
            return layer_class.make_projections(shapes, config.rank)
    return None


def check_rank(path: str, module: nn.Module, config: AdapterConfig) -> None:
    """Check that the rank of a module's adapter is at most its smaller side.

    Raises:
        ConfigError: The rank is larger.
    """
    # Shared projections may have any rank.
    is_limited = required_layer_class(config.adapter, module, path).make_projections is None
    smaller = min(base_shape(module))
    if is_limited and config.rank is not None and config.rank > smaller:
        raise ConfigError(
            f"--rank {config.rank} is above {smaller}, the smaller side of {path}: lower it"
        )


def _check_target(path: str, module: nn.Module, config: AdapterConfig, original: str) -> None:
    """Check that a module supports the settings.

    Raises:
        ConfigError: The module does not support one of them.
    """
    check_rank(path, module, config)
    _, columns = base_shape(module)
    layer_class = required_layer_class(config.adapter, module, path)
    if config.init != "init1" and not issubclass(layer_class, LoRA):
        raise ConfigError(f"{config.adapter} has no --init {config.init}: use --adapter lora")

    # Quantization needs an unquantized weight whose columns divide into whole groups.
    if config.quantization is None:
        return
    if isinstance(module, QUANTIZED):
        raise ConfigError(
            f"--init {config.init} quantizes full weights, and {path} has {module.bits} bits"
            f" already: load {original}"
        )
    group = config.quantization["group_size"]
    if columns % group:
        raise ConfigError(
            f"{path} has {counted(columns, 'column')}, which is not a multiple of the group size"
            f" {group}: choose another group size"
        )


def adapt(
    kind: str,
    module: nn.Module,
    rank: int,
    scale: float,
    dropout: float,
    projections: Projections | None,
) -> Adapter:
    """Return a new adapter over ``module``.

    If ``projections`` are given, they determine the rank, and ``rank`` and ``scale`` are not used.
    """
    layer_class: Any = find_layer_class(kind, module)
    if projections is not None:
        return layer_class(module, projections, dropout)
    return layer_class(module, rank, scale, dropout)


def find_layer_class(kind: str, module: nn.Module) -> type[Adapter] | None:
    """Return the kind's layer class over ``module``, or None if the kind does not support it."""
    for bases, layer_class in layer_classes(kind).items():
        if type(module) in bases:
            return layer_class
    return None


def required_layer_class(kind: str, module: nn.Module, path: str) -> type[Adapter]:
    """Return the kind's layer class over ``module``.

    Raises:
        ConfigError: The kind does not support this module.
    """
    layer_class = find_layer_class(kind, module)
    if layer_class is None:
        what = "embedding" if isinstance(module, EMBEDDINGS) else type(module).__name__
        raise ConfigError(
            f"{kind} can't adapt the {what} {path}: leave it out of --target-modules, or use"
            " --adapter lora"
        )
    return layer_class


def layer_classes(kind: str) -> Mapping[tuple[type[nn.Module], ...], type[Adapter]]:
    """Return a dict from the supported types of base to the kind's layer classes."""
    return _LAYERS[kind]


def put_adapters(
    model: nn.Module, adapters: Mapping[str, Adapter], trained: Mapping[str, nn.Module]
) -> None:
    """Freeze ``model`` and put prepared adapters on it.

    Args:
        model: The model.
        adapters: Each adapter, by the path of the module that it replaces.
        trained: The modules that will train in full.
    """
    model.freeze()

    # An adapter may have a new base, which is not frozen yet.
    for adapter in adapters.values():
        adapter.train(model.training)
        adapter.base.freeze()
    model.update_modules(tree_unflatten(list(adapters.items())))

    for module in trained.values():
        train_in_full(module)
