"""The settings of Granite 4 in GGUF files: layers of Mamba 2 and of attention.

Sources: ``GraniteHybridModel`` and ``Mamba2Model`` of llama.cpp's converter.
"""

from typing import Any

from .metadata_numbers import MetadataNumbers

_EXPERTS = {
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "shared_intermediate_size": "expert_shared_feed_forward_length",
}
_MOST_EXPERTS = 1024


def mamba_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp stores of a config besides its numbers, by key."""
    heads = config["num_key_value_heads"]
    metadata: dict[str, Any] = {
        "ssm.inner_size": config["mamba_n_heads"] * config["mamba_d_head"],
        "attention.head_count_kv": [
            heads if kind == "attention" else 0 for kind in config["layer_types"]
        ],
        "rope.scaling.finetuned": config["position_embedding_type"] != "nope",
    }
    if config["num_local_experts"]:
        metadata |= {key: config[name] for name, key in _EXPERTS.items()}
    return metadata


def mamba_settings(numbers: MetadataNumbers, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file besides its numbers.

    Args:
        numbers: Reads the file, and collects the problems with it.
        config: The config with its numbers.
    """
    # A layer without key heads is a layer of Mamba.
    layers = config["num_hidden_layers"]
    counts = numbers.read_per_layer("attention.head_count_kv", layers)
    has_rope = numbers.file.metadata.get(numbers.key("rope.scaling.finetuned")) is True
    settings: dict[str, Any] = {
        "layer_types": ["attention" if count else "mamba" for count in counts],
        "num_key_value_heads": max(counts) or 1,
        "position_embedding_type": "rope" if has_rope else "nope",
        "mamba_d_head": numbers.read("ssm.inner_size") // config["mamba_n_heads"],
        "mamba_conv_bias": any("ssm_conv1d.bias" in name for name in numbers.file.tensors),
    }
    if numbers.file.metadata.get(numbers.key("expert_count")):
        settings |= {name: numbers.read(key) for name, key in _EXPERTS.items()}
        if settings["num_local_experts"] > _MOST_EXPERTS:
            numbers.problems.append(f"it has more than {_MOST_EXPERTS:,} experts")
    if config["num_attention_heads"] % settings["num_key_value_heads"]:
        numbers.problems.append("its heads can't share its key heads evenly")
    return settings
