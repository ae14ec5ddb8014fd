"""The settings of Gemma 4 in GGUF files.

Its layers differ: those with a sliding window and those with full attention have heads of different
sizes and different rotary embeddings. The last layers have no keys and values of their own, and in
the smallest model they have wider MLPs.

Sources: ``Gemma4Model`` of llama.cpp's converter; src/models/gemma4.cpp.
"""

from typing import Any

import numpy as np

from .metadata_numbers import MetadataNumbers
from .rope_scaling import LLAMA3_TENSOR, proportional_divisors


def gemma4_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp stores of a config besides its numbers, by key."""
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    rope = config["rope_parameters"]
    metadata: dict[str, Any] = {
        "attention.sliding_window_pattern": slides,
        "attention.value_length": config["global_head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "rope.freq_base": float(rope["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
        "rope.dimension_count": config["global_head_dim"],
        "rope.dimension_count_swa": config["head_dim"],
        "feed_forward_length": _mlp_widths(config),
        "attention.head_count_kv": _key_heads(config, slides),
    }
    if config.get("final_logit_softcapping"):
        metadata["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    if config.get("enable_moe_block"):
        metadata["expert_count"] = config["num_experts"]
        metadata["expert_used_count"] = config["top_k_experts"]
        metadata["expert_feed_forward_length"] = config["moe_intermediate_size"]
    return metadata


def _mlp_widths(config: dict[str, Any]) -> int | list[int]:
    """Return the width of the MLP in every layer; one number if it is the same."""
    width, layers = config["intermediate_size"], config["num_hidden_layers"]
    own = layers - config["num_kv_shared_layers"]  # layers with their own keys and values
    if not config["use_double_wide_mlp"] or own == layers:
        return width
    return [width if layer < own else 2 * width for layer in range(layers)]


def _key_heads(config: dict[str, Any], slides: list[bool]) -> int | list[int]:
    """Return the number of key heads in every layer; one number if it is the same."""
    local, full = config["num_key_value_heads"], config.get("num_global_key_value_heads")
    if full is None or not config["attention_k_eq_v"]:
        return local
    return [local if is_sliding else full for is_sliding in slides]


def gemma4_settings(numbers: MetadataNumbers, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file besides its numbers.

    Args:
        numbers: Reads the file, and collects the problems with it.
        config: The config with its numbers.
    """
    layers, shared = config["num_hidden_layers"], config["num_kv_shared_layers"]
    pattern = numbers.read_per_layer("attention.sliding_window_pattern", layers)
    kinds = ["sliding_attention" if value else "full_attention" for value in pattern]
    settings: dict[str, Any] = {"layer_types": kinds}

    # The last layers may have MLPs of twice the width.
    widths = numbers.read_per_layer("feed_forward_length", layers)
    settings["intermediate_size"] = widths[0]
    settings["use_double_wide_mlp"] = widths[-1] == 2 * widths[0]

    # Layers with full attention may have fewer key heads, and use the keys as values.
    heads = numbers.read_per_layer("attention.head_count_kv", layers)
    pairs = list(zip(heads, kinds, strict=True))
    local = [count for count, kind in pairs if kind == "sliding_attention"]
    full = [count for count, kind in pairs if kind == "full_attention"]
    settings["num_key_value_heads"] = (local or heads)[0]
    settings["num_global_key_value_heads"] = (full or heads)[0]
    own = [layer for layer in range(layers - shared) if kinds[layer] == "full_attention"]
    settings["attention_k_eq_v"] = any(
        f"blk.{layer}.attn_v.weight" not in numbers.file.tensors for layer in own
    )

    # The soft cap of the logits, and the experts.
    caps = numbers.file.metadata.get("gemma4.final_logit_softcapping")
    settings["final_logit_softcapping"] = caps if isinstance(caps, float) and caps > 0 else None
    settings["enable_moe_block"] = bool(numbers.file.metadata.get("gemma4.expert_count"))
    if settings["enable_moe_block"]:
        settings["num_experts"] = numbers.read("expert_count", most=1024)
        settings["top_k_experts"] = numbers.read("expert_used_count", most=1024)
        settings["moe_intermediate_size"] = numbers.read("expert_feed_forward_length")
    return settings | {"rope_parameters": _rope_parameters(numbers, config)}


def _rope_parameters(numbers: MetadataNumbers, config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of both kinds of layers."""
    # Find the fraction of a head that is rotated. Its frequencies have a divisor of 1.
    rotated = 0.0
    if LLAMA3_TENSOR in numbers.file.tensors:
        divisors = numbers.file.read(LLAMA3_TENSOR).reshape(-1)
        fraction = float((divisors == 1).mean())
        if np.array_equal(divisors, proportional_divisors(config["global_head_dim"], fraction)):
            rotated = fraction
    if not rotated:
        numbers.problems.append(
            f"its RoPE frequencies ({LLAMA3_TENSOR}) are not those of a Gemma 4"
        )

    theta = numbers.read("rope.freq_base", most=1e12)
    local = numbers.read("rope.freq_base_swa", 10_000.0, most=1e12)
    return {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": theta,
            "partial_rotary_factor": rotated,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
