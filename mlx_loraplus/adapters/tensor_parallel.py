"""Tensor parallel: divide a model's blocks among processes, for a model too large for one Mac.

The sharded layers are MLX's own. Each of the N processes has the whole x. Linear layers come in
pairs: the first (q, k, v, gate, up) is divided along the rows of W, and the second (o, down) along
its columns. Each pair then needs one sum over the processes, Σ, in the forward pass and one in the
backward pass:

    rows      y_n = x W_nᵀ + s (x A) B_n              A whole, B divided over out
              dx  = Σ (the gradient through y_n)
    columns   y   = Σ (x_n W_nᵀ + s (x_n A_n) B)      A divided over in, B whole
              the same Σ adds up both terms

For the adapters, only the work is divided. Every process holds the whole A and B and the
optimizer's moments. These are small: with two processes, dividing them would save only a quarter of
their memory. With whole matrices, the update rules (Muon and Adafactor need whole matrices),
clipping, the saved files and resuming with a different number of processes work the same as in a
single process.

A process computes the gradient of its part of A and B, and zero for the rest, so the processes sum
their gradients once per step. Nothing else is needed: the gradient of MLX's ``all_sum`` is the
cotangent itself, which is correct because every process computes the same loss.

Embeddings, norms and the head are not divided.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_map_with_path

from ..config import AdapterConfig
from ..errors import ConfigError, ModelError, counted
from .base_layers import EXPERTS, QUANTIZED, SHARDED, blocks_of
from .sharded_lora import ShardedLoRALinear

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_COLUMNS = ("o_proj", "down_proj")

# mlx-lm cannot shard these models yet; their blocks are like Llama's.
_GEMMAS = ("gemma", "gemma2", "gemma3", "gemma3_text")


def shard_model(model: nn.Module, group: mx.distributed.Group) -> None:
    """Divide a lazily loaded model with ``divide``, and load only this process's part."""
    divide(model, group)

    # Load one block at a time, so that only one block's whole tensors are in memory at once.
    for block in blocks_of(model):
        mx.eval(block.parameters())


def divide(model: nn.Module, group: mx.distributed.Group | None) -> nn.Module:
    """Divide the model's blocks among the processes of ``group``, without computing anything.

    Args:
        model: A lazily loaded model, or a skeleton.
        group: The processes; None does not change the model.

    Returns:
        The same model.

    Raises:
        ModelError: The model cannot be divided, or cannot be divided among this many processes.
    """
    if group is None:
        return model
    kind = getattr(model, "model_type", type(model).__name__)
    _check_divisible(model, kind, group.size())

    # Divide the blocks, with mlx-lm's own method if the model has one.
    before = {path: _shapes(module) for path, module in model.named_modules()}
    if hasattr(model, "shard"):
        shardable: Any = model
        shardable.shard(group)
    else:
        _shard_gemma(model, group)

    # Every layer that changed must have a type whose adapter can be divided too.
    for path, module in model.named_modules():
        has_changed = _shapes(module) != before.get(path)
        if has_changed and not isinstance(module, SHARDED):
            raise ModelError(
                f"models of type {kind} can't be sharded: mlx-lm divides {path} in a way that"
                " adapters do not support; use --parallel data"
            )
    return model


def check_sharded(config: AdapterConfig) -> None:
    """Check that a sharded model can have these adapters.

    Raises:
        ConfigError: Tensor parallel does not support one of the settings.
    """
    if config.adapter != "lora":
        raise ConfigError(
            f"--adapter {config.adapter} does not work with --parallel tensor: use --adapter lora,"
            " or --parallel data"
        )
    if config.init in ("pissa", "loftq"):
        raise ConfigError(
            f"--init {config.init} needs whole weights, and --parallel tensor divides them: use"
            " --init init1 or init2"
        )
    if config.train_modules:
        raise ConfigError(
            "--train-modules does not work with --parallel tensor: leave it out, or use --parallel"
            " data"
        )


def is_sharded(model: nn.Module) -> bool:
    """Return whether ``model`` is divided among processes."""
    return any(isinstance(module, SHARDED) for _, module in model.named_modules())


def gradient_shares(model: nn.Module, gradients: dict[str, Any], processes: int) -> dict[str, Any]:
    """Return this process's parts of a sharded model's gradients.

    The sum of all processes' parts is the whole gradient.

    Args:
        model: The sharded model.
        gradients: This process's gradients, as a tree.
        processes: Number of processes.
    """
    divided: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, ShardedLoRALinear):
            divided |= {f"{path}.{name}" for name in module.groups}

    # Every process has the whole gradient of the other adapters (on embeddings and the head), so
    # each process contributes gradient / processes.
    def part(name: str, gradient: mx.array) -> mx.array:
        return gradient if name in divided else gradient / processes

    return tree_map_with_path(part, gradients)


def _check_divisible(model: nn.Module, kind: str, processes: int) -> None:
    """Check that the model can be divided among ``processes``.

    Raises:
        ModelError: mlx-lm cannot shard the model, or a size is not a multiple of ``processes``.
    """
    if not hasattr(model, "shard") and kind not in _GEMMAS:
        raise ModelError(
            f"models of type {kind} can't be sharded: mlx-lm does not divide them; use"
            " --parallel data"
        )

    experts = [path for path, module in model.named_modules() if isinstance(module, EXPERTS)]
    if experts:
        raise ModelError(
            f"models with experts ({experts[0]}) can't be sharded yet: use --parallel data"
        )

    problems = _indivisible(blocks_of(model)[0], processes)
    if problems:
        raise ModelError(
            f"this model can't be sharded over {processes} processes: {'; '.join(problems)}; use"
            " another number of processes, or --parallel data"
        )


def _indivisible(block: Any, processes: int) -> list[str]:
    """Return a message for each size of a block that is not a multiple of ``processes``."""
    problems: list[str] = []

    # Each process gets whole heads.
    attention = getattr(block, "self_attn", None)
    for name, what in (("n_heads", "query"), ("n_kv_heads", "key")):
        heads = getattr(attention, name, 0)
        if heads % processes:
            problems.append(f"it has {counted(heads, f'{what} head')}")

    # Each process gets whole rows of a linear layer, or whole groups of its quantized columns.
    for path, layer in block.named_modules():
        name = path.rpartition(".")[2]
        if name in _ROWS:
            outputs = layer.weight.shape[0]
            if outputs % processes:
                problems.append(f"{name} has {outputs} outputs")
        elif name in _COLUMNS:
            groups = layer.scales.shape[1] if isinstance(layer, QUANTIZED) else 0
            columns = layer.weight.shape[1]
            if groups % processes:
                problems.append(f"{name} has {groups} groups of {layer.group_size} inputs")
            elif columns % processes:
                problems.append(f"{name} has {columns} inputs")
    return problems


def _shard_gemma(model: nn.Module, group: mx.distributed.Group) -> None:
    """Divide the blocks of a Gemma model as mlx-lm divides those of Llama."""
    ways = dict.fromkeys(_ROWS, "all-to-sharded") | dict.fromkeys(_COLUMNS, "sharded-to-all")
    for block in blocks_of(model):
        for part in (block.self_attn, block.mlp):
            for name, sharding in ways.items():
                if name in part:
                    part[name] = shard_linear(part[name], sharding, group=group)

        # Each process computes its part of the heads.
        block.self_attn.n_heads //= group.size()
        block.self_attn.n_kv_heads //= group.size()


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's own arrays by name."""
    return {name: value.shape for name, value in module.items() if isinstance(value, mx.array)}
