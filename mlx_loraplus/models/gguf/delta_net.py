"""The settings of Qwen 3.5 and Qwen3-Next in GGUF files: layers of attention and gated delta nets.

A value head of a delta net belongs to a key head. mlx-lm stores the value heads of one key head
next to each other, and llama.cpp's Qwen 3.5 takes one value head of every key head in turn.

Sources: ``Qwen3NextModel``, ``_LinearAttentionVReorderBase`` and ``_Qwen35MRopeMixin`` of
llama.cpp's converter; src/models/qwen35.cpp.
"""

from typing import Any

import numpy as np

from .metadata_numbers import MetadataNumbers

_SECTIONS = [11, 11, 10]  # of a rotary embedding for text and images; text does not use them


def delta_net_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp stores of a config besides its numbers, by key."""
    width = config["linear_value_head_dim"] * config["linear_num_value_heads"]
    metadata: dict[str, Any] = {"ssm.inner_size": width}
    if config["model_type"] != "qwen3_next":
        sections = (config.get("rope_parameters") or {}).get("mrope_section", _SECTIONS)
        metadata["rope.dimension_sections"] = [*sections, 0][:4]
    return metadata


def delta_net_settings(numbers: MetadataNumbers, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file besides its numbers; move the rotary ones out of ``config``.

    Args:
        numbers: Reads the file, and collects the problems with it.
        config: The config with its numbers.
    """
    width = config["linear_key_head_dim"] * config["linear_num_value_heads"]
    if numbers.read("ssm.inner_size") != width:
        numbers.problems.append(
            f"its ssm.inner_size differs from {width}, the width of its value heads"
        )
    if config["linear_num_value_heads"] % config["linear_num_key_heads"]:
        numbers.problems.append("its value heads can't be shared evenly among its key heads")
    if config["model_type"] == "qwen3_next":
        return {}

    # mlx-lm's Qwen 3.5 reads the rotary settings only from here.
    config.pop("rope_scaling", None)
    rope = {
        "rope_type": "default",
        "rope_theta": config.pop("rope_theta"),
        "partial_rotary_factor": config.pop("partial_rotary_factor", 1.0),
    }
    sections = numbers.file.metadata.get(numbers.key("rope.dimension_sections"), _SECTIONS)
    if isinstance(sections, list):
        rope["mrope_section"] = sections[:3]
    return {"rope_parameters": rope}


def value_heads(config: dict[str, Any]) -> np.ndarray:
    """Return the value head in mlx-lm of each value head in llama.cpp's Qwen 3.5."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    return np.arange(values).reshape(keys, values // keys).T.reshape(-1)


def value_rows(config: dict[str, Any]) -> np.ndarray:
    """Return the row in mlx-lm of each row of the values in llama.cpp's Qwen 3.5."""
    size = config["linear_value_head_dim"]
    return (value_heads(config)[:, None] * size + np.arange(size)).reshape(-1)
