"""Translate transformers 5 configs for mlx-lm, and refuse settings that mlx-lm would ignore."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _get_classes  # pyright: ignore[reportPrivateUsage]
from mlx_lm.utils import load_config as mlx_lm_config

from ..errors import ModelError
from .activation_note import check_activation
from .config_numbers import check_numbers
from .rope_magnitude import check_magnitude
from .rope_parameters import TEXT_PARTS, check_rope, settings_read, text_part, with_older_rope

_OTHER_NAMES = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}

_NEUTRAL = {"final_logit_softcapping": (None, 0), "use_bidirectional_attention": (None, False)}
"""Setting that can change a model's outputs → the values that do not change them."""


def load_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config as mlx-lm reads it, with the end tokens of both config files.

    In mlx-lm, the ``eos_token_id`` of generation_config.json replaces that of config.json. Here,
    generation ends at the end tokens of both files.

    Raises:
        ModelError: An ``eos_token_id`` is not a token id or a list of token ids.
    """
    config = mlx_lm_config(folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generation = _generation_config(folder)

    # mlx-lm returns the end tokens of only one file.
    found = _end_tokens([config.get("eos_token_id")])
    ends = _end_tokens(part.get("eos_token_id") for part in (stored, generation))
    if found != ends:
        config["eos_token_id"] = ends
    return config


def for_mlx_lm(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a transformers 5 config with the fields that mlx-lm reads added.

    Raises:
        ModelError: Two fields contradict each other, a size is not a positive number, or mlx-lm
            can't express the order of the layers.
    """
    check_numbers(config)
    made = with_older_rope(config)
    fields = _fields_of(made)
    text = next((made[name] for name in TEXT_PARTS if isinstance(made.get(name), dict)), {})

    # transformers 5 stores this field only in the language model's part.
    if "vocab_size" in fields and "vocab_size" not in made and "vocab_size" in text:
        made["vocab_size"] = text["vocab_size"]

    # transformers 5 uses other names for these fields.
    for part in (made, text):
        for name, other in _OTHER_NAMES.items():
            is_read = part is text or name in fields
            is_missing = part.get(name) is None and part.get(other) is not None
            if is_read and is_missing:
                part[name] = part[other]
        _add_window_pattern(part)
    return made


def check_config(model: nn.Module, config: dict[str, Any]) -> None:
    """Check that ``model``, as mlx-lm made it, follows its config.

    Raises:
        ModelError: mlx-lm ignores a setting that changes the model's outputs.
    """
    check_rope(model, config)
    check_magnitude(model, config)
    _check_rotary_factor(config)
    check_activation(model, config)

    # Refuse other settings if they change the outputs and no part of the model reads them.
    fields = settings_read(model.modules())
    text = text_part(config)
    for name, values in _NEUTRAL.items():
        if fields and name not in fields and text.get(name) not in values:
            raise ModelError(
                f"its config.json has {name} {text[name]!r:.40}, which mlx-lm's"
                f" {config['model_type']} ignores, so its outputs would be wrong; use a newer"
                " mlx-lm, or another model"
            )


def _generation_config(folder: Path) -> dict[str, Any]:
    """Return generation_config.json; empty if it is missing or, as in mlx-lm, not JSON."""
    file = folder / "generation_config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return {}


def _end_tokens(values: Iterable[Any]) -> list[int]:
    """Return the token ids in several ``eos_token_id`` values, in order, without duplicates."""
    ids: list[int] = []
    for value in values:
        if value is None:
            continue
        for token in value if isinstance(value, list) else [value]:
            if not isinstance(token, int) or isinstance(token, bool):
                raise ModelError(
                    f"its eos_token_id is {value!r:.80}; allowed are a token id or a list of them"
                )
            if token not in ids:
                ids.append(token)
    return ids


def _check_rotary_factor(config: dict[str, Any]) -> None:
    """Refuse a GLM that rotates only a part of each head, because mlx-lm rotates the whole head.

    Llama is not checked: transformers ignores its ``partial_rotary_factor`` too.
    """
    if config.get("model_type") != "glm":
        return

    # Start from the default of transformers; an older config or rope_parameters may replace it.
    factor = config.get("partial_rotary_factor", 0.5)
    rope = config.get("rope_parameters") or {}
    factor = rope.get("partial_rotary_factor", factor)
    if factor != 1:
        raise ModelError(
            f"it rotates {factor} of each attention head (partial_rotary_factor, by default 0.5),"
            " but mlx-lm's glm rotates the whole head, so its outputs would be wrong; use a GLM-4"
            " of model_type glm4, or another model"
        )


def _fields_of(config: dict[str, Any]) -> set[str]:
    """Return the top-level fields that mlx-lm reads; empty if mlx-lm does not know the family."""
    try:
        return set(_get_classes(config)[1].__dataclass_fields__)
    except (ValueError, AttributeError):
        return set()


def _add_window_pattern(part: dict[str, Any]) -> None:
    """Add Gemma 3's ``sliding_window_pattern`` to a config that lists its ``layer_types``.

    A pattern of n means that every nth layer has full attention.
    """
    kinds = part.get("layer_types")
    if part.get("model_type") != "gemma3_text" or not isinstance(kinds, list):
        return

    # Find the numbers of the layers with full attention, counted from 1.
    full = [number for number, kind in enumerate(kinds, start=1) if kind == "full_attention"]
    pattern = full[0] if full else len(kinds) + 1
    if full != list(range(pattern, len(kinds) + 1, pattern)):
        raise ModelError(
            "its layer_types do not have full attention in exactly every nth layer, which mlx-lm"
            " requires"
        )

    # If the config also has the pattern, it must agree.
    stored = part.get("sliding_window_pattern", pattern)
    if stored != pattern:
        raise ModelError(
            f"its config.json has sliding_window_pattern {stored}, but its layer_types say"
            f" {pattern}: remove the wrong one"
        )
    part["sliding_window_pattern"] = pattern
