"""Whole models as GGUF files for llama.cpp, Ollama and LM Studio, with adapters folded in.

``models/gguf/architectures.py`` holds the differences between llama.cpp and mlx-lm. Source:
llama.cpp's convert_hf_to_gguf.py for the metadata.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.adapter import Adapter
from ..adapters.layers import full_weight
from ..errors import ModelError, join_problems
from ..models.gguf.architectures import (
    ARCHITECTURES,
    REALS,
    expected_tensors,
    fixed_settings,
    relaid,
)
from ..models.gguf.rope_scaling import add_rope_scaling, rope_problem, rope_tensors
from ..models.gguf.write_tokenizer import add_tokenizer
from ..setting_types import Merged
from .peft import is_tied

_CONTEXT = {"gemma2": 8192, "mixtral": 32_768}
"""Context lengths of the families whose model in mlx-lm does not store it; else 2048."""

_GEMMA2_WINDOW = 4096  # of every second layer; llama.cpp applies it, mlx-lm's Gemma 2 does not

_SENSITIVE = ("token_embd.weight", "output.weight")


def gguf_config(model: nn.Module) -> dict[str, Any]:
    """Return a model's config in the hub's terms, with the defaults that models/gguf needs.

    Raises:
        ModelError: The architecture is not supported.
    """
    text: Any = getattr(model, "language_model", model)
    kind = type(text).__module__.rpartition(".")[2]
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{text.model_type} can't become GGUF here, allowed are {', '.join(ARCHITECTURES)}:"
            " fuse it (mlx_loraplus.fuse --dequantize) and convert that with llama.cpp's"
            " convert_hf_to_gguf.py"
        )

    config = dataclasses.asdict(text.args)
    config["model_type"] = kind
    config["head_dim"] = (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    context = config.get("max_position_embeddings") or _CONTEXT.get(kind, 2048)
    config["max_position_embeddings"] = context
    config["tie_word_embeddings"] = is_tied(model)
    return config


def _prefix(model: nn.Module) -> str:
    """Return the path of the language model inside the model, with a final dot."""
    return "language_model." if hasattr(model, "language_model") else ""


def tensor_names(model: nn.Module, config: dict[str, Any]) -> dict[str, str]:
    """Return module path → llama.cpp's name of the module's weight."""
    names: dict[str, str] = {}
    for theirs, (ours, _) in expected_tensors(config).items():
        if ours.endswith(".weight"):
            names[_prefix(model) + ours.removesuffix(".weight")] = theirs
    return names


def write_model(
    model: nn.Module, tokenizer: TokenizerWrapper, name: str, path: Path, kind: Merged
) -> None:
    """Write ``model``, with its adapters folded in, its tokenizer and its chat template.

    Only one tensor at a time is in full precision.

    Args:
        model: A model with or without adapters, plain or quantized.
        tokenizer: The model's tokenizer.
        name: The model's name in the file.
        path: The file to write.
        kind: The stored type of matrices; norms are stored as f32.

    Raises:
        ModelError: llama.cpp does not support the architecture or a feature of the model.
    """
    config = gguf_config(model)
    if problems := _unsupported(config):
        raise ModelError(f"this model can't become GGUF: {join_problems(problems)}")

    # Add the metadata.
    expected = expected_tensors(config)
    writer = GGUFWriter(path, ARCHITECTURES[config["model_type"]].name)
    writer.add_type("model")
    writer.add_name(name)
    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_quantization_version(2)
    _add_config(writer, config)
    add_tokenizer(writer, tokenizer, config["vocab_size"])

    # Add the list of tensors.
    types = _tensor_types(expected, kind)
    for tensor, (_, shape) in expected.items():
        nbytes = math.prod(quant_shape_to_byte_shape(shape, types[tensor]))
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), nbytes, raw_dtype=types[tensor])
    scaling = rope_tensors(config)
    for tensor, array in scaling.items():
        writer.add_tensor_info(tensor, array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    # Write the tensors' data in the same order.
    modules = dict(model.named_modules())
    for tensor, (parameter, _) in expected.items():
        module, _, leaf = (_prefix(model) + parameter).rpartition(".")
        weight = relaid(_merged(modules[module], leaf), tensor, config, to_gguf=True)
        writer.write_tensor_data(quantize(weight, types[tensor]))
    for array in scaling.values():
        writer.write_tensor_data(array)
    writer.close()


def _tensor_types(
    expected: dict[str, tuple[str, tuple[int, ...]]], kind: Merged
) -> dict[str, GGMLQuantizationType]:
    """Return the type to store each tensor in."""
    types: dict[str, GGMLQuantizationType] = {}
    for tensor, (_, shape) in expected.items():
        # The router of a mixture of experts is small, and the choice of experts sensitive
        is_matrix = len(shape) >= 2 and "ffn_gate_inp" not in tensor
        chosen = GGMLQuantizationType[kind.upper()] if is_matrix else GGMLQuantizationType.F32

        # The embeddings and the head lose the most; llama.cpp keeps them in more bits, too
        if tensor in _SENSITIVE and kind in ("q5_1", "q4_1"):
            chosen = GGMLQuantizationType.Q8_0

        # A quantized row must consist of whole blocks.
        columns, block_size = shape[len(shape) - 1], GGML_QUANT_SIZES[chosen][0]
        types[tensor] = chosen if columns % block_size == 0 else GGMLQuantizationType.F16
    return types


def _merged(module: Any, leaf: str) -> np.ndarray:
    """Return a module's parameter with its adapter folded in, float32."""
    base = module.base if isinstance(module, Adapter) else module
    if leaf != "weight":
        return np.array(base[leaf].astype(mx.float32))
    weight = full_weight(base, mx.float32)
    return np.array(module.merged(weight) if isinstance(module, Adapter) else weight)


def _unsupported(config: dict[str, Any]) -> list[str]:
    """Return the features of a model that llama.cpp does not support for its architecture."""
    problems: list[str] = []
    for key, value in fixed_settings(config).items():
        if config.get(key, value) == value:
            continue
        if isinstance(value, bool):
            problems.append(f"{key} {config[key]}")
        else:
            problems.append(f"{key} {config[key]!r:.60} instead of {value!r:.60}")

    architecture = ARCHITECTURES[config["model_type"]]
    if problem := rope_problem(config, architecture.scalings):
        problems.append(problem)
    return problems


def _add_config(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Add the numbers that describe the architecture to the metadata."""
    for name, key in ARCHITECTURES[config["model_type"]].numbers.items():
        add = writer.add_float32 if name in REALS else writer.add_uint32
        add(f"{writer.arch}.{key}", config[name])

    writer.add_vocab_size(config["vocab_size"])
    writer.add_value_length(config["head_dim"])
    if not config["model_type"].startswith("gemma"):
        rotated = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
        writer.add_rope_dimension_count(rotated)
    if config["model_type"] == "gemma2":
        writer.add_sliding_window(_GEMMA2_WINDOW)
    add_rope_scaling(writer, config)
