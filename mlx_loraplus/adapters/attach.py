"""Put adapters on a model, and count what trains: the census."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import get_total_parameters

from ..config import AdapterConfig
from ..errors import AdapterError, ConfigError, nearest
from ..settings import checked
from . import dora, lora, vera
from .adapter import Adapter, Projections
from .init import initialize
from .layers import EMBEDDINGS, QUANTIZED, base_shape, blocks_of, can_adapt
from .lora import LoRA
from .selection import find_routers, find_unusable, is_narrow
from .tensor_parallel import check_sharded, is_sharded
from .unfreeze import FullyTrained, own_arrays, train_in_full

ALL_LINEAR, NORMS = "all-linear", "norms"


_LAYERS: Mapping[str, Mapping[Any, type[Adapter]]] = {
    "lora": lora.LAYERS,
    "dora": dora.LAYERS,
    "vera": vera.LAYERS,
}


@dataclass(frozen=True)
class TrainableParams:
    """What trains in a model, and at which rate.

    ``groups`` maps the path of every trainable parameter to its LoRA+ group: ``lora_a`` (rate eta),
    ``lora_b`` (rate lambda * eta), ``magnitude`` (DoRA's, a multiple of eta) or ``embedding`` (a
    rate of its own, for adapters on embeddings and for modules that train in full). It is the only
    place where that is decided. ``residuals`` maps each base that ``quantize`` has quantized to ‖W
    - Q‖ / ‖W‖ without the adapter and with it. ``skipped`` maps each linear layer that the targets
    would include, but that gets no adapter, to the reason.
    """

    groups: Mapping[str, str]
    trainable: int
    total: int
    residuals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = ", ".join(
            f"{count} in {name}" for name, count in sorted(Counter(self.groups.values()).items())
        )
        share = 100 * self.trainable / self.total
        lost = ""
        if self.residuals:
            before, after = (
                sum(side) / len(self.residuals)
                for side in zip(*self.residuals.values(), strict=True)
            )
            lost = (
                f"; quantizing loses {after:.2%} of the weights' norm, {before:.2%} without the"
                " adapter's start"
            )
        skipped = "".join(
            f"; skipped {count} layers ({reason})"
            for reason, count in sorted(Counter(self.skipped.values()).items())
        )
        return (
            f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f}%); arrays:"
            f" {sizes}{lost}{skipped}"
        )


def attach_adapters(
    model: nn.Module, config: AdapterConfig, original: str = "the original"
) -> TrainableParams:
    """Freeze ``model`` and put an adapter on every targeted module.

    The model's outputs do not change, but for what ``quantize`` loses of its weights. ``original``
    is what to load instead of a model that is quantized where it must not be.

    Raises:
        ConfigError: No module matches a target, ``num_layers`` or ``rank`` is too large, or a
            module can't have what is asked for. Nothing is attached then.
        AdapterError: The model has adapters already.
        ModelError: mlx-lm itself cannot run the model.
    """
    if find_adapters(model):
        raise AdapterError(
            "the model has adapters already: fuse them or load the model again before attaching"
            " others"
        )
    config = checked(config)
    if is_sharded(model):
        check_sharded(config)
    assert config.rank is not None
    unusable = {} if is_sharded(model) else find_unusable(model)
    targets, skipped = choose_targets(
        model, config.target_modules, config.num_layers, config.rank, unusable
    )
    trained = find_trained(model, config.train_modules, config.num_layers)
    for path, module in targets.items():
        _check_target(path, module, config, original)
        if path in trained:
            raise ConfigError(
                f"{path} is in target_modules and in train_modules: leave it out of one of them"
            )
    draw = next(
        (
            layer.make_projections
            for layer in layers_of(config.adapter).values()
            if layer.make_projections
        ),
        None,
    )
    projections = (
        draw([base_shape(module) for module in targets.values()], config.rank) if draw else None
    )
    adapters: dict[str, Adapter] = {}
    residuals: dict[str, tuple[float, float]] = {}
    for path, module in targets.items():
        adapter = adapt(
            config.adapter, module, config.rank, config.scale, config.dropout, projections
        )
        if isinstance(adapter, LoRA) and (lost := initialize(adapter, config)):
            residuals[path] = lost
        adapters[path] = adapter
    put_adapters(model, adapters, trained)
    return replace(trainable_summary(model, residuals), skipped=skipped)


def adapt(
    kind: str,
    module: nn.Module,
    rank: int,
    scale: float,
    dropout: float,
    projections: Projections | None,
) -> Adapter:
    """Return a new adapter over ``module``; what is made of projections has their rank and no scale."""
    layer: Any = layer_for(kind, module)
    return (
        layer(module, rank, scale, dropout)
        if projections is None
        else layer(module, projections, dropout)
    )


def layer_for(kind: str, module: nn.Module) -> type[Adapter] | None:
    """Return the kind's layer over ``module``, or None where it has none."""
    return next((layer for bases, layer in layers_of(kind).items() if type(module) in bases), None)


def layer_over(kind: str, module: nn.Module, path: str) -> type[Adapter]:
    """Return the kind's layer over ``module``, or raise ConfigError where it has none."""
    layer = layer_for(kind, module)
    if layer is None:
        what = "embedding" if isinstance(module, EMBEDDINGS) else type(module).__name__
        raise ConfigError(
            f"{kind} can't adapt the {what} {path}: leave it out of target_modules, or use adapter"
            " lora"
        )
    return layer


def layers_of(kind: str) -> Mapping[tuple[type[nn.Module], ...], type[Adapter]]:
    """Return types of base → the kind's layer over them."""
    return _LAYERS[kind]


def _check_target(path: str, module: nn.Module, config: AdapterConfig, original: str) -> None:
    """Raise ConfigError for what this module can't have."""
    rows, columns = base_shape(module)
    layer = layer_over(config.adapter, module, path)
    if (
        layer.make_projections is None
        and config.rank is not None
        and config.rank > min(rows, columns)
    ):
        raise ConfigError(
            f"rank {config.rank} is above {min(rows, columns)}, the smaller side of {path}:"
            " lower it"
        )
    if config.init != "init1" and not issubclass(layer, LoRA):
        raise ConfigError(f"{config.adapter} has no init {config.init}: use adapter lora")
    if config.quantization is None:
        return
    if isinstance(module, QUANTIZED):
        raise ConfigError(
            f"init {config.init} quantizes full weights, and {path} has {module.bits} bits already:"
            f" load {original}"
        )
    group = config.quantization["group_size"]
    if columns % group:
        raise ConfigError(
            f"{path} has {columns} columns, no multiple of the group size {group}: choose"
            " another one"
        )


def put_adapters(
    model: nn.Module, adapters: Mapping[str, Adapter], trained: Mapping[str, nn.Module]
) -> None:
    """Freeze ``model``, replace the modules at the given paths by adapters over them, and let ``trained`` train."""
    model.freeze()
    for adapter in adapters.values():
        adapter.train(model.training)
        adapter.base.freeze()  # it may be a new one
    model.update_modules(tree_unflatten(list(adapters.items())))
    for module in trained.values():
        train_in_full(module)


def find_targets(
    model: nn.Module, target_modules: Sequence[str], num_layers: int, rank: int = 1
) -> dict[str, nn.Module]:
    """Return path → module for every module that gets an adapter, in the model's order; see ``choose_targets``."""
    return choose_targets(model, target_modules, num_layers, rank, {})[0]


def choose_targets(
    model: nn.Module,
    target_modules: Sequence[str],
    num_layers: int,
    rank: int,
    unusable: Mapping[str, str],
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return path → module for every module that a target names, and path → reason for those that are skipped.

    A target is ``all-linear`` (every linear layer in the blocks but routers and narrow gates), a
    full path, or a suffix of one (``q_proj``, ``self_attn.q_proj``). ``num_layers`` limits targets
    inside the blocks to the last N of them.

    Args:
        model: Loaded, or a skeleton.
        target_modules: The names.
        num_layers: How many blocks, the last ones, or -1.
        rank: Gates that are narrower are left out of ``all-linear``.
        unusable: Path → reason for the layers that no adapter can replace, from ``find_unusable``.

    Raises:
        ConfigError: A target matches nothing, told with what exists; it matches only layers that
            can have no adapter; or ``num_layers`` exceeds the blocks.
    """
    inside = _blocks_by_module(model)
    candidates = {path: module for path, module in model.named_modules() if can_adapt(module)}

    # Routers and layers that are more than a linear map never get an adapter, whoever names them.
    reasons = dict.fromkeys(find_routers(model), "routers of experts") | dict(unusable)
    for name in target_modules:
        hits = [path for path in candidates if path == name or path.endswith(f".{name}")]
        if hits and all(path in reasons for path in hits):
            raise ConfigError(
                f"target_modules: {name} can't be adapted ({reasons[hits[0]]}): leave {name} out"
            )

    # Gates with a handful of outputs are left out of all-linear only.
    linear = {
        path for path, m in candidates.items() if id(m) in inside and not isinstance(m, EMBEDDINGS)
    }
    for path in linear - reasons.keys():
        if is_narrow(candidates[path], rank):
            reasons[path] = "narrow gates"
    selected = _select(
        model, "target_modules", target_modules, num_layers, candidates, {ALL_LINEAR: linear}
    )

    named = {
        path
        for name in target_modules
        for path in selected
        if path == name or path.endswith(f".{name}")
    }
    skipped = {
        path: reason
        for path, reason in reasons.items()
        if path in selected and not (path in named and reason == "narrow gates")
    }
    targets = {path: module for path, module in selected.items() if path not in skipped}
    if target_modules and not targets:
        raise ConfigError(
            f"target_modules {list(target_modules)} match only layers that can't be adapted: name"
            " others"
        )
    return targets, skipped


def find_trained(
    model: nn.Module, train_modules: Sequence[str], num_layers: int
) -> dict[str, nn.Module]:
    """Return path → module for every module that is to train in full, in the model's order.

    A name is ``norms`` (every normalization), a full path, or a suffix of one; ``num_layers`` works
    as for targets.

    Raises: ConfigError as ``find_targets`` does, and for modules that are quantized.
    """
    leaves = {
        path: module
        for path, module in model.named_modules()
        if own_arrays(module) and not module.children()
    }
    norms = {path for path, module in leaves.items() if "Norm" in type(module).__name__}
    found = _select(model, "train_modules", train_modules, num_layers, leaves, {NORMS: norms})
    for path, module in found.items():
        if isinstance(module, QUANTIZED):
            raise ConfigError(
                f"train_modules: {path} is quantized, so it can't train in full: give it an adapter"
                " by target_modules, or load the model unquantized"
            )
    return found


def _select(
    model: nn.Module,
    setting: str,
    names: Sequence[str],
    num_layers: int,
    candidates: Mapping[str, nn.Module],
    aliases: Mapping[str, set[str]],
) -> dict[str, nn.Module]:
    """Return the candidates that the names stand for, in the model's order."""
    count = len(blocks_of(model))
    if num_layers > count:
        raise ConfigError(
            f"num_layers {num_layers} is above the model's {count} blocks: give 1 to {count}, or -1"
        )
    inside = _blocks_by_module(model)
    first = count - num_layers if num_layers > 0 else 0
    matched: dict[str, nn.Module] = {}
    for name in names:
        hits = aliases.get(name) or {
            path for path in candidates if path == name or path.endswith(f".{name}")
        }
        if not hits:
            suffixes = {path.rsplit(".", 1)[-1] for path in candidates}
            exists = ", ".join(
                [*(alias for alias, paths in aliases.items() if paths), *sorted(suffixes)]
            )
            raise ConfigError(
                f"{setting}: nothing matches {name!r}{nearest(name, suffixes)}; there are {exists}"
            )
        matched |= {
            path: candidates[path]
            for path in hits
            if inside.get(id(candidates[path]), count) >= first
        }
    if names and not matched:
        raise ConfigError(
            f"{setting} {list(names)} match nothing in the last {num_layers} blocks: raise"
            " num_layers"
        )
    return {path: matched[path] for path in reversed(list(candidates)) if path in matched}


def _blocks_by_module(model: nn.Module) -> dict[int, int]:
    """Return the id of every module inside a block → the block's number."""
    return {
        id(module): index
        for index, block in enumerate(blocks_of(model))
        for _, module in block.named_modules()
    }


def find_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return path → adapter for every adapter on ``model``."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}


def find_fully_trained(model: nn.Module) -> dict[str, Any]:
    """Return path → module for every module of ``model`` that trains in full."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, FullyTrained)
    }


def find_groups(model: nn.Module) -> dict[str, str]:
    """Return path → LoRA+ group for every parameter of an adapter and of a module that trains in full."""
    groups = {
        f"{path}.{name}": group
        for path, adapter in find_adapters(model).items()
        for name, group in adapter.groups.items()
    }
    for path, module in find_fully_trained(model).items():
        groups |= {f"{path}.{name}": "embedding" for name in own_arrays(module)}
    return groups


def trainable_summary(
    model: nn.Module, residuals: Mapping[str, tuple[float, float]] | None = None
) -> TrainableParams:
    """Count what trains in ``model``, and sort it into LoRA+'s groups.

    Raises: AdapterError where nothing trains, or something that belongs to no group.
    """
    trainable: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    groups = {name: group for name, group in find_groups(model).items() if name in trainable}
    if not groups:
        raise AdapterError("nothing trains in this model: attach adapters first")
    if stray := sorted(trainable.keys() - groups.keys()):
        raise AdapterError(
            f"{len(stray)} trainable parameters belong to no adapter, {stray[0]} first: freeze them"
        )
    size = sum(array.size for array in trainable.values())
    own = sum(
        adapter[name].size for adapter in find_adapters(model).values() for name in adapter.groups
    )
    return TrainableParams(groups, size, get_total_parameters(model) + own, residuals or {})
