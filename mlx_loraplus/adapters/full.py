"""Train the weights themselves: no adapter, but every parameter, or those of the last blocks.

The weights keep their types. ``training/compensation.py`` says how bfloat16 weights are updated.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ConfigError, counted
from .base_layers import EMBEDDINGS, LINEARS, QUANTIZED, base_shape, blocks_of

WEIGHTS_GROUP, EMBEDDING_GROUP = "weights", "embedding"


def check_full(model: nn.Module, num_layers: int, original: str) -> None:
    """Check that the weights of a model, or those of its last blocks, can train.

    Args:
        model: A loaded model, or a skeleton.
        num_layers: The number of blocks that train, counted from the last; -1 for every parameter.
        original: Name of the unquantized model, for the error message.

    Raises:
        ConfigError: ``num_layers`` is too large, or a weight that should train is quantized.
    """
    blocks = blocks_of(model)
    if num_layers > len(blocks):
        raise ConfigError(
            f"--num-layers {num_layers} is above the model's {counted(len(blocks), 'block')}: give"
            f" 1 to {len(blocks)}, or -1"
        )

    # Rounded weights have no gradient. Where only the last blocks train, others may be quantized.
    for part in _parts_to_train(model, num_layers):
        for module in part.modules():
            if isinstance(module, QUANTIZED):
                raise ConfigError(
                    f"--adapter full trains weights, and those of this model have {module.bits}"
                    f" bits (mode {module.mode}): load {original}, or use --adapter lora"
                )


def unfreeze_weights(model: nn.Module, num_layers: int, original: str) -> None:
    """Make the weights of a model trainable, or those of its last blocks.

    The arguments and errors are those of ``check_full``.
    """
    check_full(model, num_layers, original)
    model.freeze()
    for part in _parts_to_train(model, num_layers):
        part.unfreeze()
    model.trains_weights = True


def trains_weights(model: nn.Module) -> bool:
    """Return whether the weights of a model train, or have been trained, without adapters."""
    return bool(getattr(model, "trains_weights", False))


def weight_groups(model: nn.Module) -> dict[str, str]:
    """Return path → group for each weight that trains without an adapter: weights or embedding.

    The group "embedding" holds the embeddings and the head.
    """
    if not trains_weights(model):
        return {}

    ends = _input_and_output(model)
    groups: dict[str, str] = {}
    trainable: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    for path in trainable:
        module = path.rpartition(".")[0]
        groups[path] = EMBEDDING_GROUP if module in ends else WEIGHTS_GROUP
    return groups


def trained_modules(model: nn.Module, num_layers: int) -> dict[str, nn.Module]:
    """Return path → module for every module whose own arrays train."""
    inside: set[int] = set()
    for part in _parts_to_train(model, num_layers):
        inside.update(id(module) for module in part.modules())

    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        has_arrays = any(isinstance(value, mx.array) for value in module.values())
        if id(module) in inside and has_arrays:
            found[path] = module
    return found


def _parts_to_train(model: nn.Module, num_layers: int) -> list[Any]:
    """Return the modules whose parameters all train: the model, or its last blocks."""
    return [model] if num_layers == -1 else blocks_of(model)[-num_layers:]


def _input_and_output(model: nn.Module) -> set[str]:
    """Return the paths of the embeddings, and of a head that has a row for each token."""
    inside = {id(module) for block in blocks_of(model) for module in block.modules()}
    outside = {path: each for path, each in model.named_modules() if id(each) not in inside}
    tables = {path: each for path, each in outside.items() if isinstance(each, EMBEDDINGS)}

    # The head has as many rows as an embedding.
    vocabularies = {base_shape(table)[0] for table in tables.values()}
    heads = {
        path
        for path, each in outside.items()
        if isinstance(each, LINEARS) and base_shape(each)[0] in vocabularies
    }
    return tables.keys() | heads
