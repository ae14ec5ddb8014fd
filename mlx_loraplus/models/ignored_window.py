"""Find a sliding window that is in a model's config but that mlx-lm ignores."""

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .rope_parameters import text_part

_OFF_BY_DEFAULT = ("qwen", "smollm3")
"""Families that use the window only with use_sliding_window, by the start of model_type."""

_ONLY_BY_LAYER = ("llama",)
"""Families that use the window only in the layers that layer_types names."""

_LATE_LAYERS = ("qwen2", "qwen3")
"""Families that use the window only in the layers from max_window_layers on."""


def ignored_window(model: nn.Module, config: dict[str, Any]) -> int | None:
    """Return the sliding window that a config requires but the model does not apply, or None.

    Some model families in mlx-lm use full attention in every layer. If a sequence is longer than
    the window, the outputs then differ from those that the model was trained for.

    Args:
        model: The model as mlx-lm made it, or its skeleton.
        config: The model's config.json.

    Returns:
        The window in tokens; None if the config has no window, or the model's caches apply it.
    """
    # In a multimodal config, the window is in the language model's part.
    text = text_part(config)
    model_type = text.get("model_type", config.get("model_type"))
    window = _window_of(text, str(model_type))
    applied = [size for cache in make_prompt_cache(model) for size in cache_windows(cache)]
    if window is None or window in applied:
        return None
    return window


def _window_of(config: dict[str, Any], model_type: str) -> int | None:
    """Return the window that a config requires in at least one layer, or None."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        return None

    # A window may be stored but switched off.
    is_on = not model_type.startswith(_OFF_BY_DEFAULT)
    if not config.get("use_sliding_window", is_on):
        return None

    # transformers 5 lists the kind of each layer.
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return window if "sliding_attention" in kinds else None

    # In older configs, the layers with a window depend on the family.
    if model_type in _ONLY_BY_LAYER:
        return None
    if model_type in _LATE_LAYERS:
        first = config.get("max_window_layers", 28)  # the default in transformers
        return window if first < config["num_hidden_layers"] else None
    return window


def cache_windows(cache: Any) -> list[Any]:
    """Return the counts of tokens that a layer's cache is limited to; empty if it has no limit.

    A cache may contain other caches.
    """
    windows = [size for inner in getattr(cache, "caches", ()) for size in cache_windows(inner)]
    sizes = (getattr(cache, name, None) for name in ("max_size", "chunk_size", "window_size"))
    return windows + [size for size in sizes if size is not None]
