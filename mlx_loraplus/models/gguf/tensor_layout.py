"""The layout of tensors in llama.cpp, and how it differs from that in mlx-lm.

Sources: llama.cpp's converter (``LlamaModel.permute``, ``Gemma3Model.norm_shift``,
``Qwen3NextModel.modify_tensors`` and ``_LinearAttentionVReorderBase``).
"""

from typing import Any

import numpy as np

from .architectures import ARCHITECTURES
from .delta_net import value_heads, value_rows


def in_other_layout(
    weight: np.ndarray, name: str, config: dict[str, Any], *, to_gguf: bool
) -> np.ndarray:
    """Convert a tensor between the layouts of mlx-lm and llama.cpp.

    The shape does not change. The caller adds or removes axes of size 1 (``gguf_shape``).

    Args:
        weight: The tensor.
        name: The tensor's name in GGUF.
        config: The model's config.
        to_gguf: If true, convert from mlx-lm's layout to llama.cpp's; if false, the reverse.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    if architecture.adds_one and name.endswith("norm.weight"):
        weight = weight + 1 if to_gguf else weight - 1

    # llama.cpp stores the decay rates A, mlx-lm stores log(-A)
    if name.endswith(".ssm_a"):
        weight = -np.exp(weight) if to_gguf else np.log(-weight)

    weight = in_row_order(weight, name, config, to_gguf=to_gguf)
    return in_column_order(weight, name, config, to_gguf=to_gguf)


def in_row_order(
    weight: np.ndarray, name: str, config: dict[str, Any], *, to_gguf: bool
) -> np.ndarray:
    """Return a matrix, or the B of its adapter, with its rows in the order of the other layout."""
    order = _row_order(name, len(weight), config)
    if order is None or len(order) != len(weight):  # a wrong shape is reported elsewhere
        return weight
    return np.ascontiguousarray(weight[order if to_gguf else np.argsort(order)])


def in_column_order(
    weight: np.ndarray, name: str, config: dict[str, Any], *, to_gguf: bool
) -> np.ndarray:
    """Return a matrix, or the A of its adapter, with its columns in the other layout's order."""
    if not name.endswith("ssm_out.weight") or not _tiles_value_heads(config):
        return weight
    order = value_rows(config)
    if len(order) != weight.shape[-1]:
        return weight
    return np.ascontiguousarray(weight[..., order if to_gguf else np.argsort(order)])


def gguf_shape(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> tuple[int, ...]:
    """Return a tensor's shape in GGUF, given its shape in mlx-lm."""
    if name.endswith(("ssm_conv1d.weight", "shortconv.conv.weight")):
        return shape[:2]
    if name.endswith((".ssm_a", ".ssm_d")) and config["model_type"] == "granitemoehybrid":
        return (*shape, 1)
    return shape


def _tiles_value_heads(config: dict[str, Any]) -> bool:
    """Return whether llama.cpp stores the value heads of linear attention in another order."""
    return config["model_type"] in ("qwen3_5", "qwen3_5_moe")


def _row_order(name: str, rows: int, config: dict[str, Any]) -> np.ndarray | None:
    """Return the row in mlx-lm of each row in GGUF, or None if the rows have the same order."""
    architecture = ARCHITECTURES[config["model_type"]]
    if architecture.is_interleaved and name.endswith(("attn_q.weight", "attn_k.weight")):
        # Row half · i + j of a head in mlx-lm is row 2 j + i in llama.cpp, where i is 0 or 1.
        half = config["head_dim"] // 2
        if rows % (2 * half):
            return None
        return np.arange(rows).reshape(-1, 2, half).swapaxes(1, 2).reshape(-1)

    return _value_order(name, rows, config) if _tiles_value_heads(config) else None


def _value_order(name: str, rows: int, config: dict[str, Any]) -> np.ndarray | None:
    """Return the row in mlx-lm of each row of a tensor with value heads; None for other tensors."""
    if name.endswith("attn_gate.weight"):
        return value_rows(config)
    if name.endswith(("ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias")):
        return value_heads(config)

    # The rows of the values come after those of the queries and keys.
    if name.endswith(("attn_qkv.weight", "ssm_conv1d.weight")):
        values = value_rows(config)
        before = rows - len(values)
        return np.concatenate([np.arange(before), before + values])
    return None
