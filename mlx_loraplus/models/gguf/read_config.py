"""Read the config of a GGUF file, in the hub's terms."""

from dataclasses import dataclass, field
from typing import Any

from ...errors import ModelError, join_problems
from .architectures import ARCHITECTURES, REALS, Architecture, fixed_settings, model_type_of
from .reader import GGUFFile
from .rope_scaling import read_rope_scaling

_LARGEST = 1 << 24


@dataclass
class _Numbers:
    """Reads numbers from a file's metadata, and collects the problems with them."""

    file: GGUFFile
    architecture: Architecture
    problems: list[str] = field(default_factory=list[str])

    def read(self, name: str, default: float | None = None, most: float = _LARGEST) -> Any:
        """Return the number with this name, the hub's or llama.cpp's; 1 if missing or invalid."""
        key = f"{self.architecture.name}.{self.architecture.numbers.get(name, name)}"
        found = self.file.metadata.get(key, default)
        kind = int | float if name in REALS else int
        is_number = isinstance(found, kind) and not isinstance(found, bool)
        if is_number and 0 < found <= most:
            return found
        self.problems.append(
            f"{key} is {found!r:.40}, allowed is a number above 0 and up to {most:,}"
        )
        return 1


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json of a GGUF file, in the hub's terms.

    Raises:
        ModelError: The architecture is not supported, a value is missing or invalid, or mlx-lm
            does not support a feature of the model.
    """
    model_type = model_type_of(file.metadata)
    architecture = ARCHITECTURES[model_type]

    # Problems are collected and reported together
    numbers = _Numbers(file, architecture)
    config = {"model_type": model_type, "architectures": [architecture.hub_class]}
    config |= _dimensions(numbers)
    _check_heads(numbers, config)
    scaling, problem = read_rope_scaling(file, architecture.name, config, architecture.scalings)
    config |= scaling
    if problem:
        numbers.problems.append(problem)

    # Add the settings that the architecture implies
    config |= fixed_settings(config)
    if model_type == "gemma3_text" and file.metadata.get("gemma3.final_logit_softcapping"):
        numbers.problems.append("it caps its logits, which mlx-lm's Gemma 3 does not")

    if numbers.problems:
        raise ModelError(join_problems(numbers.problems))
    return config


def _dimensions(numbers: _Numbers) -> dict[str, Any]:
    """Return the config's numbers, and the settings that the file's tensors determine."""
    file, architecture = numbers.file, numbers.architecture
    hidden, heads = numbers.read("hidden_size"), numbers.read("num_attention_heads")

    # The defaults are llama.cpp's. The limits prevent a hostile file from exhausting the memory
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": 256 if architecture.name.startswith("gemma") else max(hidden // heads, 1),
        "rope_theta": 1e4,
        "rope_local_base_freq": 1e4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    most = {
        "num_hidden_layers": len(file.tensors),
        "num_key_value_heads": heads,
        "rms_norm_eps": 1,
        "max_position_embeddings": 1 << 40,
        "rope_theta": 1e12,
        "rope_local_base_freq": 1e12,
        "num_experts": 1024,
        "num_local_experts": 1024,
    }
    config: dict[str, Any] = {"hidden_size": hidden, "num_attention_heads": heads}
    for name in architecture.numbers:
        if name not in config:
            config[name] = numbers.read(name, defaults.get(name), most.get(name, _LARGEST))

    # The tensors determine the size of the vocabulary, and whether the model has its own head
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        numbers.problems.append("tensor 'token_embd.weight' is missing")
    else:
        config["vocab_size"] = embedding.shape[0]
    return config


def _check_heads(numbers: _Numbers, config: dict[str, Any]) -> None:
    """Add a problem for each setting that mlx-lm's attention and MLPs do not support."""
    architecture = numbers.architecture
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % key_heads:
        numbers.problems.append(f"{heads} heads can't share {key_heads} key heads")

    # mlx-lm uses one size for the keys, the values and, except in Phi 3, the rotated part of a head
    head_dim = config["head_dim"]
    sizes = {"attention.value_length": numbers.read("attention.value_length", head_dim)}
    rotated = numbers.read("rope.dimension_count", head_dim)
    if architecture.name == "phi3" and rotated <= head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    else:
        sizes["rope.dimension_count"] = rotated
    if set(sizes.values()) != {head_dim}:
        numbers.problems.append(
            f"{sizes} differ from the head's size {head_dim}, which mlx-lm does not support"
        )

    # The names of the numbers of experts depend on the family
    has_experts = "expert_count" in architecture.numbers.values()
    if numbers.file.metadata.get(f"{architecture.name}.expert_count") and not has_experts:
        numbers.problems.append(
            "it is a mixture of experts; only dense models of its kind can be converted"
        )
