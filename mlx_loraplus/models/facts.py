"""What is known of the named models before anything is downloaded: their configs, and skeletons without weights.

Dimensions were checked against the makers' code. Gemma 3: ``_VARIANTS`` in transformers'
``models/gemma3/convert_gemma3_weights.py`` (64 embeddings more with a vision tower). Llama 3: ``models/sku_list.py`` of
meta-llama/llama-models (an MLP's width is 8/3 hidden · ``ffn_dim_multiplier``, rounded up to ``multiple_of``; 3.3 70B
has 3.1's). Scout: transformers' ``models/llama4/configuration_llama4.py``. Contexts, and that 1B and 3B tie their
heads: public copies of their config.json. Gemma 3 270M and SmolLM2 135M: their GGUF files, by a test. Groups of 64 at
4 bits are what mlx-lm's converter makes where it is told nothing else.
"""

import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes

from ..errors import ModelError
from ..places import read_bounded
from .names import MODELS, find_config

VISION_BYTES = 840_000_000
"""Of the vision tower that the repositories of Gemma 3 4B and larger hold besides; mlx-lm leaves it out."""


def _gemma(
    hidden: int, layers: int, mlp: int, heads: int, keys: int, head_dim: int = 256, window: int = 1024
) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": head_dim, "sliding_window": window,
        "sliding_window_pattern": 6, "tie_word_embeddings": True,
        "vocab_size": 262_144 if window == 512 else 262_208,
        "max_position_embeddings": 32_768 if window == 512 else 131_072,
    }  # fmt: skip


def _llama(
    hidden: int, layers: int, mlp: int, heads: int, keys: int, vocabulary: int = 128_256, *, tied: bool = False
) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied, "max_position_embeddings": 131_072,
    }  # fmt: skip


_SCOUT = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48, "intermediate_size": 8192,
        "intermediate_size_mlp": 16_384, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "vocab_size": 202_048,
        "attention_bias": False, "attention_chunk_size": 8192, "max_position_embeddings": 10_485_760,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 500_000.0, "use_qk_norm": True,
    },
}  # fmt: skip

_FACTS = {
    "gemma-3-270m": _gemma(640, 18, 2048, 4, 1, window=512),
    "gemma-3-1b": _gemma(1152, 26, 6912, 4, 1, window=512),
    "gemma-3-4b": _gemma(2560, 34, 10_240, 8, 4),
    "gemma-3-12b": _gemma(3840, 48, 15_360, 16, 8),
    "gemma-3-27b": _gemma(5376, 62, 21_504, 32, 16, 128),
    "llama-3.2-1b": _llama(2048, 16, 8192, 32, 8, tied=True),
    "llama-3.2-3b": _llama(3072, 28, 8192, 24, 8, tied=True),
    "llama-3.1-8b": _llama(4096, 32, 14_336, 32, 8),
    "llama-3.3-70b": _llama(8192, 80, 28_672, 64, 8),
    "llama-4-scout": _SCOUT,
    "smollm2-135m": _llama(576, 30, 1536, 9, 3, 49_152, tied=True) | {"max_position_embeddings": 8192},
}


def config_of(name: str) -> dict[str, Any]:
    """Return the config of a model: of a short name from the facts here, of all others from their config.json.

    Raises:
        ModelError: There is no such model, or its config can't be had.
    """
    if name in MODELS:
        fact = _FACTS[name.removesuffix("-it")]
        four_bits = MODELS[name].endswith("4bit")
        return fact | ({"quantization": {"group_size": 64, "bits": 4}} if four_bits else {})
    path = find_config(name)
    try:
        return json.loads(read_bounded(path))
    except (ValueError, OSError, RecursionError) as problem:
        raise ModelError(f"{path} is not JSON: {problem!s:.200}") from None


def make_skeleton(config: dict[str, Any]) -> nn.Module:
    """Return the model of a config as mlx-lm makes it, quantized as the config says; no array of it is ever computed.

    Raises:
        ModelError: mlx-lm does not know the model, or can't make it from this config.
    """
    high, low = mx.random.state[0].tolist()  # pyright: ignore[reportIndexIssue]
    try:
        model_class, args_class = _get_classes(config)
        text = config.get("text_config", config)
        model: Any = model_class(args_class.from_dict(config))
        inner = getattr(model, "language_model", model)
        if text.get("tie_word_embeddings", text["model_type"].startswith("gemma")) and "lm_head" in inner:
            inner.pop("lm_head")
            inner.tie_word_embeddings = True
        if settings := config.get("quantization"):
            _quantize(model, settings)
    except Exception as problem:  # mlx-lm's model classes answer a strange config with errors of every kind
        raise ModelError(
            f"mlx-lm can't make a model of this config: {type(problem).__name__}: {problem!s:.200}"
        ) from None
    finally:
        mx.random.seed(high << 32 | low)  # a caller's own numbers stay what they would have been
    return model


def _quantize(model: nn.Module, settings: dict[str, Any]) -> None:
    """Quantize what mlx-lm's converter would, some layers in their own way where the config says so."""
    group = settings["group_size"]

    def how(path: str, module: Any) -> Any:
        if path in settings:
            return settings[path]
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group == 0

    nn.quantize(model, group, settings["bits"], mode=settings.get("mode", "affine"), class_predicate=how)
