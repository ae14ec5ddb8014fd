"""A config.json as transformers 5 writes it, in the terms that mlx-lm reads; what it can't do is refused."""

from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _get_classes  # pyright: ignore[reportPrivateUsage]

from ..errors import ModelError
from .rope_parameters import TEXT_PARTS, check_rope, with_older_rope

_OTHER_NAMES = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
_NEUTRAL = {"final_logit_softcapping": (None, 0), "use_bidirectional_attention": (None, False)}
"""Settings that change a model's outputs, and their values that do not."""


def for_mlx_lm(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with what mlx-lm reads added to what transformers 5 wrote, without changing it.

    Raises: ModelError where the two contradict each other, or the order of its layers can't be told
    to mlx-lm.
    """
    made = with_older_rope(config)
    fields = _fields_of(made)
    text = next((made[name] for name in TEXT_PARTS if isinstance(made.get(name), dict)), {})

    # Fields that transformers 5 has in the language model's part alone, or by another name
    for name in ("vocab_size",):
        if name in fields and name not in made and name in text:
            made[name] = text[name]
    for part in (made, text):
        for name, other in _OTHER_NAMES.items():
            if (
                part.get(name) is None
                and part.get(other) is not None
                and (part is text or name in fields)
            ):
                part[name] = part[other]
        _add_window_pattern(part)
    return made


def check_config(model: nn.Module, config: dict[str, Any]) -> None:
    """Raise ModelError where a config asks for what ``model``, as mlx-lm made it, does not do."""
    check_rope(model, config)
    text = next((config[name] for name in TEXT_PARTS if isinstance(config.get(name), dict)), config)
    fields: set[str] = set()  # what the model's parts read, the outermost and those inside it
    for module in model.modules():
        for holder in (getattr(module, "args", None), getattr(module, "config", None)):
            fields |= set(getattr(holder, "__dataclass_fields__", ()))
    for name, values in _NEUTRAL.items():
        if fields and name not in fields and text.get(name) not in values:
            raise ModelError(
                f"its config.json has {name} {text[name]!r:.40}, which mlx-lm's"
                f" {config['model_type']} ignores: its answers would be another model's; use a"
                " newer mlx-lm, or another model"
            )


def _fields_of(config: dict[str, Any]) -> set[str]:
    """Return what mlx-lm reads at the top of a config; nothing where it does not know the family."""
    try:
        return set(_get_classes(config)[1].__dataclass_fields__)
    except (ValueError, AttributeError):
        return set()


def _add_window_pattern(part: dict[str, Any]) -> None:
    """Add Gemma 3's ``sliding_window_pattern``, n for every nth layer in full, to a config that lists its layers."""
    kinds = part.get("layer_types")
    if part.get("model_type") != "gemma3_text" or not isinstance(kinds, list):
        return
    full = [number for number, kind in enumerate(kinds, start=1) if kind == "full_attention"]
    pattern = full[0] if full else len(kinds) + 1
    if full != list(range(pattern, len(kinds) + 1, pattern)):
        raise ModelError(
            "its layer_types have full attention in other layers than every nth, which mlx-lm"
            " can't do"
        )
    if part.get("sliding_window_pattern", pattern) != pattern:
        raise ModelError(
            f"its config.json has sliding_window_pattern {part['sliding_window_pattern']}, but its"
            f" layer_types say {pattern}: remove the wrong one"
        )
    part["sliding_window_pattern"] = pattern
