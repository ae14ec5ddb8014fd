"""Check the names of the kinds of layers in a config.

In most families of mlx-lm, a layer whose kind is not known silently becomes one of the known kinds,
or the list is not read at all.
"""

import inspect
import json
import sys
from collections.abc import Iterable
from typing import Any

from mlx_lm.utils import _get_classes  # pyright: ignore[reportPrivateUsage]

from ..errors import ModelError
from .config_numbers import LAYERS
from .rope_parameters import text_part

_USUAL = {
    "layer_types": ("full_attention", "sliding_attention"),
    "layers_block_type": ("full_attention",),
    "mlp_layer_types": ("dense", "sparse"),
}
"""List → the kinds that are known in every family; other checks compare the windows."""

_RECURRENT = ("linear_attention",)
_INDEXED = ("indexed_attention", "deepseek_sparse_attention")

_OWN = {
    "bailing": _RECURRENT,
    "deepseek_v": (*_INDEXED, "compressed_sparse_attention", "heavily_compressed_attention"),
    "falcon_h1": ("hybrid",),
    "falcon_mamba": _RECURRENT,
    "glm_moe_dsa": _INDEXED,
    "granite": ("attention",),  # Granite 4 without Mamba layers is computed as Granite
    "granitemoehybrid": _RECURRENT,
    "jamba": _RECURRENT,
    "kimi_k3": _RECURRENT,
    "kimi_linear": _RECURRENT,
    "lfm2": ("conv",),
    "llama4": ("chunked_attention",),
    "mamba": _RECURRENT,
    "minimax_m3_vl": (*_INDEXED, "minimax_m3_sparse"),
    "prism_hadamard_qwen35": _RECURRENT,
    "qwen3_5": _RECURRENT,
    "qwen3_next": _RECURRENT,
    "recurrent_gemma": (*_RECURRENT, "recurrent"),
}
"""Start of a family's name → other kinds that it has, but that its code in mlx-lm does not name."""


def check_kind_names(config: dict[str, Any]) -> None:
    """Check that mlx-lm knows the kinds of layers that a config lists.

    Raises:
        ModelError: It does not.
    """
    part = text_part(config)
    families = [str(each.get("model_type")) for each in (config, part)]
    # Some published lists have more entries than there are layers.
    layers = next((part[name] for name in LAYERS if isinstance(part.get(name), int)), None)
    for setting, usual in _USUAL.items():
        listed = part.get(setting)
        if not isinstance(listed, list):
            continue

        known = {*usual, *_own_kinds(families)}
        strange = [
            number
            for number, kind in enumerate(listed[:layers])
            if not (isinstance(kind, str) and (kind in known or _is_named(kind, config)))
        ]
        if strange:
            first = strange[0]
            raise ModelError(
                f"its config.json has {json.dumps(listed[first]):.60} in layer {first}"
                f" ({setting}), a type that mlx-lm's {families[-1]} does not know, so its outputs"
                " would be wrong: correct config.json, or use a newer mlx-lm or another model"
            )


def _own_kinds(families: Iterable[str]) -> set[str]:
    """Return the kinds of ``_OWN`` for a model's families."""
    kinds: set[str] = set()
    for start, own in _OWN.items():
        if any(family.startswith(start) for family in families):
            kinds.update(own)
    return kinds


def _is_named(kind: str, config: dict[str, Any]) -> bool:
    """Return whether the code of a config's family in mlx-lm names a kind."""
    try:
        source = inspect.getsource(sys.modules[_get_classes(config)[0].__module__])
    # mlx-lm has no such family, exits because it lacks a library, or its code can't be read.
    except (ValueError, OSError, SystemExit):
        return True
    return f'"{kind}"' in source
