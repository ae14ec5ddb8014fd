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
from .layer_kind_names import check_kind_names
from .layer_kinds import check_layer_settings, check_windows
from .rope_magnitude import check_magnitude
from .rope_parameters import TEXT_PARTS, check_rope, settings_read, text_part, with_older_rope

_OTHER_NAMES = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}

_EXAONE_NAMES = {"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps"}
"""Field of EXAONE 3 that mlx-lm reads → its name in transformers 5."""

_PATTERNS = {
    "cohere2": "sliding_window_pattern",
    "gemma3_text": "sliding_window_pattern",
    "qwen3_5_moe_text": "full_attention_interval",
    "qwen3_5_text": "full_attention_interval",
    "qwen3_next": "full_attention_interval",
}
"""Family → the field in which mlx-lm reads that every nth layer has full attention."""

_MAMBA_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
"""Kind of layer in transformers 5 → its name in mlx-lm's Granite 4."""

_FULL_ATTENTION_SIZES = {
    "head_dim": "global_head_dim",
    "num_key_value_heads": "num_global_key_value_heads",
}
"""Entry of ``per_layer_config`` in transformers 5 → the field of mlx-lm's Gemma 4."""

_NEUTRAL = {
    "clip_qkv": (None,),
    "final_logit_softcapping": (None, 0),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "scale_attn_weights": (None, True),
    "use_bidirectional_attention": (None, False, "vision"),
    "is_causal": (None, True),
}
"""Setting that can change a model's outputs → the values that do not change them; "vision" concerns
the tokens of images only."""

_NEUTRAL_IN: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v3": {"rope_interleave": (None, True)},
    "glm4_moe_lite": {"rope_interleave": (None, True)},
    "gpt_oss": {"swiglu_alpha": (None, 1.702), "swiglu_limit": (None, 7)},
    "nanochat": {"final_logit_softcapping": (None, 15)},
    "qwen2_moe": {"norm_topk_prob": (None, False)},
}
"""Family → the same for its own settings."""


def load_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config as mlx-lm reads it, with the end tokens of both config files.

    In mlx-lm, the ``eos_token_id`` of generation_config.json replaces that of config.json. Here,
    generation ends at the end tokens of both files.

    Raises:
        ModelError: An ``eos_token_id`` is not a token id or a list of token ids, or
            generation_config.json is not an object.
    """
    generation = _generation_config(folder)
    config = mlx_lm_config(folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    # mlx-lm returns the end tokens of only one file.
    found = _end_tokens([config.get("eos_token_id")])
    ends = _end_tokens(part.get("eos_token_id") for part in (stored, generation))
    if found != ends:
        config["eos_token_id"] = ends
    return config


def for_mlx_lm(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a transformers 5 config with the fields that mlx-lm reads added.

    Raises:
        ModelError: Two fields contradict each other, a size is not a positive number, a list has
            no entry or an unknown kind for some layer, or mlx-lm can't express the layers' order.
    """
    check_numbers(config)
    check_layer_settings(config)
    check_kind_names(config)
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
        if part.get("model_type") == "exaone":
            older = {name: part[other] for name, other in _EXAONE_NAMES.items() if other in part}
            part.update(older | part)

        # It also lists the kinds of the layers, and what differs between them.
        _add_full_attention_pattern(part)
        _translate_exaone_4(part)
        _translate_granite_4(part)
        _add_full_attention_sizes(part)
    return made


def check_config(model: nn.Module, config: dict[str, Any]) -> None:
    """Check that ``model``, as mlx-lm made it, follows its config.

    Raises:
        ModelError: mlx-lm ignores a setting that changes the model's outputs.
    """
    check_rope(model, config)
    check_magnitude(model, config)
    _check_rotary_factor(config)
    check_windows(model, config)
    check_activation(model, config)

    # Refuse other settings if they change the outputs and no part of the model reads them.
    fields = settings_read(model.modules())
    text = text_part(config)
    neutral = _NEUTRAL | _NEUTRAL_IN.get(config["model_type"], {})
    for name, values in neutral.items():
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
        found: Any = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except json.JSONDecodeError:
        return {}
    except UnicodeDecodeError:
        found = "not UTF-8 text"
    if not isinstance(found, dict):
        raise ModelError(
            f"its generation_config.json is {found!s:.40}; allowed is a JSON object: remove the"
            " file, or get it again"
        )
    return found


def _end_tokens(values: Iterable[Any]) -> list[int]:
    """Return the token ids in several ``eos_token_id`` values, in order, without duplicates."""
    ids: list[int] = []
    for value in values:
        if value is None:
            continue
        for token in value if isinstance(value, list) else [value]:
            is_id = isinstance(token, int) and not isinstance(token, bool)
            if not is_id or not 0 <= token < 1 << 31:
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


def _add_full_attention_pattern(part: dict[str, Any]) -> None:
    """Add the field that mlx-lm reads instead of ``layer_types``.

    A pattern of n means that every nth layer has full attention.
    """
    name, kinds = _PATTERNS.get(part.get("model_type", "")), part.get("layer_types")
    if name is None or not isinstance(kinds, list):
        return

    # Find the numbers of the layers with full attention, counted from 1.
    full = [number for number, kind in enumerate(kinds, start=1) if kind == "full_attention"]
    pattern = full[0] if full else len(kinds) + 1
    if full != list(range(pattern, len(kinds) + 1, pattern)):
        raise ModelError(
            "its layer_types do not have full attention in exactly every nth layer, which mlx-lm"
            " requires: use another model"
        )

    # If the config also has the pattern, it must give the same layers.
    stored = part.get(name)
    if stored is None:
        part[name] = pattern
    elif full != list(range(stored, len(kinds) + 1, stored)):
        raise ModelError(
            f"its config.json has {name} {stored}, but its layer_types say {pattern}: remove the"
            " wrong one"
        )


def _translate_exaone_4(part: dict[str, Any]) -> None:
    """Write the kinds of EXAONE 4's layers as the string that mlx-lm reads, such as LLLG."""
    if part.get("model_type") != "exaone4":
        return

    # transformers has a period n, or a list of kinds in ``layer_types``.
    stored, kinds = part.get("sliding_window_pattern"), part.get("layer_types")
    if isinstance(stored, int):
        stored = part["sliding_window_pattern"] = "L" * (stored - 1) + "G" if stored else None
    if not isinstance(kinds, list):
        return
    listed = "".join("L" if kind == "sliding_attention" else "G" for kind in kinds)
    repeated = "".join(stored[i % len(stored)] for i in range(len(kinds))) if stored else None

    # A model without a window rotates its queries and keys in every layer.
    if part.get("sliding_window") is None and "L" not in listed:
        part["sliding_window_pattern"] = None
    elif repeated is None:
        part["sliding_window_pattern"] = listed
    elif repeated != listed:
        raise ModelError(
            f"its config.json has sliding_window_pattern {stored}, but its layer_types say"
            f" {listed:.80}: remove the wrong one"
        )


def _translate_granite_4(part: dict[str, Any]) -> None:
    """Give the layers and the missing positions of a Granite 4 the names that mlx-lm knows."""
    if part.get("model_type") != "granitemoehybrid":
        return

    kinds = part.get("layer_types")
    if isinstance(kinds, list):
        part["layer_types"] = [_MAMBA_KINDS.get(kind, kind) for kind in kinds]
    if part.get("position_embedding_type", "rope") is None:
        part["position_embedding_type"] = "nope"


def _add_full_attention_sizes(part: dict[str, Any]) -> None:
    """Add the sizes of Gemma 4's layers with full attention, from a ``per_layer_config``."""
    layers = part.get("per_layer_config")
    if part.get("model_type") not in ("gemma4_text", "gemma4_unified_text") or not isinstance(
        layers, dict
    ):
        return

    # mlx-lm has one size for all of these layers, and another for all other layers.
    kinds = enumerate(part.get("layer_types") or [])
    full = {number for number, kind in kinds if kind == "full_attention"}
    sizes = list(layers.values())
    is_one = all(size == sizes[0] and set(size) <= set(_FULL_ATTENTION_SIZES) for size in sizes)
    if {int(number) for number in layers} != full or not is_one:
        raise ModelError(
            "its per_layer_config changes more than head_dim and num_key_value_heads of the layers"
            " with full attention, and mlx-lm can do no more; use another model"
        )
    for name, ours in _FULL_ATTENTION_SIZES.items():
        if sizes and name in sizes[0]:
            part.setdefault(ours, sizes[0][name])
