"""Check the kinds of a model's layers: full attention, a sliding window, or a recurrent state.

mlx-lm takes the kinds from lists, such as ``layer_types``, or from patterns, such as "every 6th
layer has full attention".
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..device import kept_random_state
from ..errors import ModelError, counted
from ..failures import failure_of
from .config_numbers import LAYERS
from .config_problems import LAYER_LISTS, explain_problem, field_types
from .derived_weights import forget_derived
from .ignored_window import cache_windows
from .rope_parameters import text_part
from .weight_files import one_line

_PERIODS = ("sliding_window_pattern", "full_attention_interval", "layer_group_size", "mamba_step",
            "attn_layer_period", "expert_layer_period", "interleave_moe_layer_step",
            "no_rope_layer_interval", "decoder_sparse_step")  # fmt: skip
"""Whole numbers n that mean every nth layer."""

_WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size")
"""Names of the field with the size of the window, in tokens; they vary by family."""

_WINDOWED = ("sliding_attention", "chunked_attention")
"""The kinds in ``layer_types`` that have a window."""

_NOT_TRACED = ("dbrx",)
"""Families whose code evaluates arrays while the graph is built."""


def check_layer_settings(config: dict[str, Any]) -> None:
    """Check the settings of a language model that describe its layers, as far as mlx-lm reads them.

    Raises:
        ModelError: A list has fewer entries than there are layers, or a period is not a positive
            whole number.
    """
    part, read = text_part(config), field_types(config)
    # Some families leave out the layers that a list does not name.
    layers = next((part[name] for name in LAYERS if isinstance(part.get(name), int)), 0)
    for name in read.keys() & set(LAYER_LISTS):
        entries: Any = part.get(name)
        if isinstance(entries, list) and 0 < len(entries) < layers:
            found = "1 entry" if len(entries) == 1 else f"{len(entries):,} entries"
            raise ModelError(
                f"its config.json has {counted(layers, 'layer')}, but {name} has {found}; allowed"
                " is one for each layer: correct config.json, or get the folder again"
            )

    for name in read.keys() & set(_PERIODS):
        period: Any = part.get(name)
        # EXAONE 4 may have a string, such as "LLLG", or 0 if it has no window.
        is_exaone = part.get("model_type") == "exaone4" and (isinstance(period, str) or period == 0)
        if period is None or is_exaone:
            continue
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            raise ModelError(
                f"its config.json has {name} {period!r:.80}; allowed is a whole number of at least"
                " 1: correct config.json, or get the folder again"
            )


def check_windows(model: nn.Module, config: dict[str, Any]) -> None:
    """Check the windows of a model's layers, and which layers have one in ``layer_types``.

    A family that ignores all windows is not refused here; see ``ignored_window``.

    Raises:
        ModelError: A window is not a positive whole number, or mlx-lm gives windows to other
            layers than the config does.
    """
    part = text_part(config)
    kinds: Any = part.get("layer_types")
    caches: list[Any] = make_prompt_cache(model)
    for size in (size for cache in caches for size in cache_windows(cache)):
        if not isinstance(size, int) or size < 1:
            name = next((name for name in _WINDOWS if part.get(name) == size), _WINDOWS[0])
            raise ModelError(
                f"its config.json has {name} {size!r:.80}; allowed is a whole number of at least 1:"
                " correct config.json, or get the folder again"
            )

    # Compare the layers that have a window.
    layers: Any = model.layers
    if not isinstance(kinds, list) or not len(caches) == len(layers) <= len(kinds):
        return

    windowed = [bool(cache_windows(cache)) for cache in caches]
    if not any(windowed):
        return
    for number, (kind, has_window) in enumerate(zip(kinds, windowed, strict=False)):
        is_unlimited = kind in _WINDOWED and not has_window
        if is_unlimited or (kind == "full_attention" and has_window):
            raise ModelError(
                f"its config.json has {kind} in layer {number} (layer_types), but mlx-lm's"
                f" {config['model_type']} has {'no' if is_unlimited else 'a'} window there, so its"
                " outputs would be wrong; use a newer mlx-lm, or another model"
            )


def check_runs(model: nn.Module, config: dict[str, Any]) -> None:
    """Check that mlx-lm can run a model, with and without caches. Nothing is computed.

    Raises:
        ModelError: mlx-lm can't run it.
    """
    if config["model_type"] in _NOT_TRACED:
        return

    try:
        with kept_random_state():
            _trace(model)
    # mlx-lm's models may raise any kind of error for an unexpected config.
    except Exception as problem:
        if failure_of(problem) is not None:
            raise
        kind = config["model_type"]
        raise ModelError(
            explain_problem(config, problem)
            or f"mlx-lm's {kind} can't run the model of this config.json ({one_line(problem)}): get"
            " the folder again, or use a newer mlx-lm or another model"
        ) from problem
    finally:
        forget_derived(model)


def _trace(model: nn.Module) -> None:
    """Build the graphs of forward passes over a few tokens, without evaluating them."""
    tokens = mx.zeros((1, 3), mx.int32)
    try:
        model(tokens)
        model(tokens, cache=make_prompt_cache(model))
    except RuntimeError as problem:
        # A few models have kernels for Metal only, but their memory can be planned elsewhere.
        if "[metal_kernel]" not in str(problem):
            raise
