"""Put adapters on a model, and count what trains: the census."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..config import AdapterConfig, checked
from ..errors import AdapterError, ConfigError, nearest
from .lora import Adapter, LoRAEmbedding, LoRALinear, LoRASwitchLinear, adapt, base_shape, can_adapt

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Census:
    """What trains in a model, and at which rate.

    ``groups`` maps the path of every trainable parameter to its LoRA+ group: ``lora_a`` (rate eta), ``lora_b`` (rate
    lambda * eta) or ``embedding`` (a rate of its own). It is the only place where that is decided.
    """

    groups: Mapping[str, str]
    trainable: int
    total: int

    def __str__(self) -> str:
        sizes = ", ".join(
            f"{list(self.groups.values()).count(name)} in {name}" for name in sorted(set(self.groups.values()))
        )
        share = 100 * self.trainable / self.total
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f}%); matrices: {sizes}"


def attach_adapters(model: nn.Module, config: AdapterConfig) -> Census:
    """Freeze ``model`` and put a LoRA adapter on every targeted module; the model's outputs do not change.

    Args:
        model: An mlx-lm model.
        config: Rank, alpha, dropout, ``target_modules`` and ``num_layers``.

    Returns:
        The census of what trains now.

    Raises:
        ConfigError: No module matches a target, ``num_layers`` or ``rank`` is too large. Nothing is attached then.
        AdapterError: The model has adapters already.
    """
    if find_adapters(model):
        raise AdapterError("the model has adapters already: fuse them or load the model again before attaching others")
    config = checked(config)
    targets = find_targets(model, config.target_modules, config.num_layers)
    for path, module in targets.items():
        if config.rank > min(base_shape(module)):
            raise ConfigError(
                f"rank {config.rank} is above {min(base_shape(module))}, the smaller side of {path}: lower the rank"
            )
    put_adapters(
        model, {path: adapt(module, config.rank, config.scale, config.dropout) for path, module in targets.items()}
    )
    return take_census(model)


def put_adapters(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Freeze ``model`` and replace the modules at the given paths by adapters over them."""
    model.freeze()
    for adapter in adapters.values():
        adapter.train(model.training)
    model.update_modules(tree_unflatten(list(adapters.items())))


def find_targets(model: nn.Module, target_modules: Sequence[str], num_layers: int) -> dict[str, nn.Module]:
    """Return path → module for every module that a target names, in the model's order.

    A target is ``all-linear`` (every linear layer in the blocks but the routers of experts), a full path, or a suffix
    of one (``q_proj``, ``self_attn.q_proj``). ``num_layers`` limits targets inside the blocks to the last N of them.

    Raises:
        ConfigError: A target that matches nothing, told with what exists; or ``num_layers`` above the model's blocks.
    """
    blocks: list[nn.Module] = blocks_of(model)
    if num_layers > len(blocks):
        raise ConfigError(
            f"num_layers {num_layers} is above the model's {len(blocks)} blocks: give 1 to {len(blocks)}, or -1"
        )
    inside = {id(module): index for index, block in enumerate(blocks) for _, module in block.named_modules()}
    first = len(blocks) - num_layers if num_layers > 0 else 0
    routers = _find_routers(model)
    matched: dict[str, nn.Module] = {}
    hits = dict.fromkeys(target_modules, 0)
    suffixes: set[str] = set()
    for path, module in model.named_modules():
        if not can_adapt(module):
            continue
        suffixes.add(path.rsplit(".", 1)[-1])
        block = inside.get(id(module))
        for target in target_modules:
            if target == ALL_LINEAR:
                hit = block is not None and not isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
                hit = hit and path not in routers
            else:
                hit = path == target or path.endswith(f".{target}")
            if hit:
                hits[target] += 1
                if block is None or block >= first:
                    matched[path] = module
    for target, count in hits.items():
        if not count:
            exists = ", ".join(sorted(suffixes))
            raise ConfigError(
                f"target_modules: nothing matches {target!r}{nearest(target, suffixes)}; there are all-linear, {exists}"
            )
    if not matched:
        raise ConfigError(
            f"target_modules {list(target_modules)} match nothing in the last {num_layers} blocks: raise num_layers"
        )
    return dict(reversed(matched.items()))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's transformer blocks, in order."""
    return list(model.layers)  # pyright: ignore[reportArgumentType]  every mlx-lm model has them


def _find_routers(model: nn.Module) -> set[str]:
    """Return the paths of the linear layers that choose among experts: one output for each expert beside them."""
    experts = {
        path: m.num_experts for path, m in model.named_modules() if isinstance(m, SwitchLinear | QuantizedSwitchLinear)
    }
    routers = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            beside = path.rpartition(".")[0] + "."
            if module.weight.shape[0] in {count for other, count in experts.items() if other.startswith(beside)}:
                routers.add(path)
    return routers


def find_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return path → adapter for every adapter on ``model``."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear | LoRAEmbedding | LoRASwitchLinear)
    }


def take_census(model: nn.Module) -> Census:
    """Count what trains in ``model``, and sort it into LoRA+'s groups.

    Raises:
        AdapterError: Nothing trains, or something trains that belongs to no group.
    """
    trainable: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    groups = {
        f"{path}.{name}": group
        for path, adapter in find_adapters(model).items()
        for name, group in adapter.groups.items()
        if f"{path}.{name}" in trainable
    }
    if not groups:
        raise AdapterError("nothing trains in this model: attach adapters first")
    if stray := sorted(trainable.keys() - groups.keys()):
        raise AdapterError(f"{len(stray)} trainable parameters belong to no adapter, {stray[0]} first: freeze them")
    return Census(groups, sum(array.size for array in trainable.values()), _count_parameters(model))


def _count_parameters(model: nn.Module) -> int:
    """Count a model's numbers, those of quantized weights as if unpacked, scales and biases of groups not at all."""
    total = 0
    for _, module in model.named_modules():
        own = {name: value for name, value in module.items() if isinstance(value, mx.array)}
        bits = getattr(module, "bits", None)
        if bits and "scales" in own:
            total += own["weight"].size * 32 // bits + (own["bias"].size if "bias" in own else 0)
        else:
            total += sum(value.size for value in own.values())
    return total
