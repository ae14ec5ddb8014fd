"""Find settings and tensors of a PEFT adapter that vLLM refuses or applies differently.

The rules are those of vLLM 0.33.0: its checks in vllm/lora, and the linear layers, the
``embedding_modules`` and the ``packed_modules_mapping`` of its models.
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
_MORE_MODULES: dict[str, tuple[str, ...]] = {
    "gemma4": _PER_LAYER_INPUTS,
    "gemma4_text": _PER_LAYER_INPUTS,
    "granitemoehybrid": ("in_proj", "out_proj", "input_linear", "output_linear"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "qwen3_5": _DELTA_NET,
    "qwen3_5_moe": _DELTA_NET,
    "qwen3_next": ("in_proj_qkvz", "in_proj_ba", "out_proj"),
}
"""Model type → the linear layers besides ``_MODULES`` that vLLM adapts."""

_EMBEDDINGS_AND_HEAD = (
    "exaone4", "falcon_h1", "granite", "granitemoe", "granitemoehybrid", "lfm2", "llama",
    "mixtral", "nemotron", "nemotron_h", "phi3", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe",
)  # fmt: skip
"""The model types whose embeddings and head vLLM adapts."""

_EMBEDDINGS_ONLY = ("cohere2", "olmo2", "olmo3", "smollm3")
"""The model types whose embeddings vLLM adapts, but not their head."""

_REMOVED = {"dots1": "0.23"}
"""Model type → the last version of vLLM that has it."""

_UNSUPPORTED = ("use_dora", "modules_to_save")
"""Settings that vLLM refuses unless they are off."""

# The model types whose stacked experts vLLM adapts, and the last parts of the names of down_proj
# and gate_up_proj. vLLM needs both.
_STACKED = ("gpt_oss",)
_STACKED_NAMES = ("experts", "base_layer")
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
    problems = _config_refusals(config)
    if model_type in _REMOVED:
        problems.append(f"vLLM supports {model_type} only up to version {_REMOVED[model_type]}")
    problems += _tensor_refusals(names, model_type)

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
    """Return a message for each tensor that vLLM refuses."""
    endings = tuple(ending for ending in LEAVES if ending != MAGNITUDE)
    modules = _adapted_modules(model_type)

    # Check each tensor, and collect the projections of the experts.
    problems: list[str] = []
    stacked: set[str] = set()
    single: set[str] = set()
    for name in names:
        module = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        leaf = module.rpartition(".")[2]
        if not name.startswith(PREFIX) or not name.endswith(endings):
            problems.append(f"the tensor {name} is neither a lora_A nor a lora_B")
        elif leaf not in modules:
            problems.append(f"vLLM can't adapt {module} of a {model_type} model")
        elif leaf in _STACKED_NAMES:
            stacked.add(leaf)
        elif re.search(r"\.experts\.\d+\.", module):
            single.add(leaf)

    # vLLM needs adapters on all projections of the experts.
    if single and len(single) < _PROJECTIONS:
        problems.append("each expert needs adapters on all three projections")
    if len(stacked) == 1:
        problems.append("the experts need adapters on both gate_up_proj and down_proj")
    return problems


def _adapted_modules(model_type: str) -> tuple[str, ...]:
    """Return the last parts of the names of the modules that vLLM adapts in a model type."""
    modules = (*_MODULES, *_MORE_MODULES.get(model_type, ()))
    if model_type in _EMBEDDINGS_AND_HEAD:
        modules = (*modules, "embed_tokens", "lm_head")
    if model_type in _EMBEDDINGS_ONLY:
        modules = (*modules, "embed_tokens")
    if model_type in _STACKED:
        modules = (*modules, *_STACKED_NAMES)
    return modules
