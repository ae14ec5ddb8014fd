"""Llama 4 in GGUF files, whose config.json holds the language model in a part of its own.

Everywhere else in this folder, its config is flat like those of the other families.

Sources: ``Llama4Model`` of llama.cpp's converter; src/models/llama4.cpp.
"""

from collections.abc import Mapping
from typing import Any

_OF_THE_WHOLE = (
    "architectures", "quantization", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_UNNORMED_EXPERTS = 128
"""The number of experts by which llama.cpp recognizes Maverick, whose queries it does not norm."""


def llama4_fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that follow from the numbers of a config."""
    return {"use_qk_norm": config["num_local_experts"] != _UNNORMED_EXPERTS}


def as_config_json(config: dict[str, Any]) -> dict[str, Any]:
    """Return a flat config as config.json has it."""
    if config["model_type"] != "llama4":
        return config
    whole = {name: config[name] for name in _OF_THE_WHOLE if name in config}
    text = {name: value for name, value in config.items() if name not in _OF_THE_WHOLE}
    return whole | {"model_type": "llama4", "text_config": text | {"model_type": "llama4_text"}}
