"""The front of a model: a small model of its first blocks, for trials on a few tokens."""

from typing import Any

import mlx.nn as nn

from ..adapters.base_layers import EMBEDDINGS, LINEARS, blocks_of
from ..adapters.dropout import Dropout
from ..adapters.lora import Adapter
from ..models.loading import shared_copy


def front_of(model: nn.Module, *, blocks: int, rows: int) -> nn.Module | None:
    """Return a copy of a model's first blocks, in evaluation mode. It shares the model's arrays.

    Args:
        model: The model.
        blocks: The number of blocks. More are kept if they are needed to include every kind of
            block.
        rows: The rows of the embeddings and the head to keep, unless these have adapters.

    Returns:
        The copy, or None if the blocks are not in a list that can be shortened.
    """
    front = shared_copy(model)
    front.eval()

    # Find every list of the blocks.
    own = blocks_of(front)
    holders: list[tuple[Any, str]] = []
    for module in front.modules():
        for name, value in module.items():
            if isinstance(value, list) and value and value[0] is own[0]:
                holders.append((module, name))
    if not holders:
        return None

    # Shorten these lists, but keep a block of every kind.
    kinds = [_kind_of(block) for block in own]
    needed = max(kinds.index(kind) for kind in set(kinds)) + 1
    for module, name in holders:
        module[name] = module[name][: max(needed, blocks)]

    # Shorten the embeddings and the head.
    head = getattr(front, "lm_head", None)
    adapted = [module for module in front.modules() if isinstance(module, Adapter)]
    if not any(isinstance(adapter.base, EMBEDDINGS) or adapter is head for adapter in adapted):
        for module in front.modules():
            if isinstance(module, EMBEDDINGS) or (module is head and isinstance(head, LINEARS)):
                arrays: Any = module.parameters()
                module.update({name: array[:rows] for name, array in arrays.items()})
    return front


def _kind_of(block: nn.Module) -> str:
    """Return a key for a block's kind, made of its modules' types and its plain settings.

    Adapters make no difference, because often only the last blocks have them.
    """
    modules = block.named_modules()
    bases = {
        f"{path}.{module.child}": path for path, module in modules if isinstance(module, Adapter)
    }
    parts: list[str] = []
    for path, module in modules:
        if isinstance(module, Adapter | Dropout):
            continue
        settings = [
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, bool | int | str) and "idx" not in name
        ]
        parts.append(f"{bases.get(path, path)}:{type(module).__name__} {settings}")
    return " ".join(sorted(parts))
