"""The settings of LFM2 in GGUF files: layers of short convolutions and of attention.

Source: ``LFM2Model`` of llama.cpp's converter.
"""

from typing import Any

from .metadata_numbers import MetadataNumbers


def lfm2_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp stores of a config besides its numbers, by key."""
    heads, attention = config["num_key_value_heads"], config["full_attn_idxs"]
    layers = range(config["num_hidden_layers"])
    return {
        "feed_forward_length": _width(config),
        "attention.head_count_kv": [heads if layer in attention else 0 for layer in layers],
    }


def lfm2_settings(numbers: MetadataNumbers, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file besides its numbers.

    Args:
        numbers: Reads the file, and collects the problems with it.
        config: The config with its numbers.
    """
    # A layer without key heads is a convolution.
    counts = numbers.read_per_layer("attention.head_count_kv", config["num_hidden_layers"])
    heads = max(counts)
    if not heads or config["num_attention_heads"] % heads:
        numbers.problems.append("its heads can't share its key heads evenly")
    return {
        "layer_types": ["full_attention" if count else "conv" for count in counts],
        "num_key_value_heads": heads or 1,
        "block_dim": config["hidden_size"],
        "block_ff_dim": numbers.read("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
    }


def _width(config: dict[str, Any]) -> int:
    """Return the width of the MLPs, which mlx-lm computes when it makes a model."""
    width = config["block_ff_dim"]
    if not config["block_auto_adjust_ff_dim"]:
        return width
    factor, multiple = config["block_ffn_dim_multiplier"], config["block_multiple_of"]
    width = int(2 * width / 3)
    if factor is not None:
        width = int(factor * width)
    return multiple * -(-width // multiple)
