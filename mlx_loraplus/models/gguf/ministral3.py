"""The rotary settings of Ministral 3 in GGUF files.

Its queries grow with the logarithm of the position, in steps of the original context, and YaRN does
not scale its attention.

Sources: ``Mistral3Model`` of llama.cpp's converter; src/models/mistral3.cpp.
"""

from typing import Any

from .metadata_numbers import MetadataNumbers

_EQUAL_SCALES = {"mscale": 1.0, "mscale_all_dim": 1.0}
_GROWTH = "llama_4_scaling_beta"


def ministral3_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that other families have in place of ``rope_parameters``.

    The scales of YaRN are left out if they have no effect, as in every Ministral 3.
    """
    scaling = dict(config["rope_parameters"])
    theta = scaling.pop("rope_theta")
    if scaling.get("mscale") == scaling.get("mscale_all_dim") == 1:
        for name in _EQUAL_SCALES:
            del scaling[name]
    else:
        scaling.setdefault("mscale", 1.0)  # ``rope_problem`` reports it as not supported
    return {"rope_theta": theta, "rope_scaling": scaling}


def ministral3_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp stores of a config besides its numbers, by key."""
    return {
        "rope.scaling.yarn_log_multiplier": _EQUAL_SCALES["mscale_all_dim"],
        "attention.temperature_scale": float(config["rope_parameters"][_GROWTH]),
    }


def ministral3_settings(numbers: MetadataNumbers, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file besides its numbers; move the rotary ones out of ``config``.

    Args:
        numbers: Reads the file, and collects the problems with it.
        config: The config with its numbers.
    """
    scaling, theta = config.pop("rope_scaling", None), config.pop("rope_theta")
    if not scaling:
        numbers.problems.append("it has no RoPE scaling, which mlx-lm's Ministral 3 requires")
        scaling = {}
    growth = numbers.read("attention.temperature_scale")
    return {"rope_parameters": scaling | _EQUAL_SCALES | {"rope_theta": theta, _GROWTH: growth}}
