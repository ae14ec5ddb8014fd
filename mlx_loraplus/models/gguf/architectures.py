"""Translate a GGUF file's architecture to the hub's terms: config, tensor names and layout.

The two formats differ in layout: llama.cpp stores Llama's query and key rows with the two rotary
halves of a head interleaved, and Gemma's norm weights with 1 added. Sources: the GGUF
specification; llama.cpp's convert_hf_to_gguf.py (``LlamaModel.permute``,
``Gemma3Model.norm_shift``) and src/llama-model.cpp for the constants that are not in the file.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, get_tensor_name_map
from mlx.utils import tree_flatten

from ...errors import ModelError, join_problems
from ..skeleton import make_skeleton
from .reader import GGUFFile

ARCHITECTURES = {"llama": "llama", "gemma3_text": "gemma3"}
"""The hub's model_type → llama.cpp's architecture."""

_LLAMA = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
}
_GEMMA3 = _LLAMA | {
    "sliding_window": "attention.sliding_window",
    "rope_local_base_freq": "rope.freq_base_swa",
}
NUMBERS = {"llama": _LLAMA, "gemma3": _GEMMA3}
"""Architecture → the numbers in its config, as the hub's name → llama.cpp's name."""

REALS = {"rms_norm_eps", "rope_theta", "rope_local_base_freq"}
"""The numbers that are not restricted to integers."""

_LARGEST = 1 << 24


@dataclass
class _Numbers:
    """Reads numbers from a file's metadata, and collects the problems with them."""

    file: GGUFFile
    architecture: str
    problems: list[str] = field(default_factory=list[str])

    def read(self, name: str, default: float | None = None, most: float = _LARGEST) -> Any:
        """Return the number with this name, the hub's or llama.cpp's; 1 if missing or invalid."""
        key = f"{self.architecture}.{NUMBERS[self.architecture].get(name, name)}"
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
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in NUMBERS:
        raise ModelError(
            f"its architecture is {architecture!r:.40}; allowed are {', '.join(NUMBERS)}"
        )

    # Problems are collected and reported together
    numbers = _Numbers(file, architecture)
    config = _dimensions(numbers)
    _check_heads(numbers, config)
    config["rope_scaling"] = _rope_scaling(numbers, config)

    # Add the settings that the architecture implies
    if architecture == "llama":
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        config |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    else:
        if file.metadata.get("gemma3.final_logit_softcapping"):
            numbers.problems.append("it caps its logits, which mlx-lm's Gemma 3 does not")
        config |= {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        config |= {"hidden_activation": "gelu_pytorch_tanh"} | gemma_settings(config)

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
        "head_dim": 256 if architecture == "gemma3" else max(hidden // heads, 1),
        "rope_theta": 1e4,
        "rope_local_base_freq": 1e4,
    }
    most = {
        "num_hidden_layers": len(file.tensors),
        "num_key_value_heads": heads,
        "rms_norm_eps": 1,
        "max_position_embeddings": 1 << 40,
        "rope_theta": 1e12,
        "rope_local_base_freq": 1e12,
    }
    config: dict[str, Any] = {"hidden_size": hidden, "num_attention_heads": heads}
    for name in NUMBERS[architecture]:
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
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % key_heads:
        numbers.problems.append(f"{heads} heads can't share {key_heads} key heads")

    # mlx-lm uses one size for the keys, the values and the rotated part of a head
    head_dim = config["head_dim"]
    sizes = {
        key: numbers.read(key, head_dim)
        for key in ("attention.value_length", "rope.dimension_count")
    }
    if set(sizes.values()) != {head_dim}:
        numbers.problems.append(
            f"{sizes} differ from the head's size {head_dim}, which mlx-lm can't do"
        )

    if numbers.file.metadata.get(f"{numbers.architecture}.expert_count"):
        numbers.problems.append("it is a mixture of experts, only dense models can be converted")


def gemma_settings(config: dict[str, Any]) -> dict[str, int]:
    """Return the settings of Gemma 3 that are fixed in llama.cpp and not stored in the file.

    Gemma 3 27B, which has 62 blocks, scales its queries by hidden size / number of heads. The other
    sizes scale them by the size of a head.
    """
    is_27b = config["num_hidden_layers"] == 62
    per_head = config["hidden_size"] // config["num_attention_heads"]
    scalar = per_head if is_27b else config["head_dim"]
    return {"query_pre_attn_scalar": scalar, "sliding_window_pattern": 6}


def _rope_scaling(numbers: _Numbers, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the hub's ``rope_scaling``: None, linear, or the llama3 rule.

    The llama3 rule is not stored by name. It is recognised by its divisors, which are stored as
    ``rope_freqs.weight``.
    """
    file, architecture = numbers.file, numbers.architecture
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = file.metadata.get(f"{architecture}.rope.scaling.factor", 1.0)
    is_factor = isinstance(factor, int | float) and 0 < factor < 1e6
    if kind not in ("none", "linear") or not is_factor:
        numbers.problems.append(
            f"its RoPE scaling is {kind!r:.40} by {factor!r:.40}, allowed are none and linear"
        )
        return None

    # Without divisors, use the stored rule
    linear = None
    if kind == "linear" and factor != 1:
        linear = {"rope_type": "linear", "factor": float(factor)}
    if "rope_freqs.weight" not in file.tensors:
        return linear

    # Try the original context lengths of the known models
    divisors = file.read("rope_freqs.weight").reshape(-1)
    for original in (8192, 4096, 16384, 32768) if linear is None else ():
        scaling = {
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        expected = llama3_divisors(config["head_dim"], config["rope_theta"], scaling)
        if expected.shape == divisors.shape and np.allclose(expected, divisors, rtol=1e-3):
            return scaling
    numbers.problems.append(
        "its RoPE frequencies (rope_freqs.weight) follow no rule that mlx-lm knows"
    )
    return None


def llama3_divisors(head_dim: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """Return the divisors of Llama 3.1's rotary frequencies, (head_dim / 2,).

    The divisor is 1 for short wavelengths and ``factor`` for long ones, with a smooth transition
    between them. Source:
    ``Llama3RoPE`` of mlx-lm, and Meta's ``apply_scaling``.

    Args:
        head_dim: The size of a head.
        theta: The base of the frequencies.
        scaling: The ``rope_scaling`` of a config.
    """
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # positions per turn
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / waves
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return GGUF name → (mlx-lm name, shape) for every tensor that a model of this config has."""
    architecture = ARCHITECTURES[config["model_type"]]
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    model = make_skeleton(config | {"quantization": None})

    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    arrays: Any = tree_flatten(model.parameters())
    for name, array in arrays:
        expected[str(names.get_name(name, try_suffixes=(".weight",)))] = (name, array.shape)
    return expected


def relaid(weight: np.ndarray, name: str, config: dict[str, Any], *, to_gguf: bool) -> np.ndarray:
    """Return a tensor in the layout of llama.cpp, or in that of mlx-lm.

    Args:
        weight: The tensor.
        name: The tensor's name in GGUF.
        config: The model's config.
        to_gguf: If true, convert from mlx-lm's layout to llama.cpp's; if false, the reverse.
    """
    model_type = config["model_type"]
    if model_type == "gemma3_text" and name.endswith("norm.weight"):
        return weight + 1 if to_gguf else weight - 1

    if model_type == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        # Row half · i + j of a head in mlx-lm is row 2 j + i in llama.cpp, where i is 0 or 1
        half = config["head_dim"] // 2
        pairs = (2, half) if to_gguf else (half, 2)
        rows = weight.reshape(-1, *pairs, weight.shape[-1])
        return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)
    return weight
