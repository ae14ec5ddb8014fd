"""Translate transformers 5's ``rope_parameters`` into the older fields that mlx-lm's families read.

transformers 5 replaced ``rope_theta``, ``rope_scaling``, ``rope_local_base_freq`` and
``partial_rotary_factor`` by one dictionary, or by one dictionary for each kind of layer. A model
family in mlx-lm that does not read the dictionary silently uses its default base. Therefore this
module adds the older fields. ``check_rope`` then checks that the layers that mlx-lm made match the
config, whether the family reads the older or the newer fields.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE, SuScaledRoPE, YarnRoPE, initialize_rope

from ..errors import ModelError

KEY = "rope_parameters"

TEXT_PARTS = ("text_config", "language_config", "llm_config")
"""The fields that may contain the language model's part of a multimodal config."""

_OLDER_FIELDS = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",  # GPT-NeoX
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",  # GPT-NeoX
    "rope_pct": "partial_rotary_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
"""Older field → the entry of ``rope_parameters`` that replaced this field."""

_DEFAULT_BASE = 10_000.0  # of transformers, if the config has none
_LOCAL_BASE = "rope_local_base_freq"

_SAME_KINDS = ({"default", "mrope"}, {"su", "longrope"})
"""Two names for the same kind of scaling."""

RopeParameters = dict[str, Any]


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a multimodal config, or the whole config otherwise."""
    parts = (config[name] for name in TEXT_PARTS if isinstance(config.get(name), dict))
    return next(parts, config)


def settings_read(modules: Iterable[Any]) -> set[str]:
    """Return the names of the config settings that a model's modules read."""
    names: set[str] = set()
    for module in modules:
        for holder in (getattr(module, "args", None), getattr(module, "config", None)):
            names |= set(getattr(holder, "__dataclass_fields__", ()))
    return names


def _settings_required(modules: Iterable[Any]) -> set[str]:
    """Return the names of the config settings that mlx-lm can't make a model without."""
    names: set[str] = set()
    for module in modules:
        holder: Any = getattr(module, "args", None) or getattr(module, "config", None)
        if not dataclasses.is_dataclass(holder):
            continue
        for field in dataclasses.fields(holder):
            has_default = field.default is not dataclasses.MISSING
            has_factory = field.default_factory is not dataclasses.MISSING
            if not has_default and not has_factory:
                names.add(field.name)
    return names


def with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a config with the older fields added that match its ``rope_parameters``.

    Raises:
        ModelError: An older field contradicts ``rope_parameters``, ``rope_parameters`` does not
            have the form that transformers writes, or a base or factor is not a positive number.
    """
    _check_values(config)
    # In a multimodal config, the fields are in the language model's part.
    parts: dict[str, Any] = {}
    for name in TEXT_PARTS:
        if isinstance(config.get(name), dict):
            parts[name] = with_older_rope(config[name])
    if config.get(KEY) is None:
        return config | parts

    # If the config has an older field and the newer entry, the two must agree.
    older = _older_fields(_by_layer_type(config[KEY]))
    for name, value in older.items():
        stored = config.get(name)
        if stored is not None and not _agrees(name, stored, value):
            raise ModelError(
                f"its config.json has {name} {stored!r:.80}, but {KEY} says {value!r:.80}:"
                " remove the wrong one"
            )

    missing = {name: value for name, value in older.items() if config.get(name) is None}
    return config | parts | missing


def _check_values(config: dict[str, Any]) -> None:
    """Check the bases and factors of RoPE in a config. Some families have a list of them.

    Raises:
        ModelError: One of them is not a positive number.
    """
    part = text_part(config)
    holders = [part, part.get("rope_scaling"), part.get(KEY)]
    for holder in holders:
        for name in ("rope_theta", "rotary_emb_base", "factor"):
            value: Any = holder.get(name) if isinstance(holder, dict) else None
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if isinstance(value, str | bool) or (is_number and not 0 < value < math.inf):
                raise ModelError(
                    f"its config.json has {name} {value!r:.40}, which must be a positive number"
                )


def without_unread_rope(
    config: dict[str, Any], original: dict[str, Any], model: nn.Module
) -> dict[str, Any]:
    """Return a config without the fields that ``with_older_rope`` added and the model ignores.

    Args:
        config: The config with added fields.
        original: The config before the fields were added.
        model: The model that mlx-lm made from ``config``.
    """
    parts = (model, getattr(model, "language_model", None), getattr(model, "model", None))
    read, required = settings_read(parts), _settings_required(parts)

    kept: dict[str, Any] = {}
    for name, value in config.items():
        is_read = name in read and (value is not None or name in required)
        if name in TEXT_PARTS and isinstance(value, dict):
            kept[name] = without_unread_rope(value, original.get(name, {}), model)
        elif name in original or is_read:
            kept[name] = value
    return kept


def check_rope(model: nn.Module, config: dict[str, Any]) -> None:
    """Check that the rotary layers of a model match its ``rope_parameters`` or ``rope_scaling``.

    Raises:
        ModelError: A layer does not match any of the parameters, no layer uses the parameters of
            one kind, or no layer applies the ``rope_scaling``.
    """
    part = text_part(config)
    ropes: list[Any] = [module for module in model.modules() if isinstance(module, nn.RoPE)]
    if any(rope.base is None for rope in ropes):
        raise ModelError("its config.json has rope_theta null, which must be a positive number")
    if part.get(KEY) is None and config.get(KEY) is None:
        _check_older_scaling(model, part, config)
        return
    if part.get(KEY) is None:
        part = config
    layers = [module for _, module in model.named_modules() if _is_rotary(module)]
    if not layers:
        return

    # A model may have layers with and without scaling: OLMo 3 scales only full attention.
    kinds = _by_layer_type(part[KEY])
    unscaled: list[RopeParameters] = [
        {"rope_type": "default", "rope_theta": kind.get("rope_theta")} for kind in kinds.values()
    ]

    found: set[str] = set()
    for layer in layers:
        matches = [name for name, kind in kinds.items() if _is_made_by(layer, kind, part)]
        if not matches and not any(_is_made_by(layer, kind, part) for kind in unscaled):
            raise _ignored(config, kinds)
        found.update(matches)

    unused = {name: kind for name, kind in kinds.items() if name not in found}
    if unused:
        raise _ignored(config, unused)


def _check_older_scaling(model: nn.Module, part: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse a ``rope_scaling`` that no rotary layer of the model applies."""
    scaling = part.get("rope_scaling")
    if not isinstance(scaling, dict) or scaling.get("factor") == 1:
        return
    if _kind(scaling) in ("default", "mrope"):
        return

    # A scaling is for full attention, so it has no effect if all layers have windows.
    windowed: list[Any] = [m for m in model.modules() if hasattr(m, "is_sliding")]
    if windowed and all(module.is_sliding for module in windowed):
        return

    # Some families have their own rotary layers. These are assumed to apply it.
    layers = [module for module in model.modules() if _is_named_rotary(module)]
    if layers and all(type(layer) is nn.RoPE and layer.scale == 1 for layer in layers):
        raise ModelError(
            f"mlx-lm's {config['model_type']} ignores the rope_scaling of this model"
            f" ({scaling!s:.160}), so its positions would be wrong; use a newer mlx-lm, or another"
            " model"
        )


def _ignored(config: dict[str, Any], kinds: dict[str, RopeParameters]) -> ModelError:
    """Return the error for parameters that mlx-lm does not apply."""
    asked = "; ".join(f"{name}: {kind}" if name else str(kind) for name, kind in kinds.items())
    return ModelError(
        f"mlx-lm's {config['model_type']} can't apply the {KEY} of this model"
        f" ({' '.join(asked.split()):.160}), so its positions would be wrong; use a newer mlx-lm,"
        " or another model"
    )


def _by_layer_type(parameters: Any) -> dict[str, RopeParameters]:
    """Return kind of layer → parameters; the kind is "" if all layers share the parameters."""
    if not isinstance(parameters, dict) or not parameters:
        raise ModelError(
            f"its config.json has {KEY} {parameters!r:.80}; allowed is what transformers 5 writes"
        )

    # OLMo 3 has a dictionary for each kind, and repeats the fields of one kind at the top level.
    nested = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    return nested or {"": parameters}


def _older_fields(kinds: dict[str, RopeParameters]) -> dict[str, Any]:
    """Return the older fields that are equivalent to the parameters of each kind of layer."""
    # The older fields describe the layers with full attention.
    main = kinds.get("full_attention") or next(iter(kinds.values()))
    older = {name: main[entry] for name, entry in _OLDER_FIELDS.items() if entry in main}
    older["rope_scaling"] = _scaling(main)

    # Layers with a sliding window have a separate base.
    local = kinds.get("sliding_attention")
    if local is not None and local is not main:
        older[_LOCAL_BASE] = local.get("rope_theta")
    return older


def _kind(parameters: RopeParameters) -> str:
    """Return the kind of scaling; "default" means no scaling."""
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _scaling(parameters: RopeParameters) -> RopeParameters | None:
    """Return the older ``rope_scaling``, with both ``type`` and ``rope_type``.

    Some families read only ``type``, and others only ``rope_type``.
    """
    kind = _kind(parameters)
    if kind == "default":
        return None
    return {**parameters, "rope_type": kind, "type": parameters.get("type", kind)}


def _agrees(name: str, older: Any, newer: Any) -> bool:
    """Return whether an older field agrees with the newer entry.

    Two scalings agree if every entry that is in both has the same value.
    """
    if name != "rope_scaling":
        return older == newer
    if not isinstance(older, dict):
        return False

    # The kind may have two names.
    newer = newer or {"rope_type": "default"}
    kinds = {_kind(older), _kind(newer)}
    if len(kinds) == 2 and kinds not in _SAME_KINDS:
        return False

    # Ignore entries that are in only one of the two.
    shared = set(older) & set(newer) - {"type", "rope_type"}
    return all(older[key] == newer[key] for key in shared)


def _is_rotary(module: nn.Module) -> bool:
    """Return whether a layer is a rotary layer of MLX or mlx-lm."""
    return isinstance(module, nn.RoPE) or type(module).__module__ == YarnRoPE.__module__


def _is_named_rotary(module: nn.Module) -> bool:
    """Return whether a layer's class is named as a rotary layer."""
    name = type(module).__name__.lower()
    return "rope" in name or "rotary" in name


def _is_made_by(layer: Any, parameters: RopeParameters, config: dict[str, Any]) -> bool:
    """Return whether a rotary layer equals the one that mlx-lm makes from these parameters."""
    # Translate the scaling to mlx-lm's terms.
    kind = _kind(parameters)
    if kind == "su":
        kind = "longrope"
    longest = config.get("max_position_embeddings", 2048)
    original = config.get("original_max_position_embeddings") or longest
    scaling = {"original_max_position_embeddings": original, **parameters}
    scaling |= {"rope_type": kind, "type": kind}

    dims = layer.dims if hasattr(layer, "dims") else layer.dim
    base = parameters.get("rope_theta") or config.get("rope_theta") or _DEFAULT_BASE
    try:
        expected = initialize_rope(dims, base, False, scaling, longest)
    except Exception:  # a kind that mlx-lm does not know, or a missing number  # noqa: BLE001
        return False

    # The layers are equal if they have the same class and the same numbers.
    if type(layer) is not type(expected):
        return False
    pairs = zip(_numbers(layer), _numbers(expected), strict=True)
    return all(
        mx.allclose(mx.array(found), mx.array(wanted), rtol=1e-4).item() for found, wanted in pairs
    )


def _numbers(rope: Any) -> Iterator[Any]:
    """Yield the numbers that determine a rotary layer's angles and scale."""
    if isinstance(rope, nn.RoPE):
        yield from (rope.base, rope.scale)
        return
    if isinstance(rope, DynamicNTKScalingRoPE):
        yield from (rope.base, rope.factor, rope.max_position_embeddings)
        return

    # mlx-lm has no public names for these.
    frequencies = rope._freqs  # noqa: SLF001
    yield mx.where(mx.isinf(frequencies), 0, frequencies)
    if isinstance(rope, SuScaledRoPE):
        yield rope._scale  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    else:
        yield getattr(rope, "mscale", 1.0)
