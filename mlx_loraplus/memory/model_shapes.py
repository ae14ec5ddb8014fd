"""Measure the sizes that determine memory, on a loaded model or a skeleton without weights."""

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..adapters.attach import check_rank, required_layer_class
from ..adapters.base_layers import (
    EMBEDDINGS,
    LINEARS,
    base_shape,
    blocks_of,
)
from ..adapters.full import check_full, trained_modules
from ..adapters.lora import Adapter, LoRA
from ..adapters.target_modules import find_targets, find_trained
from ..adapters.trainable import find_adapters, find_fully_trained
from ..config import AdapterConfig
from ..data.model_limits import limits_of
from ..errors import ModelError
from .block_shapes import attribute, layers_of, read_block
from .estimate import Sizes

_Targets = list[tuple[Any, type[Adapter]]]
"""The layers with an adapter, each with the class of its adapter."""


def measure(
    model: nn.Module,
    config: AdapterConfig,
    itemsize: int | None = None,
    original: str = "an unquantized model",
) -> Sizes:
    """Measure the sizes of a model, with its own adapters or with those that ``config`` describes.

    Args:
        model: A loaded model, or a skeleton.
        config: The adapters' settings, with the defaults filled in.
        itemsize: For a skeleton, the bytes per floating-point number after loading.
        original: Name of the unquantized model, for the error message of adapter full.

    Raises:
        ConfigError: A target matches nothing, or the rank is too large for every target.
        ModelError: The structure of the model is not supported.
    """
    if config.adapter == "full":
        check_full(model, config.num_layers, original)
    try:
        return _measure(model, config, itemsize)
    except (AttributeError, KeyError, StopIteration, TypeError) as problem:
        kind = getattr(model, "model_type", type(model).__name__)
        raise ModelError(
            f"no memory can be planned for a model of type {kind}: {problem!r:.80}"
        ) from None


def _measure(model: nn.Module, config: AdapterConfig, itemsize: int | None) -> Sizes:
    """Measure the sizes of a model with adapters, or call ``_measure_full``."""
    if config.adapter == "full":
        return _measure_full(model, config, itemsize)

    # The layers with an adapter, and the modules that train in full. Such a module saves its input,
    # as a LoRA layer does.
    assert config.rank is not None
    attached = find_adapters(model)
    targets: _Targets = [(adapter.base, type(adapter)) for adapter in attached.values()]
    if not attached:
        targets = _find_targets(model, config)
    full = find_fully_trained(model) or find_trained(model, config.train_modules, config.num_layers)
    chosen: dict[int, type[Adapter]] = dict.fromkeys(map(id, full.values()), LoRA)
    chosen |= {id(module): layer for module, layer in targets}

    # The trainable parameters. If they are already attached, they are among the weights.
    trained: list[tuple[int, ...]] = []
    weights = weight_bytes(model, itemsize)
    if attached:
        trained += [array.shape for array in _arrays(model.trainable_parameters())]
        weights -= 4 * sum(map(math.prod, trained))
    else:
        for module, layer in targets:
            trained += layer.shapes(module, config.rank).values()
        for module in full.values():
            trained += [array.shape for array in _arrays(module.parameters())]
            weights -= weight_bytes(module, itemsize)

    # The blocks from the first one that trains on save activations.
    passes = _passes(model)
    learns = [any(id(module) in chosen for module in block.modules()) for block, _ in passes]
    embeddings, head = find_ends(model)
    if id(embeddings) in chosen:
        learning = len(passes)
    else:
        learning = len(passes) - learns.index(True) if True in learns else 0

    return Sizes(
        weights=weights,
        itemsize=itemsize or _smallest_itemsize(model),
        hidden=base_shape(head)[1],
        vocabulary=base_shape(head)[0],
        sliced=id(head) not in chosen,
        capped=_is_capped(model),
        trained=tuple(trained),
        shared=_count_frozen(targets, config),
        adapted=tuple(sorted(_base_size(module, itemsize) for module, _ in targets)),
        bits=_bits_of([module for module, _ in targets]),
        blocks=tuple(read_block(block, cache, chosen, config) for block, cache in passes),
        learning=learning,
        context=limits_of(model, skeleton=True).longest,
    )


def _find_targets(model: nn.Module, config: AdapterConfig) -> _Targets:
    """Return the modules that will get an adapter, each with its layer class.

    Raises:
        ConfigError: A target matches nothing, or the rank is too large for every target.
    """
    found = find_targets(model, config.target_modules, config.num_layers, config.rank or 1)

    # Check only the largest target, because only the loaded model shows which small ones get no
    # adapter in the end.
    largest = max(found, key=lambda path: min(base_shape(found[path])), default=None)
    if largest is not None:
        check_rank(largest, found[largest], config)
    return [
        (module, required_layer_class(config.adapter, module, path))
        for path, module in found.items()
    ]


def _count_frozen(targets: _Targets, config: AdapterConfig) -> int:
    """Return how many frozen float32 values adapters hold.

    These are the frozen extras of each layer, the start of PiSSA, and the shared projections.
    """
    assert config.rank is not None
    count = 0
    for module, layer in targets:
        for name, shape in layer.shapes(module, config.rank).items():
            copies = (name in layer.frozen_extras) + (config.init == "pissa")
            count += copies * math.prod(shape)

    # The projections are as large as the largest layer needs.
    if any(layer.make_projections for _, layer in targets):
        shapes = [base_shape(module) for module, _ in targets]
        count += config.rank * (max(rows for rows, _ in shapes) + max(size for _, size in shapes))
    return count


def _base_size(module: Any, itemsize: int | None) -> tuple[int, int]:
    """Return the elements of the weight of an adapter's base, and the bytes of the base."""
    elements = math.prod((*module.weight.shape[:-2], *base_shape(module)))
    return elements, weight_bytes(module, itemsize)


def _bits_of(bases: Sequence[Any]) -> int:
    """Return the bits per number of the largest weight; 16 if it is not quantized."""
    largest = max(bases, key=lambda base: math.prod(base_shape(base)), default=None)
    return getattr(largest, "bits", 16)


def _smallest_itemsize(model: nn.Module) -> int:
    """Return the bytes of the smallest type among a model's floating-point arrays."""
    arrays = _arrays(model.parameters())
    return min(array.itemsize for array in arrays if mx.issubdtype(array.dtype, mx.floating))


def _measure_full(model: nn.Module, config: AdapterConfig, itemsize: int | None) -> Sizes:
    """Measure the sizes of a model whose weights train, all or those of its last blocks.

    A trained weight takes 4 bytes: float32, or half precision with as much for its compensation.
    """
    full = trained_modules(model, config.num_layers)

    # The arrays of each module, without those of the modules inside it.
    trained: list[mx.array] = []
    for module in full.values():
        trained += [value for value in module.values() if isinstance(value, mx.array)]
    size = itemsize or _smallest_itemsize(model)
    weights = weight_bytes(model, itemsize) - sum(array.size * size for array in trained)

    # A layer saves its input for the gradient of its weight, as a LoRA layer does.
    chosen: dict[int, type[Adapter]] = dict.fromkeys(map(id, full.values()), LoRA)
    passes = _passes(model)
    learning = len(passes) if config.num_layers == -1 else config.num_layers
    _, head = find_ends(model)
    return Sizes(
        weights=max(0, weights),
        itemsize=size,
        hidden=base_shape(head)[1],
        vocabulary=base_shape(head)[0],
        sliced=id(head) not in chosen,
        capped=_is_capped(model),
        trained=tuple(array.shape for array in trained),
        shared=0,
        adapted=(),
        bits=16,
        blocks=tuple(read_block(block, cache, chosen, config) for block, cache in passes),
        learning=learning,
        context=limits_of(model, skeleton=True).longest,
    )


def find_ends(model: nn.Module) -> tuple[Any, Any]:
    """Return the embedding of the tokens and the output head, which may be the same layer.

    They are identified by type and shape, because their names differ between models. The embedding
    is outside the blocks and has a row for each token of the vocabulary. The head is a linear layer
    outside the blocks with the same shape.

    Raises:
        KeyError: There is no such embedding.
    """
    inside = {id(module) for block in blocks_of(model) for module in block.modules()}
    outside = [base for _, base in layers_of(model) if id(base) not in inside]
    embeddings = [base for base in reversed(outside) if isinstance(base, EMBEDDINGS)]
    vocabulary = _vocabulary(model)
    tables = [base for base in embeddings if base_shape(base)[0] == vocabulary] or embeddings
    if not tables:
        raise KeyError("no embedding outside the blocks")

    # Some families have a second, wider table that holds an entry for each layer.
    table = min(tables, key=lambda base: base_shape(base)[1])

    # The head has the same shape, or else the same number of rows. Without one, it is the table.
    linear = [base for base in outside if isinstance(base, LINEARS)]
    heads = [base for base in linear if base_shape(base) == base_shape(table)]
    if not heads:
        heads = [base for base in linear if base_shape(base)[0] == base_shape(table)[0]]
    return table, heads[0] if heads else table


def _vocabulary(model: nn.Module) -> int | None:
    """Return the vocabulary size from the model's arguments; those of its text part come first."""
    for part in (getattr(model, "language_model", None), model, getattr(model, "model", None)):
        for name in ("args", "config"):
            size = attribute(getattr(part, name, None), "vocab_size", "num_vocab")
            if size:
                return size
    return None


def _is_capped(model: nn.Module) -> bool:
    """Return whether the logits have a soft cap, from the model's arguments."""
    outer = getattr(model, "language_model", model)
    return bool(getattr(getattr(outer, "args", None), "final_logit_softcapping", None))


def _passes(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Return every pass through a block, with the cache that the pass uses.

    A looped model runs its blocks several times and has a cache for each pass. Blocks that share
    the keys and values of earlier blocks have no cache of their own. They use the last cache of a
    block with the same kind of attention.
    """
    caches, blocks = make_prompt_cache(model), blocks_of(model)
    if len(caches) >= len(blocks):
        loops = len(caches) // len(blocks)
        return list(zip(blocks * loops, caches, strict=False))

    # The first blocks have a cache each. The others use the last cache of their kind.
    last = caches[-1] if caches else None
    latest: dict[Any, Any] = {}
    passes: list[tuple[nn.Module, Any]] = []
    for index, block in enumerate(blocks):
        kind = _attention_kind(block)
        if index < len(caches):
            latest[kind] = caches[index]
        passes.append((block, latest.get(kind, last)))
    return passes


def _attention_kind(block: nn.Module) -> Any:
    """Return a block's kind of attention: its layer type, or whether it uses a sliding window."""
    for module in block.modules():
        for name in ("layer_type", "is_sliding", "use_sliding"):
            value = getattr(module, name, None)
            if isinstance(value, str | bool):
                return value
    return None


def stored_itemsize(config: dict[str, Any]) -> int:
    """Return the bytes of a floating-point number in a model's files, as its config says.

    The machine may load the weights in another type.
    """
    text = config.get("text_config")
    parts = [config, text if isinstance(text, dict) else {}]
    named = [part.get(name) for part in parts for name in ("dtype", "torch_dtype")]
    return 4 if next(filter(None, named), None) == "float32" else 2


def weight_bytes(module: nn.Module, itemsize: int | None = None) -> int:
    """Return the bytes of a module's parameters.

    Each element takes e bytes. n quantized elements take n bits / 8 + 2 e n / group: the packed
    codes, and a scale and a bias for each group.

    Args:
        module: The module.
        itemsize: e; by default the present size of the floating-point elements.
    """
    total = 0
    for array in _arrays(module.parameters()):
        is_floating = mx.issubdtype(array.dtype, mx.floating)
        total += array.size * itemsize if itemsize and is_floating else array.nbytes
    return total


def _arrays(tree: Any) -> Sequence[mx.array]:
    """Return the arrays in a tree of parameters."""
    return [array for _, array in tree_flatten(tree)]  # pyright: ignore[reportReturnType]
