"""Tensor parallel: a model's blocks divided among processes, for a model that one Mac can't hold.

The layers are MLX's own. Of N processes with x whole, the first of two linears has rows of W (q, k,
v, gate, up), the second columns (o, down), so that each pair needs a sum over the processes, Σ,
forwards, and others backwards:

    rows      y_n = x W_nᵀ + s (x A) B_n,            A whole, B split over out:   dx = Σ (y_n's part of it)
    columns   y = Σ (x_n W_nᵀ + s (x_n A_n) B),      A split over in, B whole:    the sum over ranks takes both along

What is split here is the work. Every process keeps A and B whole, as it keeps their moments: they
are small, every update rule (Muon and Adafactor look at whole matrices), clipping, the files and
resuming by another number of processes are those of one process, and at two processes the parts
alone would save a fourth of them. A process's gradient is its part's, zero elsewhere, so the
processes' gradients are added up, once a step. Nothing else is needed: the gradient of MLX's
``all_sum`` is the cotangent itself, which is right where every process computes the same loss.

Embeddings, norms and the head stay whole on every process.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_map_with_path

from ..config import AdapterConfig
from ..errors import ConfigError, ModelError
from .layers import EXPERTS, QUANTIZED, SHARDED, blocks_of
from .lora import ShardedLoRALinear

_ROWS, _COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
_GEMMAS = (
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
)  # mlx-lm can't shard them yet; their blocks are like Llama's


def shard_model(model: nn.Module, group: mx.distributed.Group) -> None:
    """Divide the blocks of a lazily loaded model as ``divide``, and load this process's part only."""
    divide(model, group)
    for block in blocks_of(
        model
    ):  # one after the other, or the whole tensors of many would be in memory together
        mx.eval(block.parameters())


def divide(model: nn.Module, group: mx.distributed.Group | None) -> nn.Module:
    """Return ``model``, its blocks divided among the processes of ``group``, if there is one; nothing is computed.

    Raises: ModelError where it can't be divided by so many.
    """
    if group is None:
        return model
    kind = getattr(model, "model_type", type(model).__name__)
    shard = getattr(model, "shard", None)
    if shard is None and kind not in _GEMMAS:
        raise ModelError(
            f"models of the kind {kind} can't be sharded: mlx-lm does not divide them; use parallel"
            " data"
        )
    if experts := [path for path, module in model.named_modules() if isinstance(module, EXPERTS)]:
        raise ModelError(
            f"models with experts ({experts[0]}) can't be sharded yet: use parallel data"
        )
    if problems := _indivisible(blocks_of(model)[0], group.size()):
        raise ModelError(
            f"this model can't be sharded over {group.size()} processes: {'; '.join(problems)}"
        )
    before = {path: _shapes(module) for path, module in model.named_modules()}
    if shard is not None:
        shard(group)
    else:
        _shard_gemma(model, group)
    for path, module in model.named_modules():
        if _shapes(module) != before.get(path) and not isinstance(module, SHARDED):
            raise ModelError(
                f"models of the kind {kind} can't be sharded: mlx-lm divides {path} in a way of"
                " its own"
            )
    return model


def check_sharded(config: AdapterConfig) -> None:
    """Raise ConfigError for adapters that a sharded model can't have."""
    if config.adapter != "lora":
        raise ConfigError(
            f"adapter {config.adapter} does not work with parallel tensor: use lora, or parallel"
            " data"
        )
    if config.init in ("pissa", "loftq"):
        raise ConfigError(
            f"init {config.init} needs whole weights, and parallel tensor divides them: use init1"
            " or init2"
        )
    if config.train_modules:
        raise ConfigError(
            "train_modules does not work with parallel tensor: leave it out, or use parallel data"
        )


def is_sharded(model: nn.Module) -> bool:
    """Tell whether ``model`` is divided among processes."""
    return any(isinstance(module, SHARDED) for _, module in model.named_modules())


def gradient_shares(model: nn.Module, gradients: dict[str, Any], processes: int) -> dict[str, Any]:
    """Return this process's shares of the gradients of a sharded model, which the processes add up to the whole.

    An adapter that is not sharded, on an embedding or the head, has its whole gradient in every
    process already.
    """
    parts = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, ShardedLoRALinear)
        for name in module.groups
    }
    return tree_map_with_path(lambda name, g: g if name in parts else g / processes, gradients)


def _indivisible(block: Any, processes: int) -> list[str]:
    """Say what of a block can't be divided."""
    problems = []
    for name in ("n_heads", "n_kv_heads"):
        heads = getattr(getattr(block, "self_attn", None), name, 0)
        if heads % processes:
            problems.append(f"it has {heads} {'key' if 'kv' in name else 'query'} heads")
    for path, layer in block.named_modules():
        name = path.rpartition(".")[2]
        if name in _ROWS and layer.weight.shape[0] % processes:
            problems.append(f"{name} has {layer.weight.shape[0]} outputs")
        if name in _COLUMNS and isinstance(layer, QUANTIZED) and layer.scales.shape[1] % processes:
            problems.append(
                f"{name} has {layer.scales.shape[1]} groups of {layer.group_size} inputs"
            )
        elif name in _COLUMNS and layer.weight.shape[1] % processes:
            problems.append(f"{name} has {layer.weight.shape[1]} inputs")
    return problems


def _shard_gemma(model: nn.Module, group: mx.distributed.Group) -> None:
    """Divide the blocks of a Gemma, as mlx-lm divides those of a Llama."""
    for block in blocks_of(model):
        for part in (block.self_attn, block.mlp):
            for name in (name for name in (*_ROWS, *_COLUMNS) if name in part):
                sharding = "all-to-sharded" if name in _ROWS else "sharded-to-all"
                part[name] = shard_linear(part[name], sharding, group=group)
        block.self_attn.n_heads //= group.size()
        block.self_attn.n_kv_heads //= group.size()


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in module.items() if isinstance(value, mx.array)}
