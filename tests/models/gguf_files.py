"""Tiny GGUF files with everything a real one has, written by the gguf package, and the weights they were made from."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

HIDDEN, INNER, HEADS, KEY_HEADS, HEAD, LAYERS = 32, 64, 4, 2, 8, 6
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    "<0x41>",
    "  ",
    "▁",
    "a",
    "b",
    "▁a",
    "ab",
]  # one of every kind of token
TYPES = [2, 3, 3, 6, 4, 1, 1, 1, 1, 1]
SCORES = [0.0, 0.0, 0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0]


def hub_weights(architecture: str) -> dict[str, np.ndarray]:
    """Return random weights under their names and in their layout on the hub."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (len(PIECES), HIDDEN),
        "model.norm": (HIDDEN,),
    }
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    if architecture == "gemma3":
        norms |= {"pre_feedforward_layernorm": HIDDEN, "post_feedforward_layernorm": HIDDEN}
        norms |= {"self_attn.q_norm": HEAD, "self_attn.k_norm": HEAD}
    for layer in range(LAYERS):
        block = {name: (size,) for name, size in norms.items()}
        block |= {
            "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        }
        block |= {
            "self_attn.k_proj": (KEY_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": (KEY_HEADS * HEAD, HIDDEN),
        }
        block |= {
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return {
        f"{name}.weight": random.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def _llama_cpp_name(name: str, architecture: str) -> str:
    llama = {"post_attention_layernorm": "ffn_norm"}
    gemma = {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    common = {
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for old, new in (common | (llama if architecture == "llama" else gemma)).items():
        name = name.replace(old, new)
    return name


def llama_cpp_weights(architecture: str) -> dict[str, np.ndarray]:
    """Return the same weights as llama.cpp's converter stores them (``permute`` and ``norm_shift`` there)."""
    stored = {}
    for name, weight in hub_weights(architecture).items():
        if architecture == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = len(weight) // HEAD
            weight = (
                weight.reshape(heads, 2, HEAD // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)
            )
        stored[_llama_cpp_name(name, architecture)] = weight
    return stored


def write_gguf(
    path: Path,
    architecture: str = "llama",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
) -> Path:
    """Write a tiny GGUF file; ``metadata`` and ``tensors`` replace or, where None, leave out what it would hold."""
    values: dict[str, Any] = {
        "context_length": 64,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEY_HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
    }
    if architecture == "gemma3":
        values["attention.sliding_window"] = 4
    values = {f"{architecture}.{key}": value for key, value in values.items()}
    values |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": SCORES,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }
    writer = GGUFWriter(path, architecture)
    for key, value in (values | (metadata or {})).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, weight in (llama_cpp_weights(architecture) | (tensors or {})).items():
        if weight is not None:
            writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
