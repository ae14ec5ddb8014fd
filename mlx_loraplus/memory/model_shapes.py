"""Measure the sizes that determine memory, on a loaded model or a skeleton without weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ..adapters.adapter import Adapter
from ..adapters.attach import layer_class
from ..adapters.full import check_full, trained_modules
from ..adapters.layers import (
    EMBEDDINGS,
    EXPERTS,
    LINEARS,
    base_shape,
    blocks_of,
    can_adapt,
    local_shape,
)
from ..adapters.lora import LoRA
from ..adapters.target_modules import find_targets, find_trained
from ..adapters.trainable import find_adapters, find_fully_trained
from ..config import AdapterConfig
from ..data.limits import limits_of
from ..errors import ModelError
from .estimate import Block, Sizes

_OUT = ("o_proj", "out_proj", "dense", "wo")
_HEADS = ("n_heads", "num_heads", "num_attention_heads")
_KEY_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads")


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
        ConfigError: A target matches nothing.
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
    targets = [(adapter.base, type(adapter)) for adapter in attached.values()] or [
        (module, layer_class(config.adapter, module, path))
        for path, module in find_targets(
            model, config.target_modules, config.num_layers, config.rank
        ).items()
    ]
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
    blocks = [_read_block(block, cache, chosen, config) for block, cache in layers]
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
        trained=tuple(array.shape for array in trained),
        shared=0,
        adapted=(),
        blocks=tuple(_read_block(block, cache, chosen, config) for block, cache in layers),
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
    outside = [base for _, base in _layers(model) if id(base) not in inside]
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
            if size := _attribute(getattr(part, name, None), "vocab_size", "num_vocab"):
                return size
    return None


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


def _read_block(
    block: nn.Module, cache: Any, chosen: Mapping[int, type[Adapter]], config: AdapterConfig
) -> Block:
    """Return the sizes of a block.

    Its parts are recognized by the names and attributes that mlx-lm's models have in common.
    """
    modules, layers = dict(block.named_modules()), dict(_layers(block))
    parent = {path: path.rpartition(".")[0] for path in layers}
    out = next(
        (
            p
            for p in layers
            if p.rpartition(".")[2] in _OUT and _attribute(modules[parent[p]], *_HEADS)
        ),
        None,
    )
    attention: Any = block if out is None else modules[parent[out]]
    queries = 0 if out is None else local_shape(layers[out])[1]
    heads = _attribute(attention, *_HEADS) or 0 if out else 0
    keys = queries * (_attribute(attention, *_KEY_HEADS) or heads) // heads if heads else 0
    hidden = local_shape(layers[out])[0] if out else local_shape(next(iter(layers.values())))[1]
    routed = max(
        _attribute(module, "top_k", "num_experts_per_tok") or 1 for module in modules.values()
    )
    inputs: dict[Any, int] = {}
    mlp = experts = outputs = 0
    for path, layer in layers.items():
        name, (rows, columns) = path.rpartition(".")[2], local_shape(layer)
        times = routed if isinstance(layer, EXPERTS) else 1
        if name in ("gate_proj", "up_proj", "gate_up_proj"):
            mlp, experts = (
                (mlp, experts + rows * times)
                if isinstance(layer, EXPERTS)
                else (mlp + rows, experts)
            )
        elif (out is None or parent[path] != parent[out]) and name != "down_proj":
            outputs += rows
        if id(layer) in chosen:
            of_given, of_returned, of_rank = chosen[id(layer)].saved_activations
            given = of_given * columns * times
            outputs += of_returned * rows * times + of_rank * (config.rank or 0)
            if config.dropout:
                inputs[path] = 2 * given
            elif given and path != out:
                inputs[parent[path], columns] = given  # sibling layers share the same input
    norms = (m for m in modules.values() if "Norm" in type(m).__name__ and "weight" in m)
    return Block(
        hidden=hidden,
        norms=sum(norm["weight"].size == hidden for norm in norms),
        heads=heads,
        queries=queries,
        keys=keys,
        kept_twice="q_norm" in attention
        or getattr(attention, "use_qk_norm", False)
        or "qkv_proj" in attention,
        window=cache.max_size if isinstance(cache, RotatingKVCache) else None,
        native=not isinstance(cache, KVCache | RotatingKVCache),
        mlp=mlp // 2,
        experts=experts // 2,
        routed=routed,
        inputs=sum(inputs.values()),
        outputs=outputs,
    )


def _layers(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the path and the base of every linear layer in a block, with or without an adapter."""
    adapters = find_adapters(block)
    for path, module in block.named_modules():
        if path in adapters:
            yield path, adapters[path].base
        elif can_adapt(module) and path.rpartition(".")[0] not in adapters:
            yield path, module


def _attribute(module: Any, *names: str) -> int | None:
    return next(
        (getattr(module, name) for name in names if isinstance(getattr(module, name, None), int)),
        None,
    )


def _arrays(tree: Any) -> Sequence[mx.array]:
    return [array for _, array in tree_flatten(tree)]  # pyright: ignore[reportReturnType]
