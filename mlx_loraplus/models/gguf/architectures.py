"""What differs between llama.cpp and mlx-lm for each architecture, beyond the names of tensors.

The names come from the tensor maps of the ``gguf`` package. A table holds the rest: the numbers of
the config with llama.cpp's names for them, the settings that llama.cpp does not store, and the
layout of the tensors. llama.cpp stores the query and key rows of Llama and its descendants with the
two rotary halves of a head interleaved, and Gemma's norm weights with 1 added.

Sources: the GGUF specification; llama.cpp's convert_hf_to_gguf.py (``LlamaModel.permute``,
``Gemma3Model.norm_shift``) and src/llama-model.cpp for the constants that are not in the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from mlx.utils import tree_flatten

from ...errors import ModelError
from ..skeleton import make_skeleton

_COMMON = {
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
_GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_GEMMA2 = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA3 = {
    "sliding_window": "attention.sliding_window",
    "rope_local_base_freq": "rope.freq_base_swa",
}
_QWEN3_MOE = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_MIXTRAL = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}

REALS = {"rms_norm_eps", "rope_theta", "rope_local_base_freq", *_GRANITE, *_GEMMA2}
"""The numbers that are not restricted to integers."""

_SILU = {"hidden_act": "silu"}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False} | _SILU
_USUAL_ROPE = {"rope_traditional": False}


@dataclass(frozen=True)
class Architecture:
    """One kind of model, in the terms of llama.cpp and of the hub."""

    name: str  # llama.cpp's
    hub_class: str  # the class in transformers, for config.json
    more_numbers: dict[str, str] = field(default_factory=dict[str, str])
    fixed: dict[str, Any] = field(default_factory=dict[str, Any])  # not stored in GGUF
    scalings: tuple[str, ...] = ("linear", "yarn")  # the kinds of RoPE scaling
    is_interleaved: bool = False  # the query and key rows
    adds_one: bool = False  # to norm weights

    @property
    def numbers(self) -> dict[str, str]:
        """The numbers in the config, as the hub's name → llama.cpp's name."""
        return _COMMON | self.more_numbers


_LLAMA_SCALINGS = ("linear", "yarn", "llama3")

ARCHITECTURES = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", fixed=_NO_BIAS | _USUAL_ROPE, scalings=_LLAMA_SCALINGS,
        is_interleaved=True,
    ),
    "mixtral": Architecture(
        "llama", "MixtralForCausalLM", _MIXTRAL, _SILU | _USUAL_ROPE, is_interleaved=True,
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _GEMMA2, _USUAL_ROPE, scalings=(), adds_one=True
    ),
    "gemma3_text": Architecture(
        "gemma3", "Gemma3ForCausalLM", _GEMMA3, {"hidden_activation": "gelu_pytorch_tanh"},
        scalings=("linear",), adds_one=True,
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", fixed=_SILU | _USUAL_ROPE),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", fixed=_NO_BIAS),
    "qwen3_moe": Architecture(
        "qwen3moe", "Qwen3MoeForCausalLM", _QWEN3_MOE,
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True} | _NO_BIAS,
    ),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM", fixed=_SILU | _USUAL_ROPE, scalings=("longrope",)
    ),
    "smollm3": Architecture(
        "smollm3", "SmolLM3ForCausalLM", fixed=_NO_BIAS | _USUAL_ROPE, is_interleaved=True
    ),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", fixed=_NO_BIAS | _USUAL_ROPE),
    "olmo3": Architecture(
        "olmo2", "Olmo3ForCausalLM", {"sliding_window": "attention.sliding_window"}, _NO_BIAS
    ),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", _GRANITE, _NO_BIAS, is_interleaved=True
    ),
}  # fmt: skip
"""The hub's model_type → the architecture."""

_SPECIAL_CASES = {
    ("llama", "expert_count"): "mixtral",
    ("olmo2", "attention.sliding_window"): "olmo3",
}
"""The numbers that only one of two model types with the same architecture in llama.cpp has."""


def model_type_of(metadata: Mapping[str, Any]) -> str:
    """Return the hub's model_type of a GGUF file.

    Raises:
        ModelError: The architecture is not supported.
    """
    name = metadata.get("general.architecture")
    for (architecture, number), model_type in _SPECIAL_CASES.items():
        if name == architecture and metadata.get(f"{name}.{number}"):
            return model_type

    for model_type, architecture in ARCHITECTURES.items():
        if architecture.name == name:
            return model_type
    names = dict.fromkeys(architecture.name for architecture in ARCHITECTURES.values())
    raise ModelError(f"its architecture is {name!r:.40}; allowed are {', '.join(names)}")


def fixed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model that llama.cpp fixes and a GGUF file does not store.

    Args:
        config: A config in the hub's terms, with its numbers.
    """
    model_type, layers = config["model_type"], config["num_hidden_layers"]
    settings = dict(ARCHITECTURES[model_type].fixed)

    # The largest Gemma, recognised by its blocks, scales its queries by hidden size / heads
    if model_type in ("gemma2", "gemma3_text"):
        is_27b = layers == {"gemma2": 46, "gemma3_text": 62}[model_type]
        per_head = config["hidden_size"] // config["num_attention_heads"]
        settings["query_pre_attn_scalar"] = per_head if is_27b else config["head_dim"]

    # Every nth layer is another kind of layer
    if model_type == "gemma3_text":
        settings["sliding_window_pattern"] = 6
    if model_type == "llama":
        settings["layer_types"] = ["full_attention"] * layers
    if model_type == "smollm3":
        settings["layer_types"] = ["full_attention"] * layers
        settings["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    if model_type == "olmo3":
        kinds = ("sliding_attention", "full_attention")
        settings["layer_types"] = [kinds[(layer + 1) % 4 == 0] for layer in range(layers)]
    return settings


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return GGUF name → (mlx-lm name, shape) for every tensor that a model of this config has.

    Raises:
        ModelError: llama.cpp has no name for a tensor.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(kind, config["num_hidden_layers"])
    model = make_skeleton(config | {"quantization": None})

    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    arrays: Any = tree_flatten(model.parameters())
    for name, array in arrays:
        # mlx-lm merges the experts of a layer under names of its own
        hub_name = name.replace("block_sparse_moe.switch_mlp.", "mlp.experts.")
        hub_name = hub_name.replace("mlp.switch_mlp.", "mlp.experts.")
        theirs = names.get_name(hub_name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ModelError(f"llama.cpp's {architecture.name} has no tensor for {name}")
        expected[theirs] = (name, array.shape)
    return expected


def relaid(weight: np.ndarray, name: str, config: dict[str, Any], *, to_gguf: bool) -> np.ndarray:
    """Return a tensor in the layout of llama.cpp, or in that of mlx-lm.

    Args:
        weight: The tensor.
        name: The tensor's name in GGUF.
        config: The model's config.
        to_gguf: If true, convert from mlx-lm's layout to llama.cpp's; if false, the reverse.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    if architecture.adds_one and name.endswith("norm.weight"):
        return weight + 1 if to_gguf else weight - 1

    if architecture.is_interleaved and name.endswith(("attn_q.weight", "attn_k.weight")):
        # Row half · i + j of a head in mlx-lm is row 2 j + i in llama.cpp, where i is 0 or 1
        half = config["head_dim"] // 2
        pairs = (2, half) if to_gguf else (half, 2)
        rows = weight.reshape(-1, *pairs, weight.shape[-1])
        return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)
    return weight
