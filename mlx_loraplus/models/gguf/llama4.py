"""The config of Llama 4 in GGUF files.

Its config.json has the settings of the language model in a nested dictionary. All other code in
this folder works with a flat config, as for the other families.

Sources: ``Llama4Model`` of llama.cpp's converter; src/models/llama4.cpp.
"""

from collections.abc import Mapping
from typing import Any

_TOP_LEVEL = (
    "architectures", "quantization", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""The settings that are not those of the language model alone."""

_UNNORMED_EXPERTS = 128
"""The number of experts of Maverick, whose queries llama.cpp does not normalize."""


def llama4_fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a GGUF file does not store, from the numbers of a config."""
    return {"use_qk_norm": config["num_local_experts"] != _UNNORMED_EXPERTS}


def as_config_json(config: dict[str, Any]) -> dict[str, Any]:
    """Return a flat config in the form of config.json, which differs only for Llama 4."""
    if config["model_type"] != "llama4":
        return config

    top = {name: config[name] for name in _TOP_LEVEL if name in config}
    text = {name: value for name, value in config.items() if name not in _TOP_LEVEL}
    return top | {"model_type": "llama4", "text_config": text | {"model_type": "llama4_text"}}
