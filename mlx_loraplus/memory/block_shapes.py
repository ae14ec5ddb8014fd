"""Find the sizes of a transformer block that determine its memory.

The parts of a block are recognized by the names and attributes that mlx-lm's models have in common.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..adapters.base_layers import EXPERTS, can_adapt, is_trained_layer, local_shape
from ..adapters.lora import Adapter
from ..adapters.trainable import find_adapters
from ..config import AdapterConfig
from ..kernels.delta_rule import PIECE
from .blocks import Block, Mixer

_OUT = ("o_proj", "out_proj", "dense", "wo")
_HEADS = ("n_heads", "num_heads", "num_attention_heads")
_KEY_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads")
_GATES = ("gate_proj", "up_proj")
_OTHER_GATES = ("gate_up_proj", "input_linear", "w1", "w3")
"""Gate and up of MLPs that do not have our gradient: in one layer, or under other names."""
_DOWN = ("down_proj", "output_linear", "w2")

# Arrays of the width of a gated MLP that its activation keeps for the gradient, with gate and up.
# Read from mlx-lm's code: silu also keeps its sigmoid, gpt-oss limits both and adds 1, and gelu
# keeps the tanh, and the products before and after it.
_SILU_ARRAYS = 3
_KEPT_BY_ACTIVATION = {"SwigluOAI": 7, "GeGLU": 8}

# Arrays of all scores that attention keeps, and that its gradient needs, where it is not ours. With
# a mask that is an array, MLX keeps the probabilities. Sinks add a column, so that each array is
# copied. A soft cap of the scores keeps its tanh as well.
_OURS = (0.0, 0.0)
_MASKED = (1.1, 4.3)
_WITH_SINKS = (1.1, 6.0)
_WITH_CAP = (2.2, 6.0)

_MAMBA_STEP = 256  # tokens whose decays mlx-lm computes at a time


@dataclass
class Layers:
    """The linear layers of a block, and the parts of the block that they belong to.

    Attributes:
        modules: Path → module, of the whole block.
        bases: Path → linear layer.
        out: Path of the output layer of attention, or else of a recurrent layer, or None.
        attention: The module of attention, or the block.
        recurrent: The module of the recurrent layer, or None. A block may have both.
    """

    modules: dict[str, Any]
    bases: dict[str, Any]
    out: str | None
    attention: Any
    recurrent: Any

    def parent(self, path: str) -> str:
        """Return the path of the module that holds a layer."""
        return path.rpartition(".")[0]

    def rows_of(self, *names: str) -> int:
        """Return the rows of attention's first layer with one of these names, or 0."""
        for path, base in self.bases.items():
            if self.out and self.parent(path) == self.parent(self.out) and _last(path) in names:
                return local_shape(base)[0]
        return 0


def read_block(
    block: nn.Module, cache: Any, chosen: Mapping[int, type[Adapter]], config: AdapterConfig
) -> Block:
    """Return the sizes of a block.

    Args:
        block: The block.
        cache: What its attention uses as a cache, or None.
        chosen: The adapter of each layer that has one or is going to, by the layer's id.
        config: The adapters' settings.
    """
    layers = _find_layers(block)
    out, attention = layers.out, layers.attention
    mixer = _read_mixer(layers.recurrent)

    # Attention.
    is_attention = out is not None and attention is not layers.recurrent
    heads = (attribute(attention, *_HEADS) or 0) if is_attention else 0
    queries = local_shape(layers.bases[out])[1] if out and is_attention else 0
    key_heads = attribute(attention, *_KEY_HEADS) or heads
    keys = queries * key_heads // heads if heads else 0
    if out:
        hidden = local_shape(layers.bases[out])[0]
    else:
        hidden = local_shape(next(iter(layers.bases.values())))[1]

    # MLPs, experts, and what adapters save.
    routed = max(
        attribute(module, "top_k", "num_experts_per_tok", "top_k_experts") or 1
        for module in layers.modules.values()
    )
    mlp, joined, experts = _read_mlps(layers, routed)
    shapes = [
        (*local_shape(base), routed if isinstance(base, EXPERTS) else 1)
        for base in layers.bases.values()
    ]
    inputs, outputs = _read_adapters(layers, chosen, config, routed)
    if mixer:
        outputs += _mixer_kept(layers.recurrent, mixer)
    if is_attention and layers.rows_of("q_proj") == 2 * queries:
        outputs += 3 * queries  # the gate of attention's output, its sigmoid, and their product

    # Norms of the residual stream, and of queries and keys.
    norms = (m for m in layers.modules.values() if "Norm" in type(m).__name__ and "weight" in m)
    has_qk_norm = "q_norm" in attention or getattr(attention, "use_qk_norm", False)
    return Block(
        hidden=hidden,
        norms=sum(norm["weight"].size == hidden for norm in norms),
        heads=heads,
        queries=queries,
        keys=keys,
        kept_twice=has_qk_norm or "qkv_proj" in attention,
        window=cache.max_size if isinstance(cache, RotatingKVCache) else None,
        whole_scores=_whole_scores(attention, cache) if heads else _OURS,
        mlp=mlp,
        joined=joined,
        experts=experts,
        expert_arrays=_expert_arrays(layers),
        routed=routed,
        widest=max(rows * times for rows, _, times in shapes),
        products=sum(rows * columns * times for rows, columns, times in shapes),
        inputs=inputs,
        outputs=outputs,
        mixer=mixer,
    )


def _find_layers(block: nn.Module) -> Layers:
    """Return the linear layers of a block, its attention and its recurrent layer."""
    modules, bases = dict(block.named_modules()), dict(layers_of(block))
    recurrent = next((module for module in modules.values() if _read_mixer(module)), None)

    # The output layers of attention, and then that of a recurrent layer.
    found: list[str] = []
    for path in bases:
        parent = modules.get(path.rpartition(".")[0])  # None if it is a list
        if _last(path) in _OUT and attribute(parent, *_HEADS, "num_v_heads"):
            found.append(path)
    found.sort(key=lambda path: modules[path.rpartition(".")[0]] is recurrent)

    out = found[0] if found else None
    attention = modules[out.rpartition(".")[0]] if out else block
    return Layers(modules, bases, out, attention, recurrent)


def _read_mlps(layers: Layers, routed: int) -> tuple[int, int, int]:
    """Return F of all gated MLPs, of those without our gradient, and of the experts."""
    mlp = joined = experts = 0
    for path, base in layers.bases.items():
        rows, name = local_shape(base)[0], _last(path)
        if name not in (*_GATES, *_OTHER_GATES):
            continue
        if isinstance(base, EXPERTS):
            experts += rows * routed
        else:
            mlp += rows
            joined += rows if name in _OTHER_GATES else 0
    return mlp // 2, joined // 2, experts // 2


def _read_adapters(
    layers: Layers,
    chosen: Mapping[int, type[Adapter]],
    config: AdapterConfig,
    routed: int,
) -> tuple[int, int]:
    """Return the elements per token saved from the inputs and from the outputs of layers."""
    inputs: dict[Any, int] = {}
    outputs = 0
    out = layers.out
    gates = (*_GATES, *_OTHER_GATES)
    for path, base in layers.bases.items():
        name, parent = _last(path), layers.parent(path)
        rows, columns = local_shape(base)
        times = routed if isinstance(base, EXPERTS) else 1

        # The outputs of layers outside attention and MLPs.
        outside = out is None or parent != layers.parent(out)
        if outside and name not in (*gates, *_DOWN):
            outputs += rows

        if id(base) not in chosen:
            continue
        of_given, of_returned, of_rank = chosen[id(base)].saved_activations
        given = of_given * columns * times
        outputs += of_returned * rows * times + of_rank * (config.rank or 0)
        if config.dropout:
            inputs[path] = 2 * given
        elif given and path != out:
            # Sibling layers share the same input.
            inputs[parent, columns, name in _DOWN] = given
    return sum(inputs.values()), outputs


def _expert_arrays(layers: Layers) -> int:
    """Return the arrays that the activation of the experts keeps."""
    for path, base in layers.bases.items():
        if isinstance(base, EXPERTS) and _last(path) in _GATES:
            activation = getattr(layers.modules.get(layers.parent(path)), "activation", None)
            return _KEPT_BY_ACTIVATION.get(type(activation).__name__, _SILU_ARRAYS)
    return 0


def _whole_scores(attention: Any, cache: Any) -> tuple[float, float]:
    """Return the arrays of all scores that attention keeps, and that its gradient needs."""
    if getattr(attention, "attn_logit_softcapping", None):
        return _WITH_CAP
    if "sinks" in attention:
        return _WITH_SINKS
    is_latent = attribute(attention, "kv_lora_rank") is not None
    if is_latent or not isinstance(cache, KVCache | RotatingKVCache):
        return _MASKED
    return _OURS


def _read_mixer(module: Any) -> Mixer | None:
    """Return the sizes of a recurrent layer, or None if the module is not one."""
    if module is None:
        return None

    # The gated delta rule, whose backward pass computes the states of a piece again.
    if "head_v_dim" in vars(module) and attribute(module, "num_v_heads"):
        values = module.num_v_heads * module.head_v_dim
        width = 2 * module.num_k_heads * module.head_k_dim + values
        state = values * module.head_k_dim
        return Mixer(width, PIECE, state, 4.5, adds_up=False, decay_heads=0)

    # Mamba 2, which has decays between all tokens of a piece, and adds up the states of its pieces.
    size = attribute(module, "ssm_state_size")
    if size and attribute(module, "num_heads") and "conv1d" in module:
        heads, width = module.num_heads, module.intermediate_size
        state = heads * module.head_dim * size
        return Mixer(width, _MAMBA_STEP, state, 1.0, adds_up=True, decay_heads=heads)
    return None


def _mixer_kept(module: Any, mixer: Mixer) -> int:
    """Return the elements per token that a recurrent layer keeps besides its states.

    These are the arrays around its convolution, and its normalized or repeated inputs and outputs.
    """
    if attribute(module, "ssm_state_size"):
        return 8 * mixer.width + 2 * module.num_heads * module.ssm_state_size
    values = module.num_v_heads * module.head_v_dim
    repeated = 2 * module.num_v_heads * module.head_k_dim
    return 4 * mixer.width + repeated + 7 * values


def layers_of(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the path and the base of every linear layer in a block, with or without an adapter.

    A layer that trains in full is yielded as it is.
    """
    adapters = find_adapters(block)
    for path, module in block.named_modules():
        if path in adapters:
            yield path, adapters[path].base
        elif path.rpartition(".")[0] in adapters:
            continue
        elif can_adapt(module) or is_trained_layer(module):
            yield path, module


def attribute(module: Any, *names: str) -> int | None:
    """Return the module's first attribute of these names that is an integer, or None."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def _last(path: str) -> str:
    """Return the last name of a path."""
    return path.rpartition(".")[2]
