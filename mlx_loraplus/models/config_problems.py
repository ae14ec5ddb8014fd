"""Find what is wrong with a config.json that mlx-lm fails on; mlx-lm's errors do not say it."""

import json
import re
import sys
from itertools import chain
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mlx_lm.utils import _get_classes  # pyright: ignore[reportPrivateUsage]

from ..errors import counted
from .config_numbers import LARGEST, LAYERS
from .rope_parameters import text_part
from .weight_files import one_line

LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "hybrid_layer_pattern",
               "no_rope_layers", "is_moe_layer", "num_attention_heads_per_layer",
               "layer_rope_theta", "activation_sparsity_pattern")  # fmt: skip
"""Lists with an entry for each layer. Some published ones have more entries than layers."""

_PATTERNS = (
    "sliding_window_pattern", "full_attention_interval", "layer_group_size", "attn_layer_period",
    "attn_layer_offset", "mamba_step", "hybrid_override_pattern", "num_kv_shared_layers",
)  # fmt: skip
"""Other settings that decide the kinds of the layers."""

_JSON_TYPES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}
"""Python's types of JSON values, and the words for them in messages."""

_DIVISORS = ("size", "step", "period", "freq", "interval", "heads", "groups", "dim", "theta")
"""Endings of the names of fields that models divide by."""

_SIZES = (*_DIVISORS, "rank", "experts", "factor", "scalar")
"""Endings of the names of fields that are seldom 0."""

_NO_SUCH_LAYER = (
    "list index out of range", "not in list", "attention_mask() missing", "'full_attention'",
    "'sliding_attention'", "StopIteration",
)  # fmt: skip
"""Phrases in Python's errors if a model finds no layer of some kind, or takes a wrong one."""


def explain_problem(config: dict[str, Any], problem: BaseException) -> str | None:
    """Return why mlx-lm can't make or run the model of a config; None if the reason is unknown."""
    if isinstance(problem, ValueError) and str(problem).endswith("not supported."):
        kind = config["model_type"]
        return f"mlx-lm has no models of type {kind!r:.60}: use a newer mlx-lm, or another model"
    explained = _missing_fields(config, problem) or _missing_kinds(config, problem)
    return explained or _wrong_type(config, problem) or _odd_number(config, problem)


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
        " the folder again, or add the values that the model was made with"
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
        f" {config['model_type']} may need layers of every type: use a newer mlx-lm, or another"
        " model"
    )


def _wrong_type(config: dict[str, Any], problem: BaseException) -> str | None:
    """Return a message if an error may come from a value that is not of its field's type."""
    if not isinstance(problem, TypeError | AttributeError | ValueError | ZeroDivisionError):
        return None
    divides_by_zero = isinstance(problem, ZeroDivisionError)
    part = text_part(config)
    for name, hint in field_types(config).items():
        # Of Optional[List[int]], for example, the allowed types are list and None.
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        allowed = [get_origin(kind) or kind for kind in kinds]
        if name not in part or not set(allowed) <= _JSON_TYPES.keys():
            continue

        value: Any = part[name]
        is_zero = divides_by_zero and value == 0 and name.endswith(_DIVISORS)
        if is_zero or not any(_is_a(value, kind) for kind in allowed):
            words = " or ".join(_JSON_TYPES[kind] for kind in allowed)
            zero = ", not 0" if is_zero else ""
            return (
                f"its config.json has {name} {json.dumps(value):.80}, where mlx-lm's"
                f" {config['model_type']} expects {words}{zero}: correct config.json, or get the"
                " folder again"
            )
    return None


def _odd_number(config: dict[str, Any], problem: BaseException) -> str | None:
    """Return a message with the field that is probably the reason, because its number is odd."""
    part = text_part(config)
    numbers = {
        name: part[name]
        for name in field_types(config)
        if isinstance(part.get(name), int | float) and not isinstance(part[name], bool)
    }
    beyond = (name for name, value in numbers.items() if value < 0 or value > LARGEST)
    zeros = (name for name, value in numbers.items() if not value and name.endswith(_SIZES))
    name = next(chain(beyond, zeros), None)
    if name is None:
        return None
    return (
        f"mlx-lm's {config['model_type']} fails ({one_line(problem)}), probably because its"
        f" config.json has {name} {json.dumps(numbers[name]):.40}: correct config.json, or get the"
        " folder again"
    )


def field_types(config: dict[str, Any]) -> dict[str, Any]:
    """Return the type of each field that mlx-lm reads of a config, or of its language model's part.

    It is empty if mlx-lm does not know the family.
    """
    try:
        arguments: Any = _get_classes(config)[1]
    except Exception:  # mlx-lm has no such family  # noqa: BLE001
        return {}
    module = sys.modules[arguments.__module__]
    if text_part(config) is not config:
        names = ("TextArgs", "TextModelArgs", "TextConfig")
        arguments = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if arguments is None:
        return {}

    # A field whose default is None may be null, although mlx-lm's types do not always say so.
    hints = get_type_hints(arguments)
    return {
        name: hint | None if getattr(arguments, name, hint) is None else hint
        for name, hint in hints.items()
    }


def _is_a(value: Any, kind: Any) -> bool:
    """Return whether a JSON value is of a plain type; 1 is a ``float`` too, and 1.0 an ``int``."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if isinstance(value, float) and value.is_integer():
        return kind in (int, float)
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _described(name: str, value: Any) -> str:
    """Return a setting with its value; for a list, with each different entry once."""
    if not isinstance(value, list):
        return f"{name} {json.dumps(value):.40}"
    kinds = dict.fromkeys(str(kind) for kind in value)
    return f"{name} of {' and '.join(kinds):.80}"
