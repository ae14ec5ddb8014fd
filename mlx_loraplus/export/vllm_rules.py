"""Find settings and tensors of a PEFT adapter that vLLM refuses.

The rules are from vLLM's documentation and from the checks in vllm/lora.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from .peft_experts import JOINED
from .peft_tensors import LEAVES, MAGNITUDE, PREFIX

# The largest --max-lora-rank, from vllm/config/lora.py. Each server sets a limit (1, 8, 16, 32, 64,
# 128, 256, 320 or 512), and accepts any rank up to this limit.
_MAX_RANK = 512
_MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3",
)  # fmt: skip
_UNSUPPORTED = ("use_dora", "modules_to_save")
_PATTERNS = ("rank_pattern", "alpha_pattern")

# The model types whose stacked experts vLLM adapts, and the last parts of the names of down_proj
# and gate_up_proj. It needs both.
_STACKED = ("gpt_oss",)
_STACKED_NAMES = ("experts", "base_layer")


def vllm_refusals(config: Mapping[str, Any], names: Iterable[str], model_type: str) -> list[str]:
    """Return a message for each setting and tensor of a PEFT adapter that vLLM refuses.

    Args:
        config: The contents of adapter_config.json.
        names: The names of the adapter's tensors.
        model_type: The base's model type.
    """
    return [*_config_refusals(config), *_tensor_refusals(names, model_type)]


def _config_refusals(config: Mapping[str, Any]) -> list[str]:
    """Return a message for each setting that vLLM refuses."""
    problems = [
        f"{key} is {json.dumps(config[key])[:80]}, which vLLM does not support"
        for key in _UNSUPPORTED
        if config.get(key)
    ]
    # vLLM ignores patterns. Those for gate_up_proj do not matter, because vLLM reads gate and up of
    # each expert apart, with the rank and the scale of the other layers.
    for key in _PATTERNS:
        pattern = config.get(key) or {}
        if set(pattern) - {JOINED}:
            value = json.dumps(pattern)[:80]
            problems.append(f"{key} is {value}, which vLLM does not support")
    if config["r"] > _MAX_RANK:
        problems.append(f"r is {config['r']}, allowed are up to {_MAX_RANK}")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}, allowed is 'none'")
    if not isinstance(config["target_modules"], list):
        problems.append("target_modules is a pattern, allowed is a list of names")
    return problems


def _tensor_refusals(names: Iterable[str], model_type: str) -> list[str]:
    """Return a message for each tensor that vLLM refuses."""
    leaves = tuple(leaf for leaf in LEAVES if leaf != MAGNITUDE)

    # vLLM's Gemma models support adapters on neither the embeddings nor the head.
    modules = _MODULES
    if not model_type.startswith("gemma"):
        modules = (*_MODULES, "embed_tokens", "lm_head")

    if model_type in _STACKED:
        modules = (*modules, *_STACKED_NAMES)

    problems: list[str] = []
    stacked: set[str] = set()
    for name in names:
        module = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        leaf = module.rpartition(".")[2]
        if not name.startswith(PREFIX) or not name.endswith(leaves):
            problems.append(f"the tensor {name} is no lora_A or lora_B")
        elif leaf not in modules:
            problems.append(f"{module} is none of the modules that its {model_type} can adapt")
        elif leaf in _STACKED_NAMES:
            stacked.add(leaf)

    if len(stacked) == 1:
        problems.append("the experts need adapters on both gate_up_proj and down_proj")
    return problems
