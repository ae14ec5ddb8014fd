"""Tiny random models of every architecture that can become GGUF, with a byte-level tokenizer."""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import gemma4_text
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
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
_GEMMA4 = {
    "model_type": "gemma4_text", "head_dim": 32, "global_head_dim": 64, "sliding_window": 8,
    "num_hidden_layers": 6, "sliding_window_pattern": 3, "vocab_size_per_layer_input": SIZE,
    "tie_word_embeddings": True,
}  # fmt: skip
_GRANITE = {
    "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}  # fmt: skip
_MAMBA = {
    "model_type": "granitemoehybrid", "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16,
    "mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": True, "mamba_proj_bias": False,
    "tie_word_embeddings": True,
}  # fmt: skip
_SMALL_ROPE = {
    "rope_type": "default", "type": "default", "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
}  # fmt: skip
_DELTA_NET = {
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 32, "norm_topk_prob": True,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_EQUAL_LIMITS = {"high_freq_factor": 1.0, "original_max_position_embeddings": 4096}
_LLAMA4 = {
    "model_type": "llama4_text", "head_dim": 16, "attention_bias": False, "use_qk_norm": True,
    "attention_chunk_size": 8192, "intermediate_size_mlp": 128, "num_local_experts": 8,
    "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "rope_scaling": None,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
_YARN = {
    "type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
_GROWING_ROPE = _YARN | {
    "rope_theta": 10_000.0, "original_max_position_embeddings": 16, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5,
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
    "llama4": {"model_type": "llama4", "text_config": _BASE | _LLAMA4},
    "llama4, Scout": {
        "model_type": "llama4",
        "text_config": _BASE
        | _LLAMA4
        | {"interleave_moe_layer_step": 1, "rope_scaling": _LLAMA3 | _EQUAL_LIMITS},
    },
    "gemma": {"model_type": "gemma", "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": _GEMMA | {"model_type": "gemma2"},
    "gemma3": _GEMMA
    | {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 8}
    | {"sliding_window_pattern": 6, "rope_theta": 1_000_000.0},
    "gemma4": _GEMMA4
    | {"num_kv_shared_layers": 3, "hidden_size_per_layer_input": 32}
    | {"use_double_wide_mlp": True, "num_global_key_value_heads": None},
    "gemma4, MoE": _GEMMA4
    | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    | {"use_double_wide_mlp": False, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_moe": _EXPERTS | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 48},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3, YaRN": {"model_type": "qwen3", "head_dim": 32, "rope_scaling": _YARN},
    "qwen3_moe": _EXPERTS | {"model_type": "qwen3_moe", "head_dim": 32},
    "qwen3_5": _DELTA_NET
    | {"model_type": "qwen3_5", "rope_parameters": _SMALL_ROPE, "tie_word_embeddings": True},
    "qwen3_5_moe": _DELTA_NET
    | _EXPERTS
    | {"shared_expert_intermediate_size": 32}
    | {"model_type": "qwen3_5_moe", "rope_parameters": _SMALL_ROPE},
    "qwen3_next": _DELTA_NET
    | _EXPERTS
    | {"shared_expert_intermediate_size": 32}
    | {"model_type": "qwen3_next", "partial_rotary_factor": 0.25},
    "gpt_oss": {"model_type": "gpt_oss", "head_dim": 32, "num_local_experts": 4}
    | {"num_experts_per_tok": 2, "sliding_window": 8, "rope_scaling": _YARN},
    "phi3": {"model_type": "phi3"},
    "phi3, LongRoPE": {"model_type": "phi3", "rope_scaling": _LONGROPE}
    | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64},
    "smollm3": {"model_type": "smollm3", "tie_word_embeddings": True},
    "olmo2": _PLAIN | {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "sliding_window": 8, "num_hidden_layers": 5},
    "olmo3, YaRN": {"model_type": "olmo3", "sliding_window": 8, "rope_scaling": _YARN},
    "olmoe": {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2}
    | {"num_key_value_heads": 4},
    "ministral3": {"model_type": "ministral3", "rope_parameters": _GROWING_ROPE},
    "granite": _PLAIN | _GRANITE | {"model_type": "granite", "tie_word_embeddings": True},
    "granitemoe": _PLAIN
    | _GRANITE
    | {"model_type": "granitemoe", "num_local_experts": 8, "num_experts_per_tok": 2}
    | {"tie_word_embeddings": True},
    "granitemoehybrid": _PLAIN
    | _GRANITE
    | _MAMBA
    | {"layer_types": ["mamba", "mamba", "attention", "mamba"], "position_embedding_type": "nope"},
    "granitemoehybrid, MoE": _PLAIN
    | _GRANITE
    | _MAMBA
    | {"layer_types": ["mamba", "mamba", "attention", "mamba"], "position_embedding_type": "nope"}
    | {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
    "granitemoehybrid, attention": _PLAIN | _GRANITE | _MAMBA | {"layer_types": ["attention"] * 4},
    "cohere": {"model_type": "cohere", "logit_scale": 0.5},
    "cohere2": {"model_type": "cohere2", "head_dim": 16, "logit_scale": 0.5, "sliding_window": 8},
    "glm4": {"model_type": "glm4", "head_dim": 32, "partial_rotary_factor": 0.5}
    | {"attention_bias": False},
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 32, "use_bias": False},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 32, "attention_bias": True},
    "lfm2": {"model_type": "lfm2", "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3}
    | {
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.5,
    }
    | {"block_auto_adjust_ff_dim": True, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "starcoder2": {"model_type": "starcoder2", "num_hidden_layers": 3},
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


def saturate_gelu(model: Any) -> Any:
    """Enlarge the weights before every GELU, so that GELU(x) is x or 0, and return the model."""
    arrays: Any = tree_flatten(model.parameters())
    before = ("gate_proj.weight", "per_layer_input_gate.weight", "c_fc.weight")
    changed = [(path, array * 2.0**20) for path, array in arrays if path.endswith(before)]
    model.update(tree_unflatten(changed))
    return model


_exact_gelu = nn.gelu_approx
_WITH_GELU = ("gemma", "starcoder2")


def table_gelu(x: mx.array) -> mx.array:
    """Return GELU as llama.cpp computes it on a CPU: from a table of 16-bit floats.

    Source: ``ggml_vec_gelu_f32`` in ggml's src/ggml-cpu/vec.h. Numbers from -10 to 10 are rounded to
    float16 to look them up, and the table's values are float16, too.
    """
    looked_up = _exact_gelu(x.astype(mx.float16).astype(mx.float32)).astype(mx.float16)
    inside = mx.where(x <= -10, 0.0, looked_up.astype(mx.float32))
    return mx.where(x >= 10, x, inside)


def has_gelu(name: str) -> bool:
    """Return whether the MLPs of a family use GELU."""
    return FAMILIES[name]["model_type"].startswith(_WITH_GELU)


@contextmanager
def gelu_of_llama_cpp() -> Generator[None]:
    """Make mlx-lm's models compute GELU as llama.cpp does."""
    gelu, exact, gated = nn.gelu_approx, nn.gelu, gemma4_text.geglu
    nn.gelu_approx = nn.gelu = table_gelu
    gemma4_text.geglu = lambda gate, x: table_gelu(gate) * x
    try:
        yield
    finally:
        nn.gelu_approx, nn.gelu, gemma4_text.geglu = gelu, exact, gated


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


def sentencepiece_tokenizer() -> TokenizerWrapper:
    """Return a tokenizer as Gemma's: pieces of words, "▁" for a space, and bytes for the rest."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    units = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", *"abdehinorstu"]
    merges = [
        ("h", "e"),
        ("t", "he"),
        ("▁", "the"),
        ("o", "r"),
        ("i", "n"),
        ("▁", "a"),
        ("\n", "\n"),
    ]
    merges += [("e", "r"), ("▁", "▁"), ("s", "a"), ("r", "e")]
    pieces = special + units + [left + right for left, right in merges]
    backend = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=["<bos>", "$A"], pair=["<bos>", "$A", "$B:1"], special_tokens=[("<bos>", 2)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens([AddedToken("<|tool_call>", special=True, normalized=False)])
    names = dict(zip(("pad", "eos", "bos", "unk"), special, strict=True))
    whole = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{role}_token": token for role, token in names.items()}
    )
    whole.chat_template = "{{ messages[0].content }}"
    return TokenizerWrapper(whole)
