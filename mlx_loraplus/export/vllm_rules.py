"""Find settings and tensors of a PEFT adapter that vLLM refuses or applies differently.

The rules are those of vLLM 0.33.0: its checks in vllm/lora, and the linear layers, the
``embedding_modules`` and the ``packed_modules_mapping`` of its models. scripts/judges/check_vllm
compares them with what vLLM's own code loads.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .peft_import_tensors import LEAVES, MAGNITUDE, PREFIX

# The largest --max-lora-rank, from vllm/config/lora.py. Each server sets a limit (1, 8, 16, 32, 64,
# 128, 256, 320 or 512), and accepts any rank up to this limit.
_MAX_RANK = 512

_MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3",
)  # fmt: skip

_PER_LAYER_INPUTS = ("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection")
_DELTA_NET = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")  # of kv_b_proj, vLLM keeps a copy
_MORE_MODULES: dict[str, tuple[str, ...]] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gemma4": _PER_LAYER_INPUTS,
    "gemma4_text": _PER_LAYER_INPUTS,
    "glm4_moe_lite": _LATENT,
    "granitemoehybrid": ("in_proj", "out_proj", "input_linear", "output_linear"),
    "lfm2": ("in_proj", "out_proj"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "qwen3_5": _DELTA_NET,
    "qwen3_5_moe": _DELTA_NET,
    "qwen3_next": ("in_proj_qkvz", "in_proj_ba", "out_proj"),
    "starcoder2": ("c_fc", "c_proj"),
}
"""Model type → the linear layers besides ``_MODULES`` that vLLM adapts."""

_EMBEDDINGS_AND_HEAD = (
    "ernie4_5", "exaone4", "falcon_h1", "granite", "granitemoe", "granitemoehybrid", "lfm2",
    "llama", "llama4", "mixtral", "nemotron", "nemotron_h", "phi3", "qwen3", "qwen3_5",
    "qwen3_5_moe", "qwen3_moe",
)  # fmt: skip
"""The model types whose embeddings and head vLLM adapts."""

_EMBEDDINGS_ONLY = (
    "cohere", "cohere2", "dots1", "olmo2", "olmo3", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
"""The model types whose embeddings vLLM adapts, but not their head."""

_REORDERED = {"llama4": ("q_proj", "k_proj"), "llama4_text": ("q_proj", "k_proj")}
"""Model type → the layers whose rows vLLM reorders in the base, and not in the adapter."""

_NO_EXPERTS = ("dots1",)
"""The model types that vLLM runs with transformers' code, in which it can't adapt experts."""

_UNSUPPORTED = ("use_dora", "modules_to_save")
"""Settings that vLLM refuses unless they are off."""

_STACKED = ("gpt_oss",)
"""The model types whose stacked experts vLLM adapts as they are."""

_STACKED_IF_ASKED = ("gemma4", "gemma4_text", "granitemoe", "granitemoehybrid")
"""The model types whose stacked experts vLLM adapts if two settings ask for it."""

# The last parts of the names of down_proj and gate_up_proj if they are stacked; vLLM needs both.
_STACKED_NAMES = ("experts", "base_layer")
_ASK_FOR_STACKED = (
    "vLLM adapts these experts only if the server gets --enable-mixed-moe-lora-format, and the"
    " adapter is given as --lora-modules"
    """ '{"name": "NAME", "path": "FOLDER", "is_3d_lora_weight": true}'"""
)
_PROJECTIONS = 3  # of an expert that is stored separately; vLLM needs all of them


def vllm_refusals(
    config: Mapping[str, Any],
    names: Collection[str],
    model_type: str,
    keys_as_values: Collection[str] = (),
) -> list[str]:
    """Return a message for each part of a PEFT adapter that vLLM refuses or applies differently.

    Args:
        config: The contents of adapter_config.json.
        names: The names of the adapter's tensors.
        model_type: The base's model type.
        keys_as_values: The names of the base's ``k_proj`` whose outputs are also the values.
    """
    problems = _config_refusals(config) + _tensor_refusals(names, model_type)

    # vLLM stores the weights of such a layer twice, and adapts one of them.
    for name in keys_as_values:
        if f"{PREFIX}{name}.lora_A.weight" in names:
            problems.append(
                f"{name} computes keys and values, but vLLM would change only the keys: fuse the"
                " adapter, or train without k_proj"
            )
    return problems


def _config_refusals(config: Mapping[str, Any]) -> list[str]:
    """Return a message for each setting that vLLM refuses."""
    problems = [
        f"{key} is {json.dumps(config[key])[:80]}, which vLLM does not support"
        for key in _UNSUPPORTED
        if config.get(key)
    ]

    # The limit also applies to the ranks in a pattern.
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank > _MAX_RANK:
        problems.append(f"the rank is {rank}, allowed are ranks up to {_MAX_RANK}")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}, allowed is 'none'")
    if not isinstance(config["target_modules"], list):
        problems.append("target_modules is a pattern, allowed is a list of names")
    return problems


def _tensor_refusals(names: Iterable[str], model_type: str) -> list[str]:
    """Return a message for each layer whose tensors vLLM refuses or applies differently."""
    endings = tuple(ending for ending in LEAVES if ending != MAGNITUDE)
    adapted = adapted_modules(model_type)

    # Check each layer, and collect the projections of the experts.
    problems: list[str] = []
    stacked: set[str] = set()
    single: set[str] = set()
    for name in names:
        module = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        leaf = module.rpartition(".")[2]
        if not name.startswith(PREFIX) or not name.endswith(endings):
            problems.append(f"the tensor {name} is neither a lora_A nor a lora_B")
        elif leaf not in adapted:
            problems.append(f"vLLM can't adapt {module} of a {model_type} model")
        elif leaf in _REORDERED.get(model_type, ()):
            problems.append(
                f"vLLM reorders the rows of {module}, but not those of its adapter: fuse the"
                f" adapter, or train without {leaf}"
            )
        elif leaf in _STACKED_NAMES:
            stacked.add(leaf)
        elif re.search(r"\.experts\.\d+\.", module):
            single.add(leaf)

    # A layer has two tensors, and one message.
    problems += _expert_refusals(stacked, single, model_type)
    return list(dict.fromkeys(problems))


def _expert_refusals(stacked: Collection[str], single: Collection[str], kind: str) -> list[str]:
    """Return a message for each reason why vLLM refuses the experts of an adapter.

    Args:
        stacked: The last parts of the names of stacked experts with an adapter.
        single: The same of experts that are stored one by one.
        kind: The model's type.
    """
    problems: list[str] = []
    if single and kind in _NO_EXPERTS:
        problems.append(f"vLLM can't adapt the experts of a {kind} model")
    elif single and len(single) < _PROJECTIONS:
        problems.append("each expert needs adapters on all three projections")

    if len(stacked) == 1:
        problems.append("the experts need adapters on both gate_up_proj and down_proj")
    elif stacked and kind in _STACKED_IF_ASKED:
        problems.append(_ASK_FOR_STACKED)
    return problems


def adapted_modules(model_type: str) -> tuple[str, ...]:
    """Return the last parts of the names of the modules that vLLM adapts in a model type."""
    modules = (*_MODULES, *_MORE_MODULES.get(model_type, ()))
    if model_type in _EMBEDDINGS_AND_HEAD:
        modules = (*modules, "embed_tokens", "lm_head")
    if model_type in _EMBEDDINGS_ONLY:
        modules = (*modules, "embed_tokens")
    if model_type in (*_STACKED, *_STACKED_IF_ASKED):
        modules = (*modules, *_STACKED_NAMES)
    return modules
