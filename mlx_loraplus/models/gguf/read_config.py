"""Read the config of a GGUF file, in the hub's terms."""

from collections.abc import Callable
from typing import Any

from ...errors import ModelError, counted, join_problems
from .architectures import ARCHITECTURES, fixed_settings, model_type_of
from .delta_net import delta_net_settings
from .gemma4 import gemma4_settings
from .granite4 import mamba_settings
from .lfm2 import lfm2_settings
from .metadata_numbers import LARGEST, MetadataNumbers
from .ministral3 import ministral3_settings
from .reader import GGUFFile
from .rope_scaling import read_rope_scaling

_FAMILY_SETTINGS: dict[str, Callable[[MetadataNumbers, dict[str, Any]], dict[str, Any]]] = {
    "gemma4_text": gemma4_settings,
    "granitemoehybrid": mamba_settings,
    "lfm2": lfm2_settings,
    "ministral3": ministral3_settings,
    "qwen3_5": delta_net_settings,
    "qwen3_5_moe": delta_net_settings,
    "qwen3_next": delta_net_settings,
}
"""model_type → the function that reads the settings that are not simple numbers."""

_OWN_HEADS = ("gemma4_text", "granitemoehybrid", "lfm2")
"""The families whose layers have different heads. Their own functions check these."""


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json of a GGUF file, in the hub's terms.

    Raises:
        ModelError: The architecture is not supported, a value is missing or invalid, or mlx-lm
            does not support a feature of the model.
    """
    model_type = model_type_of(file.metadata)
    architecture = ARCHITECTURES[model_type]

    # Problems are collected and reported together.
    numbers = MetadataNumbers(file, architecture)
    config = {"model_type": model_type, "architectures": [architecture.hub_class]}
    config |= _dimensions(numbers)
    if model_type not in _OWN_HEADS:
        _check_heads(numbers, config)
        scaling, problem = read_rope_scaling(file, architecture.name, config, architecture.scalings)
        config |= scaling
        if problem:
            numbers.problems.append(problem)

    # Add the settings that the architecture implies.
    if model_type in _FAMILY_SETTINGS:
        config |= _FAMILY_SETTINGS[model_type](numbers, config)
    config |= fixed_settings(config)
    if model_type == "gemma3_text" and file.metadata.get("gemma3.final_logit_softcapping"):
        numbers.problems.append("it caps its logits, which mlx-lm's Gemma 3 does not")

    if numbers.problems:
        raise ModelError(join_problems(numbers.problems))
    return config


def extra_layers(file: GGUFFile) -> int:
    """Return how many of a file's last blocks predict further tokens; mlx-lm has no such layers."""
    count = file.metadata.get(f"{file.metadata.get('general.architecture')}.nextn_predict_layers")
    return count if isinstance(count, int) and 0 < count < len(file.tensors) else 0


def _dimensions(numbers: MetadataNumbers) -> dict[str, Any]:
    """Return the config's numbers, and the settings that the file's tensors determine."""
    file, architecture = numbers.file, numbers.architecture
    hidden, heads = numbers.read("hidden_size"), numbers.read("num_attention_heads")

    # The defaults are llama.cpp's. The limits prevent a hostile file from exhausting the memory.
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": 256 if architecture.name.startswith("gemma") else max(hidden // heads, 1),
        "rope_theta": 1e4,
        "rope_local_base_freq": 1e4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "full_attention_interval": 4,
    }
    most = {
        "num_hidden_layers": len(file.tensors),
        "num_key_value_heads": heads,
        **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps"), 1),
        "max_position_embeddings": 1 << 40,
        "rope_theta": 1e12,
        "rope_local_base_freq": 1e12,
        "num_experts": 1024,
        "num_local_experts": 1024,
    }
    config: dict[str, Any] = {"hidden_size": hidden, "num_attention_heads": heads}
    for name in architecture.numbers:
        if name not in config:
            config[name] = numbers.read(name, defaults.get(name), most.get(name, LARGEST))

    config["num_hidden_layers"] = max(config["num_hidden_layers"] - extra_layers(file), 1)

    # The tensors determine the size of the vocabulary, and whether the model has its own head.
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        numbers.problems.append("tensor 'token_embd.weight' is missing")
        config["vocab_size"] = 1
    else:
        config["vocab_size"] = embedding.shape[0]
    return config


def _check_heads(numbers: MetadataNumbers, config: dict[str, Any]) -> None:
    """Add a problem for each setting that mlx-lm's attention and MLPs do not support."""
    architecture = numbers.architecture
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % key_heads:
        shared = counted(key_heads, "key head")
        numbers.problems.append(f"{counted(heads, 'head')} can't share {shared}")

    # mlx-lm uses one size for the keys, the values and, in most families, the rotated part of a
    # head.
    head_dim = config["head_dim"]
    sizes = {"attention.value_length": numbers.read("attention.value_length", head_dim)}
    rotated = numbers.read("rope.dimension_count", head_dim)
    if architecture.rotates_part and rotated <= head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    else:
        sizes["rope.dimension_count"] = rotated
    if set(sizes.values()) != {head_dim}:
        numbers.problems.append(
            f"{sizes} differ from the head's size {head_dim}, which mlx-lm does not support"
        )

    # The names of the numbers of experts depend on the family.
    has_experts = "expert_count" in architecture.numbers.values()
    if numbers.file.metadata.get(f"{architecture.name}.expert_count") and not has_experts:
        numbers.problems.append(
            "it is a mixture of experts; only dense models of its architecture can be converted"
        )
