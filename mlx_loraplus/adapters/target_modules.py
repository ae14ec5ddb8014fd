"""Find the modules that the settings ``target_modules`` and ``train_modules`` refer to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.nn as nn

from ..errors import ConfigError, counted, nearest
from .base_layers import EMBEDDINGS, QUANTIZED, blocks_of, can_adapt
from .excluded_layers import find_routers, is_narrow
from .unfreeze import own_arrays

ALL_LINEAR = "all-linear"
NORMS = "norms"

_ROUTER = "routers of experts"
_NARROW = "narrow gates"


@dataclass(frozen=True)
class _Candidates:
    """The modules that a setting can name.

    ``modules`` holds them by path, in the order of ``named_modules``. ``aliases`` holds the paths
    that a name such as ``all-linear`` refers to.
    """

    setting: str
    modules: Mapping[str, nn.Module]
    aliases: Mapping[str, set[str]]

    def matches(self, name: str) -> set[str]:
        """Return the paths that a name in the setting refers to.

        Raises:
            ConfigError: The name matches nothing.
        """
        hits = self.aliases.get(name) or set(_paths_named(name, self.modules))
        if hits:
            return hits

        suffixes = {path.rsplit(".", 1)[-1] for path in self.modules}
        names = [alias for alias, paths in self.aliases.items() if paths]
        exists = ", ".join([*names, *sorted(suffixes)])
        hint = nearest(name, [*names, *suffixes])
        raise ConfigError(f"{self.setting}: nothing matches {name!r}{hint}; there are {exists}")


def choose_targets(
    model: nn.Module,
    target_modules: Sequence[str],
    num_layers: int,
    rank: int,
    unusable: Mapping[str, str],
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return path → module for the targets, and path → reason for the targets that are skipped.

    A target is ``all-linear`` (every linear layer in the blocks except routers and narrow gates), a
    full path, or the end of a path (``q_proj``, ``self_attn.q_proj``).

    Args:
        model: A loaded model, or a skeleton.
        target_modules: The targets.
        num_layers: Use only this number of blocks, counted from the last; -1 uses all.
        rank: The adapters' rank, from which ``is_narrow`` decides which gates to leave out.
        unusable: Path → reason for the layers that no adapter can replace, from ``find_unusable``.

    Raises:
        ConfigError: A target matches nothing, or only layers that cannot be adapted; or
            ``num_layers`` is greater than the number of blocks.
    """
    modules = {path: module for path, module in model.named_modules() if can_adapt(module)}

    # Routers and unusable layers never get an adapter, even if a target names them.
    reasons = dict.fromkeys(find_routers(model), _ROUTER) | dict(unusable)
    for name in target_modules:
        _check_usable(name, modules, reasons)

    # Narrow gates are left out of all-linear only.
    linear = _linear_in_blocks(model, modules)
    for path in linear - reasons.keys():
        if is_narrow(modules[path], rank):
            reasons[path] = _NARROW

    candidates = _Candidates("--target-modules", modules, {ALL_LINEAR: linear})
    selected = _select(model, target_modules, num_layers, candidates)

    # A narrow gate that a target names gets an adapter.
    named: set[str] = set()
    for name in target_modules:
        named.update(_paths_named(name, selected))
    skipped: dict[str, str] = {}
    for path, reason in reasons.items():
        is_wanted = path in named and reason == _NARROW
        if path in selected and not is_wanted:
            skipped[path] = reason

    targets = {path: module for path, module in selected.items() if path not in skipped}
    if target_modules and not targets:
        raise ConfigError(
            f"--target-modules {list(target_modules)} match only layers that can't be adapted: name"
            " other modules"
        )
    return targets, skipped


def find_targets(
    model: nn.Module, target_modules: Sequence[str], num_layers: int, rank: int = 1
) -> dict[str, nn.Module]:
    """Return path → module for every module that gets an adapter; see ``choose_targets``."""
    targets, _ = choose_targets(model, target_modules, num_layers, rank, {})
    return targets


def find_trained(
    model: nn.Module, train_modules: Sequence[str], num_layers: int
) -> dict[str, nn.Module]:
    """Return path → module for every module that trains in full, in the model's order.

    A name is ``norms`` (every normalization layer), a full path, or the end of a path.
    ``num_layers`` has the same meaning as for ``choose_targets``.

    Raises:
        ConfigError: A name matches nothing, or matches a quantized module; or ``num_layers`` is
            greater than the number of blocks.
    """
    # Only modules without children can train in full.
    leaves = {path: module for path, module in model.named_modules() if _is_leaf(module)}
    norms = {path for path, module in leaves.items() if "Norm" in type(module).__name__}

    candidates = _Candidates("--train-modules", leaves, {NORMS: norms})
    found = _select(model, train_modules, num_layers, candidates)
    for path, module in found.items():
        if isinstance(module, QUANTIZED):
            raise ConfigError(
                f"--train-modules: {path} is quantized, so it can't train in full: give it an"
                " adapter by --target-modules, or load the model unquantized"
            )
    return found


def _is_leaf(module: nn.Module) -> bool:
    """Return whether a module has arrays and no children."""
    return bool(own_arrays(module)) and not module.children()


def _check_usable(name: str, modules: Mapping[str, nn.Module], reasons: Mapping[str, str]) -> None:
    """Check that a target does not match only layers that can't be adapted.

    Raises:
        ConfigError: None of the matching layers can be adapted.
    """
    hits = _paths_named(name, modules)
    if hits and all(path in reasons for path in hits):
        raise ConfigError(
            f"--target-modules: {name} can't be adapted ({reasons[hits[0]]}): leave {name} out"
        )


def _linear_in_blocks(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the paths of the linear and expert layers inside the blocks."""
    inside = _blocks_by_module(model)
    linear: set[str] = set()
    for path, module in modules.items():
        if id(module) in inside and not isinstance(module, EMBEDDINGS):
            linear.add(path)
    return linear


def _select(
    model: nn.Module, names: Sequence[str], num_layers: int, candidates: _Candidates
) -> dict[str, nn.Module]:
    """Return the candidates that the names refer to, in the model's order.

    Raises:
        ConfigError: A name matches nothing, or ``num_layers`` is out of range or too small.
    """
    count = len(blocks_of(model))
    if num_layers > count:
        raise ConfigError(
            f"--num-layers {num_layers} is above the model's {counted(count, 'block')}: give 1 to"
            f" {count}, or -1"
        )

    # A module outside the blocks gets the number after the last block, so it is never excluded.
    first = count - num_layers if num_layers > 0 else 0
    block_of = _blocks_by_module(model)
    matched: set[str] = set()
    for name in names:
        for path in candidates.matches(name):
            module = candidates.modules[path]
            if block_of.get(id(module), count) >= first:
                matched.add(path)

    if names and not matched:
        last = "block" if num_layers == 1 else counted(num_layers, "block")
        raise ConfigError(
            f"{candidates.setting} {list(names)} match nothing in the last {last}: raise"
            " --num-layers"
        )

    # named_modules lists the modules from last to first.
    in_order = reversed(list(candidates.modules))
    return {path: candidates.modules[path] for path in in_order if path in matched}


def _paths_named(name: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that equal ``name`` or end with it."""
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def _blocks_by_module(model: nn.Module) -> dict[int, int]:
    """Return the index of the block that holds each module, by the module's id."""
    numbers: dict[int, int] = {}
    for number, block in enumerate(blocks_of(model)):
        for _, module in block.named_modules():
            numbers[id(module)] = number
    return numbers
