"""Read the sizes that memory follows from off a model, loaded or a skeleton without weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from .adapters.attach import blocks_of, find_adapters, find_fully_trained, find_targets, find_trained
from .adapters.base import EMBEDDINGS, EXPERTS, base_shape, can_adapt, local_shape
from .adapters.lora import Adapter
from .config import AdapterConfig
from .errors import ModelError
from .memory import Block, Sizes

_OUT = ("o_proj", "out_proj", "dense", "wo")


def measure(model: nn.Module, config: AdapterConfig, itemsize: int | None = None) -> Sizes:
    """Read the sizes off a model, with its adapters or with those that ``config`` asks for.

    Args:
        model: Loaded, or a skeleton.
        config: The adapters, its defaults filled in.
        itemsize: For a skeleton: bytes of the floating-point numbers it will be loaded with.

    Raises:
        ConfigError: A target that matches nothing.
        ModelError: The model is made in a way that is not known here.
    """
    try:
        return _measure(model, config, itemsize)
    except (AttributeError, KeyError, StopIteration, TypeError) as problem:
        kind = getattr(model, "model_type", type(model).__name__)
        raise ModelError(f"no memory can be planned for a model of the kind {kind}: {problem!r:.80}") from None


def _measure(model: nn.Module, config: AdapterConfig, itemsize: int | None) -> Sizes:
    attached = find_adapters(model)
    targets = {path: adapter.base for path, adapter in attached.items()}
    targets = targets or find_targets(model, config.target_modules, config.num_layers)
    full = find_fully_trained(model) or find_trained(model, config.train_modules, config.num_layers)
    chosen = {id(module) for module in (*targets.values(), *full.values())}
    weights = sum(_loaded_bytes(array, itemsize) for array in _arrays(model.parameters()))
    if attached:
        trained = [array.shape for array in _arrays(model.trainable_parameters())]
        weights -= 4 * sum(map(math.prod, trained))
    else:
        trained = [shape for module in targets.values() for shape in adapter_shapes(module, config)]
        whole = [array for module in full.values() for array in _arrays(module.parameters())]
        trained += [array.shape for array in whole]
        weights -= sum(_loaded_bytes(array, itemsize) for array in whole)
    caches = make_prompt_cache(model)
    blocks = [_read_block(block, cache, chosen, config) for block, cache in zip(blocks_of(model), caches, strict=True)]
    first = next((number for number, block in enumerate(blocks) if block.adapted), len(blocks))
    outer: Any = getattr(model, "language_model", model)
    embeddings = _base(outer.model.embed_tokens)
    head = _base(outer.get("lm_head", embeddings))
    return Sizes(
        weights=weights,
        itemsize=itemsize or _itemsize(model),
        hidden=base_shape(head)[1],
        vocabulary=base_shape(head)[0],
        sliced=id(head) not in chosen,
        trained=tuple(trained),
        shared=_shared_numbers(targets, config),
        blocks=tuple(blocks),
        learning=len(blocks) if id(embeddings) in chosen else len(blocks) - first,
        context=getattr(getattr(outer, "args", None), "max_position_embeddings", None),
    )


def adapter_shapes(module: Any, config: AdapterConfig) -> list[tuple[int, ...]]:
    """Return the shapes of what trains of an adapter on ``module``: A and B, DoRA's m, or VeRA's d and b."""
    assert config.rank is not None
    rows, columns = base_shape(module)
    experts = module.weight.shape[:-2]
    if config.adapter == "vera":
        return [(*experts, config.rank), (*experts, rows)]
    lengths = [(*experts, rows)] if config.adapter == "dora" else []
    if isinstance(module, EMBEDDINGS):
        return [(rows, config.rank), (config.rank, columns), *lengths]
    if experts:
        return [(*experts, config.rank, columns), (*experts, rows, config.rank), *lengths]
    return [(columns, config.rank), (config.rank, rows), *lengths]


def _shared_numbers(targets: Mapping[str, Any], config: AdapterConfig) -> int:
    """Count what adapters keep and do not train: VeRA's projections, DoRA's squares, PiSSA's start."""
    assert config.rank is not None
    shapes = [base_shape(module) for module in targets.values()]
    if config.adapter == "vera":
        return config.rank * sum(max(sides) for sides in zip(*shapes, strict=True))
    made = [shape for module in targets.values() for shape in adapter_shapes(module, config)]
    squares = sum(math.prod(shape) for shape in made[2::3]) if config.adapter == "dora" else 0
    return squares + (sum(map(math.prod, made)) if config.init == "pissa" else 0)


def _read_block(block: nn.Module, cache: Any, chosen: set[int], config: AdapterConfig) -> Block:
    """Read the sizes off a block; what it is made of is told by names and attributes that mlx-lm's models share."""
    layers = dict(_layers(block))
    modules = dict(block.named_modules())
    found: dict[str, int] = {}
    attentions, inputs, outputs, taken = set(), {}, 0, set()
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        heads = _attribute(modules[parent], "n_heads", "num_heads", "num_attention_heads")
        if name in _OUT and heads:
            keys = _attribute(modules[parent], "n_kv_heads", "num_key_value_heads", "num_kv_heads") or heads
            queries = local_shape(layer)[1]
            found |= {"heads": heads, "queries": queries, "keys": queries * keys // heads}
            attentions.add(parent)
            taken.add(path)
    routed = max((_attribute(module, "top_k", "num_experts_per_tok") or 1 for module in modules.values()), default=1)
    hidden = next(local_shape(layer)[1] for path, layer in layers.items() if path not in taken)
    mlp = experts = other = 0
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        rows, columns = local_shape(layer)
        times = routed if isinstance(layer, EXPERTS) else 1
        if name in ("gate_proj", "up_proj"):
            mlp, experts = (mlp, experts + rows * times) if isinstance(layer, EXPERTS) else (mlp + rows, experts)
        elif parent not in attentions and name != "down_proj":
            other += rows
        if id(layer) in chosen:
            outputs += rows * times + (config.rank or 0) * (config.adapter == "vera")
            if config.dropout:
                inputs[path] = 2 * columns * times
            elif path not in taken:
                inputs[parent, columns] = columns * times
    norms = [
        m for m in modules.values() if "Norm" in type(m).__name__ and getattr(m, "weight", mx.zeros(0)).size == hidden
    ]
    attention: Any = modules[next(iter(attentions), "")]
    return Block(
        hidden=hidden,
        norms=len(norms),
        heads=found.get("heads", 0),
        queries=found.get("queries", 0),
        keys=found.get("keys", 0),
        head_norms="q_norm" in attention or getattr(attention, "use_qk_norm", False),
        window=cache.max_size if isinstance(cache, RotatingKVCache) else None,
        native=not isinstance(cache, KVCache | RotatingKVCache),
        mlp=mlp // 2,
        experts=experts // 2,
        routed=routed,
        inputs=0 if config.adapter == "vera" else sum(inputs.values()),
        outputs=outputs if config.adapter != "lora" else 0,
        other=other,
        adapted=any(id(module) in chosen for module in modules.values()),
    )


def _layers(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the path and the base of every linear layer in a block, with or without an adapter."""
    adapters = find_adapters(block)
    for path, module in block.named_modules():
        if path in adapters:
            yield path, adapters[path].base
        elif can_adapt(module) and path.rpartition(".")[0] not in adapters:
            yield path, module


def _base(layer: Any) -> Any:
    return layer.base if isinstance(layer, Adapter) else layer


def _attribute(module: Any, *names: str) -> int | None:
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), int)), None)


def _arrays(tree: Any) -> Sequence[mx.array]:
    return [array for _, array in tree_flatten(tree)]  # pyright: ignore[reportReturnType]


def _loaded_bytes(array: mx.array, itemsize: int | None) -> int:
    if itemsize is None or not mx.issubdtype(array.dtype, mx.floating):
        return array.nbytes
    return array.size * itemsize


def _itemsize(model: nn.Module) -> int:
    """Return the bytes of a loaded model's activations: those of its smallest floating-point numbers."""
    return min(array.itemsize for array in _arrays(model.parameters()) if mx.issubdtype(array.dtype, mx.floating))
