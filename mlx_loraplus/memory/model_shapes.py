"""Measure the sizes that determine memory, on a loaded model or a skeleton without weights."""

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..adapters.adapter import Adapter
from ..adapters.attach import check_rank, layer_class
from ..adapters.full import check_full, trained_modules
from ..adapters.layers import (
    EMBEDDINGS,
    LINEARS,
    base_shape,
    blocks_of,
)
from ..adapters.lora import LoRA
from ..adapters.target_modules import find_targets, find_trained
from ..adapters.trainable import find_adapters, find_fully_trained
from ..config import AdapterConfig
from ..data.limits import limits_of
from ..errors import ModelError
from .block_shapes import attribute, layers_of, read_block
from .estimate import Sizes


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
        ConfigError: A target matches nothing, or the rank is too large for one.
        ModelError: The structure of the model is not supported.
    """
    if config.adapter == "full":
        check_full(model, config.num_layers, original)
    try:
        return _measure(model, config, itemsize)
    except (AttributeError, KeyError, StopIteration, TypeError) as problem:
        kind = getattr(model, "model_type", type(model).__name__)
        raise ModelError(
            f"no memory can be planned for a model of the kind {kind}: {problem!r:.80}"
        ) from None


def _measure(model: nn.Module, config: AdapterConfig, itemsize: int | None) -> Sizes:
    if config.adapter == "full":
        return _measure_full(model, config, itemsize)
    attached = find_adapters(model)
    assert config.rank is not None
    targets = [(adapter.base, type(adapter)) for adapter in attached.values()]
    if not attached:
        found = find_targets(model, config.target_modules, config.num_layers, config.rank)
        # Refuse a rank that is too large for every layer. Some small layers get no adapter in the
        # end, which only the loaded model shows.
        largest = max(found, key=lambda path: min(base_shape(found[path])), default=None)
        if largest is not None:
            check_rank(largest, found[largest], config)
        for path, module in found.items():
            targets.append((module, layer_class(config.adapter, module, path)))
    full = find_fully_trained(model) or find_trained(model, config.train_modules, config.num_layers)
    # A module that trains in full saves its input, as a LoRA layer does.
    chosen: dict[int, type[Adapter]] = dict.fromkeys(map(id, full.values()), LoRA)
    chosen |= {id(module): layer for module, layer in targets}
    shapes = [layer.shapes(module, config.rank) for module, layer in targets]
    # Frozen extras, and the start of PiSSA.
    shared = sum(
        math.prod(shape) * ((name in layer.frozen_extras) + (config.init == "pissa"))
        for named, (_, layer) in zip(shapes, targets, strict=True)
        for name, shape in named.items()
    )
    if any(layer.make_projections for _, layer in targets):
        shared += config.rank * sum(
            map(max, zip(*(base_shape(module) for module, _ in targets), strict=True))
        )
    weights = weight_bytes(model, itemsize)
    if attached:
        trained = [array.shape for array in _arrays(model.trainable_parameters())]
        weights -= 4 * sum(map(math.prod, trained))
    else:
        trained = [shape for named in shapes for shape in named.values()]
        trained += [
            array.shape for module in full.values() for array in _arrays(module.parameters())
        ]
        weights -= sum(weight_bytes(module, itemsize) for module in full.values())
    layers = _passes(model)
    blocks = [read_block(block, cache, chosen, config) for block, cache in layers]
    learns = [any(id(module) in chosen for module in block.modules()) for block, _ in layers]
    first = learns.index(True) if True in learns else len(blocks)
    embeddings, head = find_ends(model)
    return Sizes(
        weights=weights,
        itemsize=itemsize
        or min(
            a.itemsize for a in _arrays(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)
        ),
        hidden=base_shape(head)[1],
        vocabulary=base_shape(head)[0],
        sliced=id(head) not in chosen,
        capped=_is_capped(model),
        trained=tuple(trained),
        shared=shared,
        adapted=tuple(
            sorted(
                (
                    math.prod((*module.weight.shape[:-2], *base_shape(module))),
                    weight_bytes(module, itemsize),
                )
                for module, _ in targets
            )
        ),
        blocks=tuple(blocks),
        learning=len(blocks) if id(embeddings) in chosen else len(blocks) - first,
        context=limits_of(model, skeleton=True).longest,
    )


def _measure_full(model: nn.Module, config: AdapterConfig, itemsize: int | None) -> Sizes:
    """Measure the sizes of a model whose weights train, all or those of its last blocks.

    A trained weight takes 4 bytes: float32, or half precision with as much for its compensation.
    """
    full = trained_modules(model, config.num_layers)

    # The arrays of each module, without those of the modules inside it.
    trained: list[mx.array] = []
    for module in full.values():
        trained += [value for value in module.values() if isinstance(value, mx.array)]
    floating = [a for a in _arrays(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)]
    size = itemsize or min(array.itemsize for array in floating)
    weights = weight_bytes(model, itemsize) - sum(array.size * size for array in trained)

    # A layer saves its input for the gradient of its weight, as a LoRA layer does.
    chosen: dict[int, type[Adapter]] = dict.fromkeys(map(id, full.values()), LoRA)
    layers = _passes(model)
    learning = len(layers) if config.num_layers == -1 else config.num_layers
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
        blocks=tuple(read_block(block, cache, chosen, config) for block, cache in layers),
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
    heads = [
        base
        for base in outside
        if isinstance(base, LINEARS) and base_shape(base) == base_shape(table)
    ]
    if not heads:
        heads = [
            base
            for base in outside
            if isinstance(base, LINEARS) and base_shape(base)[0] == base_shape(table)[0]
        ]
    return table, heads[0] if heads else table


def _vocabulary(model: nn.Module) -> int | None:
    """Return the vocabulary size from the model's arguments; those of its text part come first."""
    for part in (getattr(model, "language_model", None), model, getattr(model, "model", None)):
        for name in ("args", "config"):
            if size := attribute(getattr(part, name, None), "vocab_size", "num_vocab"):
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
    kinds = [_attention_kind(block) for block in blocks]
    latest = {kind: cache for kind, cache in zip(kinds, caches, strict=False)}  # noqa: C416
    return [
        (
            block,
            (
                caches[index]
                if index < len(caches)
                else latest.get(kinds[index], caches[-1] if caches else None)
            ),
        )
        for index, block in enumerate(blocks)
    ]


def _attention_kind(block: nn.Module) -> Any:
    """Return a block's kind of attention: its layer type, or whether it uses a sliding window."""
    for module in block.modules():
        for name in ("layer_type", "is_sliding", "use_sliding"):
            if isinstance(value := getattr(module, name, None), str | bool):
                return value
    return None


def weight_bytes(module: nn.Module, itemsize: int | None = None) -> int:
    """Return the bytes of a module's parameters.

    Each number takes e bytes. n quantized numbers take n bits / 8 + 2 e n / group: the packed
    codes, and a scale and a bias for each group.

    Args:
        module: The module.
        itemsize: e; by default the present size of the floating-point numbers.
    """
    return sum(
        (
            array.size * itemsize
            if itemsize and mx.issubdtype(array.dtype, mx.floating)
            else array.nbytes
        )
        for array in _arrays(module.parameters())
    )


def _arrays(tree: Any) -> Sequence[mx.array]:
    return [array for _, array in tree_flatten(tree)]  # pyright: ignore[reportReturnType]
