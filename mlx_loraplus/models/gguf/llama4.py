"""Configs of Llama 4, whose config.json holds the language model under ``text_config``.

Everywhere else in this folder, its config is flat like those of the other families.

Sources: ``Llama4Model`` of llama.cpp's converter; src/models/llama4.cpp.
"""

from collections.abc import Mapping
from typing import Any

_TOP_LEVEL = (
    "architectures", "quantization", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""The keys that stay outside ``text_config``."""

_UNNORMED_EXPERTS = 128
"""The number of experts by which llama.cpp recognizes Maverick, whose queries it does not norm."""


def llama4_fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that follow from the numbers of a config."""
    return {"use_qk_norm": config["num_local_experts"] != _UNNORMED_EXPERTS}


def as_config_json(config: dict[str, Any]) -> dict[str, Any]:
    """Return a flat config in the form of config.json."""
    if config["model_type"] != "llama4":
        return config

    top_level = {name: config[name] for name in _TOP_LEVEL if name in config}
    text = {name: value for name, value in config.items() if name not in _TOP_LEVEL}
    text["model_type"] = "llama4_text"
    return top_level | {"model_type": "llama4", "text_config": text}
