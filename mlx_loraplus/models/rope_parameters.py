"""RoPE as transformers 5 writes it, ``rope_parameters``, in the older fields that most of mlx-lm's families read.

transformers 5 replaced ``rope_theta``, ``rope_scaling``, ``rope_local_base_freq`` and
``partial_rotary_factor`` by one dictionary, or one for each kind of layer. A family that does not
know it falls back to its default base, without a word. So the older fields are added, and
``check_rope`` then compares the layers that mlx-lm made with what the config asks for, whichever
fields the family reads.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE, SuScaledRoPE, YarnRoPE, initialize_rope

from ..errors import ModelError

KEY = "rope_parameters"
TEXT_PARTS = ("text_config", "language_config", "llm_config")
"""Where a multimodal config keeps its language model's."""

_OLDER = {"rope_theta": "rope_theta", "rotary_emb_base": "rope_theta", "partial_rotary_factor": "partial_rotary_factor",
          "rotary_pct": "partial_rotary_factor", "rope_pct": "partial_rotary_factor",
          "original_max_position_embeddings": "original_max_position_embeddings"}  # fmt: skip
"""A config's older fields: the entry of ``rope_parameters`` that replaced each; GPT-NeoX has its own."""
_LOCAL = "rope_local_base_freq"


def with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config in which every ``rope_parameters`` is also there in the older fields, without changing it.

    Raises: ModelError where an older field says something else, or ``rope_parameters`` is not what
    transformers writes.
    """
    parts = {
        name: with_older_rope(config[name])
        for name in TEXT_PARTS
        if isinstance(config.get(name), dict)
    }
    if config.get(KEY) is None:
        return config | parts
    kinds = _by_layer_type(config[KEY])

    # The older fields describe layers of full attention; those of a sliding window have a base of
    # their own
    main = kinds.get("full_attention") or next(iter(kinds.values()))
    older = {name: main[entry] for name, entry in _OLDER.items() if entry in main}
    older["rope_scaling"] = _scaling(main)
    if "sliding_attention" in kinds and main is not kinds["sliding_attention"]:
        older[_LOCAL] = kinds["sliding_attention"].get("rope_theta")

    for name, value in older.items():
        if config.get(name) is not None and not _same(name, config[name], value):
            raise ModelError(
                f"its config.json has {name} {config[name]!r:.80}, but {KEY} says {value!r:.80}:"
                " remove the wrong one"
            )
    return (
        config | parts | {name: value for name, value in older.items() if config.get(name) is None}
    )


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a config, which is all of it unless it is multimodal."""
    parts = (config[name] for name in TEXT_PARTS if isinstance(config.get(name), dict))
    return next(parts, config)


def without_unread_rope(
    config: dict[str, Any], original: dict[str, Any], model: nn.Module
) -> dict[str, Any]:
    """Return a config as ``with_older_rope`` made it, without what it added and ``model`` does not read."""
    known: set[str] = set()
    for module in (model, getattr(model, "language_model", None), getattr(model, "model", None)):
        for args in (getattr(module, "args", None), getattr(module, "config", None)):
            known |= set(getattr(args, "__dataclass_fields__", ()))
    kept = {}
    for name, value in config.items():
        if name in TEXT_PARTS and isinstance(value, dict):
            kept[name] = without_unread_rope(value, original.get(name, {}), model)
        elif name in original or (name in known and value is not None):
            kept[name] = value
    return kept


def check_rope(model: nn.Module, config: dict[str, Any]) -> None:
    """Raise ModelError unless the rotary layers of ``model`` turn as its config's ``rope_parameters`` say."""
    part = next((config[name] for name in TEXT_PARTS if isinstance(config.get(name), dict)), config)
    part = part if part.get(KEY) is not None else config
    made = [module for _, module in model.named_modules() if _turns(module)]
    if part.get(KEY) is None or not made:
        return
    kinds = _by_layer_type(part[KEY])

    # Layers without scaling may stand beside scaled ones: OLMo 3 scales those of full attention
    # only
    plain = [
        {"rope_type": "default", "rope_theta": kind.get("rope_theta")} for kind in kinds.values()
    ]
    found = set()
    for module in made:
        fitting = [name for name, kind in kinds.items() if _is_made_by(module, kind, part)]
        found.update(fitting)
        if not fitting and not any(_is_made_by(module, kind, part) for kind in plain):
            raise _ignored(config, kinds)
    if len(found) < len(kinds):
        raise _ignored(config, {name: kind for name, kind in kinds.items() if name not in found})


def _ignored(config: dict[str, Any], kinds: dict[str, dict[str, Any]]) -> ModelError:
    asked = "; ".join(f"{name}: {kind}" if name else str(kind) for name, kind in kinds.items())
    return ModelError(
        f"mlx-lm's {config['model_type']} can't do the {KEY} of this model"
        f" ({' '.join(asked.split()):.160}), and would load it with other positions; use a newer"
        " mlx-lm, or another model"
    )


def _by_layer_type(parameters: Any) -> dict[str, dict[str, Any]]:
    """Return the parameters of each kind of layer; of one for all under ''."""
    if isinstance(parameters, dict) and parameters:
        nested = {name: value for name, value in parameters.items() if isinstance(value, dict)}
        if nested:  # OLMo 3 has a copy of one beside them
            return nested
        return {"": parameters}
    raise ModelError(
        f"its config.json has {KEY} {parameters!r:.80}; allowed is what transformers 5 writes"
    )


def _kind(parameters: dict[str, Any]) -> str:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _scaling(parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Return the older ``rope_scaling``; some families look for ``type``, others for ``rope_type``."""
    kind = _kind(parameters)
    return (
        None
        if kind == "default"
        else {**parameters, "rope_type": kind, "type": parameters.get("type", kind)}
    )


def _same(name: str, older: Any, newer: Any) -> bool:
    """Tell whether an older field agrees with the newer entry; of a scaling, in all that both say."""
    if name != "rope_scaling":
        return older == newer
    if not isinstance(older, dict):
        return False
    newer = newer or {"rope_type": "default"}
    if _kind(older) != _kind(newer) and {_kind(older), _kind(newer)} not in (
        {"default", "mrope"},
        {"su", "longrope"},
    ):
        return False
    shared = set(older) & set(newer) - {"type", "rope_type"}
    return all(older[key] == newer[key] for key in shared)


def _turns(module: nn.Module) -> bool:
    return isinstance(module, nn.RoPE) or (type(module).__module__ == YarnRoPE.__module__)


def _is_made_by(module: Any, parameters: dict[str, Any], config: dict[str, Any]) -> bool:
    """Tell whether a rotary layer is the one that mlx-lm makes of these parameters."""
    dims = module.dims if hasattr(module, "dims") else module.dim
    kind = {"su": "longrope"}.get(_kind(parameters), _kind(parameters))
    longest = config.get("max_position_embeddings", 2048)
    scaling = {
        "original_max_position_embeddings": (
            config.get("original_max_position_embeddings") or longest
        )
    }
    scaling |= parameters | {"rope_type": kind, "type": kind}
    try:
        expected = initialize_rope(dims, parameters.get("rope_theta"), False, scaling, longest)
    except Exception:  # a kind it does not know, or one without its numbers  # noqa: BLE001
        return False
    return type(module) is type(expected) and all(
        mx.allclose(mx.array(ours), mx.array(theirs), rtol=1e-4).item()
        for ours, theirs in zip(_numbers(module), _numbers(expected), strict=True)
    )


def _numbers(rope: Any) -> Iterator[Any]:
    """Yield what decides how far a rotary layer turns at a position, and by what it multiplies."""
    if isinstance(rope, nn.RoPE):
        yield from (rope.base, rope.scale)
    elif isinstance(rope, DynamicNTKScalingRoPE):
        yield from (rope.base, rope.factor, rope.max_position_embeddings)
    else:
        frequencies = rope._freqs  # noqa: SLF001  it has no public name
        yield mx.where(mx.isinf(frequencies), 0, frequencies)
        yield (rope._scale if isinstance(rope, SuScaledRoPE) else getattr(rope, "mscale", 1.0))  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
