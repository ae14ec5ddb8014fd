"""What differs between llama.cpp and mlx-lm for each architecture, beyond the names of tensors.

The names come from the tensor maps of the ``gguf`` package. A table holds the rest: the numbers of
the config with llama.cpp's names for them, the settings that llama.cpp does not store, and the
RoPE scalings. ``tensor_layout.py`` holds the layout of the tensors.

Sources: the GGUF specification; llama.cpp's converter and src/models for the constants that are not
in the file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from mlx.utils import tree_flatten

from ...errors import ModelError
from ..skeleton import make_skeleton
from .llama4 import as_config_json, llama4_fixed

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
_WINDOW = {"sliding_window": "attention.sliding_window"}
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
_GEMMA3 = _WINDOW | {"rope_local_base_freq": "rope.freq_base_swa"}
_GEMMA4 = _WINDOW | {
    "head_dim": "attention.key_length_swa",
    "global_head_dim": "attention.key_length",
    "num_kv_shared_layers": "attention.shared_kv_layers",
    "hidden_size_per_layer_input": "embedding_length_per_layer_input",
}
_EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_QWEN3_MOE = _EXPERTS | {"moe_intermediate_size": "expert_feed_forward_length"}
_LOCAL_EXPERTS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_LLAMA4 = _LOCAL_EXPERTS | {
    "intermediate_size_mlp": "feed_forward_length",
    "intermediate_size": "expert_feed_forward_length",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
}
_DELTA_NET = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "full_attention_interval": "full_attention_interval",
}
_MAMBA = {
    "mamba_n_heads": "ssm.time_step_rank",
    "mamba_d_state": "ssm.state_size",
    "mamba_d_conv": "ssm.conv_kernel",
    "mamba_n_groups": "ssm.group_count",
}
_SHARED_EXPERT = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
_DELTA_NET_MOE = _DELTA_NET | _QWEN3_MOE | _SHARED_EXPERT
_LAYER_NORM = {"layer_norm_eps": "attention.layer_norm_epsilon"}
_LFM2 = {"norm_eps": "attention.layer_norm_rms_epsilon", "conv_L_cache": "shortconv.l_cache"}
_COHERE = _LAYER_NORM | {"logit_scale": "logit_scale"}

REALS = {
    "rms_norm_eps", "rope_theta", "rope_local_base_freq", "rope.freq_base", "rope.freq_base_swa",
    "attention.temperature_scale", "norm_epsilon", "norm_eps",
    *_GRANITE, *_GEMMA2, *_COHERE,
}  # fmt: skip
"""The numbers that are not restricted to integers."""

_SILU = {"hidden_act": "silu"}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False} | _SILU
_USUAL_ROPE = {"rope_traditional": False}
_NO_RMS_NORM = ("rms_norm_eps",)


@dataclass(frozen=True)
class Architecture:
    """One kind of model, in the terms of llama.cpp and of the hub."""

    name: str  # llama.cpp's
    hub_class: str  # the class in transformers, for config.json
    more_numbers: dict[str, str] = field(default_factory=dict[str, str])
    fixed: dict[str, Any] = field(default_factory=dict[str, Any])  # not stored in GGUF
    scalings: tuple[str, ...] = ("linear", "yarn")  # the kinds of RoPE scaling
    is_interleaved: bool = False  # whether llama.cpp interleaves the query and key rows
    adds_one: bool = False  # whether llama.cpp's norm weights are larger by 1
    rotates_part: bool = False  # whether partial_rotary_factor may rotate a part of each head
    not_numbers: tuple[str, ...] = ()  # the names in _COMMON that are stored in another form
    may_be_zero: tuple[str, ...] = ()  # the names of numbers that may be 0

    @property
    def numbers(self) -> dict[str, str]:
        """The numbers in the config, as the hub's name → llama.cpp's name."""
        numbers = _COMMON | self.more_numbers
        return {name: key for name, key in numbers.items() if name not in self.not_numbers}


_LLAMA_SCALINGS = ("linear", "yarn", "llama3")

ARCHITECTURES = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", fixed=_NO_BIAS | _USUAL_ROPE, scalings=_LLAMA_SCALINGS,
        is_interleaved=True,
    ),
    "llama4": Architecture(
        "llama4", "Llama4ForConditionalGeneration", _LLAMA4,
        {
            "attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192,
            "attn_scale": 0.1, "attention_bias": False, "tie_word_embeddings": False,
        },
        scalings=_LLAMA_SCALINGS,
    ),
    "mixtral": Architecture(
        "llama", "MixtralForCausalLM", _LOCAL_EXPERTS, _SILU | _USUAL_ROPE, is_interleaved=True,
    ),
    "gemma": Architecture(
        "gemma", "GemmaForCausalLM",
        fixed={"hidden_activation": "gelu_pytorch_tanh"} | _USUAL_ROPE, scalings=(),
        adds_one=True,
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _GEMMA2, _USUAL_ROPE, scalings=(), adds_one=True
    ),
    "gemma3_text": Architecture(
        "gemma3", "Gemma3ForCausalLM", _GEMMA3, {"hidden_activation": "gelu_pytorch_tanh"},
        scalings=("linear",), adds_one=True,
    ),
    "gemma4_text": Architecture(
        "gemma4", "Gemma4ForCausalLM", _GEMMA4,
        {"hidden_activation": "gelu_pytorch_tanh"} | _USUAL_ROPE, scalings=("proportional",),
        not_numbers=("intermediate_size", "num_key_value_heads", "rope_theta"),
        may_be_zero=("num_kv_shared_layers", "hidden_size_per_layer_input"),
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", fixed=_SILU | _USUAL_ROPE),
    "qwen2_moe": Architecture(
        "qwen2moe", "Qwen2MoeForCausalLM", _QWEN3_MOE | _SHARED_EXPERT,
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False}
        | _SILU
        | _USUAL_ROPE,
        scalings=(),
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", fixed=_NO_BIAS),
    "qwen3_moe": Architecture(
        "qwen3moe", "Qwen3MoeForCausalLM", _QWEN3_MOE,
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True} | _NO_BIAS,
    ),
    "qwen3_5": Architecture(
        "qwen35", "Qwen3_5ForCausalLM", _DELTA_NET, _NO_BIAS, scalings=(), rotates_part=True
    ),
    "qwen3_5_moe": Architecture(
        "qwen35moe", "Qwen3_5MoeForCausalLM", _DELTA_NET_MOE, {"norm_topk_prob": True} | _NO_BIAS,
        scalings=(), rotates_part=True, not_numbers=("intermediate_size",),
    ),
    "qwen3_next": Architecture(
        "qwen3next", "Qwen3NextForCausalLM", _DELTA_NET_MOE,
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True} | _NO_BIAS,
        rotates_part=True,
    ),
    "gpt_oss": Architecture("gpt-oss", "GptOssForCausalLM", _LOCAL_EXPERTS | _WINDOW, _SILU),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM", fixed=_SILU | _USUAL_ROPE, scalings=("longrope",),
        rotates_part=True,
    ),
    "smollm3": Architecture(
        "smollm3", "SmolLM3ForCausalLM", fixed=_NO_BIAS | _USUAL_ROPE, is_interleaved=True
    ),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", fixed=_NO_BIAS | _USUAL_ROPE),
    "olmo3": Architecture("olmo2", "Olmo3ForCausalLM", _WINDOW, _NO_BIAS),
    "olmoe": Architecture(
        "olmoe", "OlmoeForCausalLM", _EXPERTS,
        {"norm_topk_prob": False} | _NO_BIAS | _USUAL_ROPE,
    ),
    "ministral3": Architecture(
        "mistral3", "Ministral3ForCausalLM", fixed=_NO_BIAS, scalings=("yarn",),
        is_interleaved=True,
    ),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", _GRANITE, _NO_BIAS, is_interleaved=True
    ),
    "granitemoe": Architecture(
        "granitemoe", "GraniteMoeForCausalLM", _GRANITE | _LOCAL_EXPERTS,
        {"attention_bias": False} | _SILU, is_interleaved=True,
    ),
    "granitemoehybrid": Architecture(
        "granitehybrid", "GraniteMoeHybridForCausalLM", _GRANITE | _MAMBA,
        {"mamba_n_groups": 1, "mamba_proj_bias": False} | _NO_BIAS,
        scalings=(), is_interleaved=True, not_numbers=("num_key_value_heads",),
    ),
    "cohere": Architecture(
        "command-r", "CohereForCausalLM", _COHERE,
        {"attention_bias": False, "layer_norm_bias": False, "use_qk_norm": False} | _SILU,
        scalings=(), not_numbers=_NO_RMS_NORM,
    ),
    "cohere2": Architecture(
        "cohere2", "Cohere2ForCausalLM", _COHERE | _WINDOW,
        {"attention_bias": False, "layer_norm_bias": False, "sliding_window_pattern": 4} | _SILU,
        scalings=(), not_numbers=_NO_RMS_NORM,
    ),
    "glm4": Architecture(
        "glm4", "Glm4ForCausalLM",
        fixed={"attention_bias": False, "rope_traditional": True} | _SILU, scalings=(),
        rotates_part=True,
    ),
    "ernie4_5": Architecture(
        "ernie4_5", "Ernie4_5ForCausalLM", fixed={"use_bias": False} | _SILU, scalings=()
    ),
    "seed_oss": Architecture(
        "seed_oss", "SeedOssForCausalLM",
        fixed={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False}
        | _SILU
        | _USUAL_ROPE,
    ),
    "lfm2": Architecture(
        "lfm2", "Lfm2ForCausalLM", _LFM2, {"conv_bias": False}, scalings=(),
        not_numbers=("rms_norm_eps", "intermediate_size", "num_key_value_heads"),
    ),
    "starcoder2": Architecture(
        "starcoder2", "Starcoder2ForCausalLM", {"norm_epsilon": "attention.layer_norm_epsilon"},
        {"hidden_act": "gelu_pytorch_tanh", "use_bias": True}, scalings=(),
        not_numbers=_NO_RMS_NORM,
    ),
}  # fmt: skip
"""The hub's model_type → the architecture."""

_SPECIAL_CASES = {
    ("llama", "expert_count"): "mixtral",
    ("olmo2", "attention.sliding_window"): "olmo3",
}
"""(llama.cpp's architecture, a number that only this model type stores) → the model type."""

_HUB_NAMES = (
    ("language_model.", ""),
    ("block_sparse_moe.switch_mlp.", "mlp.experts."),
    ("mlp.switch_mlp.", "mlp.experts."),
    (".dt_bias", ".dt_proj.bias"),
    (".sinks", ".sinks.weight"),
    (".layer_scalar", ".layer_scalar.weight"),
)
"""Part of a name in mlx-lm → the same part in the hub's names, which llama.cpp's map knows."""

_BLOCK_TENSORS = {
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.switch_glu.gate_proj.weight": "ffn_gate_exps.weight",
    "experts.switch_glu.up_proj.weight": "ffn_up_exps.weight",
    "experts.switch_glu.down_proj.weight": "ffn_down_exps.weight",
    "linear_attn.in_proj_qkvz.weight": "ssm_in.weight",
    "mamba.D": "ssm_d",
}
"""Name of a layer's parameter in mlx-lm → its name in llama.cpp, if the map has none."""

_JOINED_TENSORS = {
    "shared_mlp.input_linear.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
}
"""Name of a layer's parameter in mlx-lm → the tensors in llama.cpp that hold halves of its rows."""

_HALF = "#"


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

    # The largest Gemma, recognized by its blocks, scales its queries by hidden size / heads.
    if model_type in ("gemma2", "gemma3_text"):
        is_27b = layers == {"gemma2": 46, "gemma3_text": 62}[model_type]
        per_head = config["hidden_size"] // config["num_attention_heads"]
        settings["query_pre_attn_scalar"] = per_head if is_27b else config["head_dim"]

    if model_type == "llama4":
        settings |= llama4_fixed(config)

    # The kinds of the layers, which a GGUF file does not store.
    if model_type == "gemma3_text":
        settings["sliding_window_pattern"] = 6
    if model_type == "olmoe":  # llama.cpp's norm of the keys is as large as that of the queries
        settings["num_key_value_heads"] = config["num_attention_heads"]
    if model_type in ("llama", "ministral3"):
        settings["layer_types"] = ["full_attention"] * layers
    if model_type == "smollm3":
        settings["layer_types"] = ["full_attention"] * layers
        settings["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    if model_type in ("olmo3", "gpt_oss"):
        period = {"olmo3": 4, "gpt_oss": 2}[model_type]
        settings["layer_types"] = [
            "sliding_attention" if (layer + 1) % period else "full_attention"
            for layer in range(layers)
        ]

    # These sizes of tensors equal another setting.
    if model_type.startswith(("qwen3_5", "qwen3_next")):
        settings["linear_value_head_dim"] = config["linear_key_head_dim"]
    if config.get("hidden_size_per_layer_input"):
        settings["vocab_size_per_layer_input"] = config["vocab_size"]
    return settings


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return GGUF name → (mlx-lm name, shape) for every tensor that a model of this config has.

    If a tensor holds half of a parameter's rows, its mlx-lm name has a suffix for that half, which
    ``half_of`` removes and returns.

    Raises:
        ModelError: llama.cpp has no name for a tensor.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(kind, config["num_hidden_layers"])
    model = make_skeleton(as_config_json(config | {"quantization": None}))

    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    arrays: Any = tree_flatten(model.parameters())
    for name, array in arrays:
        block, ending = _split_block(name)
        if ending in _JOINED_TENSORS:
            shape = (array.shape[0] // 2, *array.shape[1:])
            for half, tensor in enumerate(_JOINED_TENSORS[ending]):
                expected[f"blk.{block}.{tensor}"] = (f"{name}{_HALF}{half}", shape)
            continue
        theirs = _tensor_name(name, names)
        if theirs is None:
            raise ModelError(f"llama.cpp's {architecture.name} has no tensor for {name}")
        expected[theirs] = (name, array.shape)
    return expected


def half_of(name: str) -> tuple[str, int | None]:
    """Return the parameter that a name of ``expected_tensors`` means, and which half of its rows.

    The half is 0 or 1, or None if the name means the whole parameter.
    """
    parameter, _, half = name.partition(_HALF)
    return parameter, int(half) if half else None


def _split_block(name: str) -> tuple[str, str]:
    """Return the number of a parameter's block and its name in the block, or two empty texts."""
    found = re.fullmatch(r"(?:language_model\.)?model\.layers\.(\d+)\.(.+)", name)
    return (found[1], found[2]) if found else ("", "")


def _tensor_name(name: str, names: TensorNameMap) -> str | None:
    """Return llama.cpp's name of a parameter in mlx-lm, or None if it has none."""
    block, ending = _split_block(name)
    if ending in _BLOCK_TENSORS:
        return f"blk.{block}.{_BLOCK_TENSORS[ending]}"

    for ours, hubs in _HUB_NAMES:
        name = name.replace(ours, hubs)
    return names.get_name(name, try_suffixes=(".weight", ".bias"))
