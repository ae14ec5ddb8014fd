"""Tiny random models of every architecture that can become GGUF, with a byte-level tokenizer."""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.models.gguf.pre_tokenizers import BYTE_LEVEL

TEXT = (
    "The  quick (brown) fox's 1234 über   \n\n\t ß 🎉 I'LL say: \"Hi!\" they've 12,345.67 naïve"
    " def f(x):\n    return x  # HTTPServer/path 中文字符 русский\r\n  …"
)
SIZE = 320  # tokens

_BASE = {
    "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": SIZE, "rope_theta": 10_000.0,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
_PLAIN = {"attention_bias": False, "mlp_bias": False}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
_GRANITE = {
    "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 32, "norm_topk_prob": True,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_YARN = {
    "type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
_LONGROPE = {
    "type": "longrope", "rope_type": "longrope", "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0],
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _PLAIN | {"model_type": "llama"},
    "llama, llama3 RoPE": _PLAIN | {"model_type": "llama", "rope_scaling": _LLAMA3},
    "llama, YaRN": _PLAIN | {"model_type": "llama", "rope_scaling": _YARN},
    "mistral": {"model_type": "llama", "head_dim": 32},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": _GEMMA | {"model_type": "gemma2"},
    "gemma3": _GEMMA
    | {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 8}
    | {"sliding_window_pattern": 6, "rope_theta": 1_000_000.0},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3, YaRN": {"model_type": "qwen3", "head_dim": 32, "rope_scaling": _YARN},
    "qwen3_moe": _EXPERTS | {"model_type": "qwen3_moe", "head_dim": 32},
    "phi3": {"model_type": "phi3"},
    "phi3, LongRoPE": {"model_type": "phi3", "rope_scaling": _LONGROPE}
    | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64},
    "smollm3": {"model_type": "smollm3", "tie_word_embeddings": True},
    "olmo2": _PLAIN | {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "sliding_window": 8, "num_hidden_layers": 5},
    "olmo3, YaRN": {"model_type": "olmo3", "sliding_window": 8, "rope_scaling": _YARN},
    "granite": _PLAIN | _GRANITE | {"model_type": "granite", "tie_word_embeddings": True},
}
"""Name → the fields of its config that differ from the others'."""


def make_family(name: str, seed: int = 0) -> Any:
    """Return a random model of a family.

    Its weights are larger than at the start of a training, so that its predictions differ, and its
    norms and biases are random, too.
    """
    mx.random.seed(seed)
    config = _BASE | FAMILIES[name]
    model_class, args_class = _get_classes(config)
    model: nn.Module = model_class(args_class.from_dict(config))
    if config["model_type"] == "gemma3_text":
        model.tie_word_embeddings = True
        model.pop("lm_head")

    arrays: Any = tree_flatten(model.parameters())
    changed: list[tuple[str, mx.array]] = []
    for path, array in arrays:
        noise = mx.random.normal(array.shape)
        if path.endswith("embed_tokens.weight"):
            new = 0.3 * noise
        elif array.ndim == 1:
            new = array + 0.2 * noise
        else:
            new = noise / array.shape[-1] ** 0.5
        changed.append((path, new))
    model.update(tree_unflatten(changed))
    model.eval()
    mx.eval(model.parameters())
    return model


def adapt_family(model: Any) -> Any:
    """Add a LoRA to every linear layer of a model, with random factors, and return the model."""
    attach_adapters(model, AdapterConfig(rank=4, alpha=8.0, target_modules=("all-linear",)))
    for adapter in find_adapters(model).values():
        layer: Any = adapter
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    model.eval()
    mx.eval(model.parameters())
    return model


def byte_level_tokenizer(pre: str = "gpt-2") -> TokenizerWrapper:
    """Return a tokenizer that splits by one of llama.cpp's pre-tokenizers.

    Args:
        pre: llama.cpp's name of the pre-tokenizer.
    """
    kind = BYTE_LEVEL[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind.ignores_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(kind.steps())
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 4,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<s>", special=True, normalized=False)])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<s>"
    )
    whole.chat_template = "{{ messages[0].content }}"
    return TokenizerWrapper(whole)
