"""Which modules the config of an adapter selects, by PEFT's rule, compared with those in its file.

The tensors in the file show what was adapted. PEFT itself reads only those of modules that its
config selects, and starts modules that are selected but not in the file anew.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..adapters.base_layers import EMBEDDINGS, EXPERTS, LINEARS
from ..adapters.stored_tensors import MISSING
from ..errors import AdapterError, counted
from .peft_import_tensors import PREFIX, PEFTConfig, StoredAdapter, may_take_long
from .transformers_names import hub_path

Selects = Callable[[str], Any]
"""A function from a module's name in PEFT to whether it is selected."""

_ALL_LINEAR = "all-linear"
_LONGEST_REGEX = 2000
_INDEX = r".*?\.[^.]*\.(\d+)\."  # the first number in a name is that of the block


def check_complete(
    found: StoredAdapter, config: PEFTConfig, model: nn.Module, folder: Path
) -> None:
    """Check that every layer that the config selects has an adapter.

    A name that layers of experts have is not checked: PEFT may adapt them alone.

    Raises:
        AdapterError: A layer has none.
    """
    selects = _selection_of(config)
    if selects is None:
        return

    prefix = "language_model." if hasattr(model, "language_model") else ""
    kind = str(getattr(model, "model_type", ""))
    plain: dict[str, str] = {}
    of_experts: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, EXPERTS):
            of_experts.add(path.rpartition(".")[2])
        elif isinstance(module, (*LINEARS, *EMBEDDINGS)):
            plain[path.removeprefix(prefix)] = hub_path(path, kind)

    for path, theirs in plain.items():
        is_saved = path in found.layers or f"{path}.weight" in found.learned
        if path.rpartition(".")[2] in of_experts or is_saved:
            continue
        if selects(theirs):
            raise AdapterError(
                f"{folder} is incomplete: {path}, which target_modules names, {MISSING}; get the"
                " adapter again, or name in target_modules only what it adapts"
            )


def find_unselected(config: PEFTConfig, tensors: Iterable[str], folder: Path) -> str | None:
    """Return a note on the layers in an adapter's file that its config does not select, or None.

    Args:
        config: The adapter's config.
        tensors: The names of the tensors in its file.
        folder: The adapter's folder, for messages.
    """
    selects = _selection_of(config)
    if selects is None or config.target_parameters:
        return None

    # PEFT may translate the names of experts, so they are not compared.
    adapted = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    names = sorted(name.removeprefix(PREFIX) for name in adapted if ".experts" not in name)
    unselected = [name for name in names if not selects(name)]
    if not unselected:
        return None
    return (
        f"note: {folder} has an adapter on {counted(len(names), 'layer')}, but the target_modules,"
        f" exclude_modules and layers_to_transform in its adapter_config.json select only"
        f" {len(names) - len(unselected):,} of them, without {unselected[0]:.120}: all of them are"
        " imported, but PEFT leaves out those that are not selected; correct adapter_config.json,"
        " or remove their tensors"
    )


def _selection_of(config: PEFTConfig) -> Selects | None:
    """Return PEFT's rule for which modules a config selects, or None if that is not known here."""
    selected, excluded = _matcher(config.target_modules), _matcher(config.exclude_modules or [])
    if selected is None or excluded is None:
        return None

    # Only names are restricted to some blocks: not a regular expression, and not a whole path.
    targets, blocks = config.target_modules, config.layers_to_transform
    if isinstance(targets, str) or blocks is None or blocks == []:
        return lambda name: selected(name) and not excluded(name)
    in_blocks = _block_matcher(blocks, config.layers_pattern)
    if in_blocks is None:
        return None
    return lambda name: (
        selected(name) and not excluded(name) and (name in targets or in_blocks(name))
    )


def _matcher(names: Any) -> Selects | None:
    """Return a function that matches a regular expression, or a list of names and their endings."""
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        endings = tuple(f".{name}" for name in names)
        return lambda name: f".{name}".endswith(endings)
    if not isinstance(names, str) or names.lower() == _ALL_LINEAR:
        return None
    return _compiled(names)


def _block_matcher(blocks: Any, patterns: Any) -> Selects | None:
    """Return a function that matches the modules of some blocks, given by their numbers."""
    numbers = [blocks] if isinstance(blocks, int) else blocks
    named = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(numbers, list) or not isinstance(named, list | None):
        return None

    # Without names of the lists of blocks, any list counts.
    regexes = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in named or ()] or [_INDEX]
    found = [_compiled(regex + ".*") for regex in regexes]
    if None in found:
        return None

    def is_in_blocks(name: str) -> bool:
        matches = [match for matches in found if matches and (match := matches(name))]
        return bool(matches) and int(matches[0][1]) in numbers

    return is_in_blocks


def _compiled(regex: str) -> Selects | None:
    """Return the full match of a regular expression; None if it is wrong or may take very long."""
    if may_take_long(regex, _LONGEST_REGEX):
        return None
    try:
        return re.compile(regex).fullmatch
    except re.error:
        return None
