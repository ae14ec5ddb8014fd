"""Find in a config.json why mlx-lm fails with it, because its own errors do not say so."""

import re
from typing import Any

from ..errors import counted
from .rope_parameters import text_part

LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
"""The number of layers; its name varies by family."""

LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "hybrid_layer_pattern",
               "no_rope_layers", "is_moe_layer", "num_attention_heads_per_layer",
               "layer_rope_theta", "activation_sparsity_pattern")  # fmt: skip
"""Lists with an entry for each layer. Some published ones have more entries than layers."""

_PATTERNS = (
    "sliding_window_pattern", "full_attention_interval", "layer_group_size", "attn_layer_period",
    "attn_layer_offset", "mamba_step", "hybrid_override_pattern", "num_kv_shared_layers",
)  # fmt: skip
"""Other settings that decide the kinds of the layers."""

_NO_SUCH_LAYER = (
    "list index out of range", "not in list", "attention_mask() missing", "'full_attention'",
    "'sliding_attention'", "StopIteration",
)  # fmt: skip
"""What Python's errors say if a layer of some kind is not found, or another is taken for it."""


def explain_problem(config: dict[str, Any], problem: BaseException) -> str | None:
    """Return what is wrong with a config that mlx-lm can't make or run a model of, if known."""
    return _missing_fields(config, problem) or _missing_kinds(config, problem)


def _missing_fields(config: dict[str, Any], problem: BaseException) -> str | None:
    """Return a message if an error says that the config lacks fields."""
    found = re.search(
        r"__init__\(\) missing \d+ required positional arguments?: (.*)", str(problem)
    )
    if not isinstance(problem, TypeError) or found is None:
        return None
    names = ", ".join(re.findall(r"'(\w+)'", found[1]))
    return (
        f"its config.json has no {names:.200}, which mlx-lm's {config['model_type']} needs: get"
        " the folder again, or add what the model was made with"
    )


def _missing_kinds(config: dict[str, Any], problem: BaseException) -> str | None:
    """Return a message if an error is one that a missing kind of layer causes.

    Many families look for the first layer of each kind, and fail if there is none.
    """
    part = text_part(config)
    layers = next((part[name] for name in LAYERS if isinstance(part.get(name), int)), None)
    said = f"{type(problem).__name__} {problem}"
    if layers is None or not any(words in said for words in _NO_SUCH_LAYER):
        return None
    names = [name for name in (*_PATTERNS, *LAYER_LISTS) if part.get(name)]
    settings = "".join(f", {_described(name, part[name])}" for name in names)
    return (
        f"its config.json has {counted(layers, 'layer')}{settings}, and mlx-lm's"
        f" {config['model_type']} needs layers of every kind: use a newer mlx-lm, or another model"
    )


def _described(name: str, value: Any) -> str:
    """Return a setting with its value; of a list, only the kinds in it."""
    if not isinstance(value, list):
        return f"{name} {value!r:.40}"
    kinds = dict.fromkeys(str(kind) for kind in value)
    return f"{name} of {' and '.join(kinds):.80}"
