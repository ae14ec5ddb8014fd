"""Whole models as GGUF files for llama.cpp, Ollama and LM Studio, with adapters folded in.

The modules in ``models/gguf`` hold the differences between llama.cpp and mlx-lm. Source:
llama.cpp's convert_hf_to_gguf.py for the metadata.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.base_layers import full_weight
from ..adapters.lora import Adapter
from ..errors import ModelError, join_problems
from ..models.gguf.architectures import (
    ARCHITECTURES,
    REALS,
    expected_tensors,
    fixed_settings,
    half_of,
)
from ..models.gguf.delta_net import delta_net_metadata
from ..models.gguf.gemma4 import gemma4_metadata
from ..models.gguf.granite4 import mamba_metadata
from ..models.gguf.lfm2 import lfm2_metadata
from ..models.gguf.ministral3 import ministral3_metadata, ministral3_rope
from ..models.gguf.rope_scaling import add_rope_scaling, rope_problem, rope_tensors
from ..models.gguf.tensor_layout import gguf_shape, in_other_layout
from ..models.gguf.tokenizer_to_gguf import add_tokenizer
from ..setting_types import Merged
from .peft import is_tied

_CONTEXT = {
    "gemma": 8192, "gemma2": 8192, "mixtral": 32_768, "gpt_oss": 131_072, "cohere": 8192,
    "cohere2": 131_072, "starcoder2": 16_384, "qwen2_moe": 32_768,
}  # fmt: skip
"""Context lengths of the families whose models in mlx-lm do not store them; others get 2048."""

_GEMMA2_WINDOW = 4096  # of every second layer; llama.cpp applies it, mlx-lm's Gemma 2 does not

_FAMILY_METADATA: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "gemma4_text": gemma4_metadata,
    "granitemoehybrid": mamba_metadata,
    "lfm2": lfm2_metadata,
    "ministral3": ministral3_metadata,
    "qwen3_5": delta_net_metadata,
    "qwen3_5_moe": delta_net_metadata,
    "qwen3_next": delta_net_metadata,
    "gpt_oss": lambda config: {"expert_feed_forward_length": config["intermediate_size"]},
}
"""model_type → the function that returns the metadata besides simple numbers, by key."""

_SENSITIVE = ("token_embd.weight", "output.weight")
_ENOUGH_BITS = ("f32", "f16", "q8_0")  # the types that also hold sensitive tensors
_FULL_PRECISION = ("ffn_gate_inp", "ssm_conv1d", "shortconv.conv")
"""Parts of the names of small tensors that stay in f32: llama.cpp requires it of the convolutions,
and a router's choice of experts is sensitive."""


def gguf_config(model: nn.Module) -> dict[str, Any]:
    """Return a model's config in the hub's terms, with the defaults that models/gguf needs.

    Raises:
        ModelError: The architecture is not supported.
    """
    # Find the architecture.
    text: Any = getattr(model, "language_model", model)
    kind = type(text).__module__.rpartition(".")[2]
    is_granite4 = kind == "granitemoehybrid"
    if is_granite4 and text.args.use_moe and "mamba" not in text.args.layer_types:
        raise ModelError(
            "a Granite 4 with experts and without Mamba can't be written as GGUF here: fuse it"
            " (mlx_loraplus.fuse --dequantize), and convert the fused model with llama.cpp's"
            " convert_hf_to_gguf.py"
        )
    if kind == "qwen3_5" and text.args.num_experts:
        kind = "qwen3_5_moe"
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{text.model_type} can't be written as GGUF here, allowed are"
            f" {', '.join(ARCHITECTURES)}: fuse it (mlx_loraplus.fuse --dequantize), and convert"
            " the fused model with llama.cpp's convert_hf_to_gguf.py"
        )

    # Fill in the defaults.
    config = dataclasses.asdict(text.args)
    config["model_type"] = kind
    if not config.get("head_dim"):
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if not config.get("max_position_embeddings"):
        config["max_position_embeddings"] = _CONTEXT.get(kind, 2048)
    config["tie_word_embeddings"] = is_tied(model)

    # Adjust the settings of single families.
    if kind == "ministral3":
        config |= ministral3_rope(config)
    if kind == "granitemoehybrid" and "mamba" not in config["layer_types"]:
        config["model_type"] = "granite"  # a Granite 4 that differs from Granite 3 only in its name
    if kind == "llama4":  # true in every config, as 1, 4 or True
        config["attn_temperature_tuning"] = bool(config["attn_temperature_tuning"])
    if kind == "gpt_oss":
        config["layer_types"] = text.model.layer_types
    if kind == "gemma4_text":
        config["rope_scaling"] = config["rope_parameters"]["full_attention"]
        config.pop("partial_rotary_factor")  # rope_parameters has one for each kind of layer
    return config


def _path(model: nn.Module, name: str) -> str:
    """Return the path in ``model`` of a parameter that has a name in the language model."""
    prefix = "language_model." if hasattr(model, "language_model") else ""
    return prefix + name.removeprefix(prefix)


def tensor_names(model: nn.Module, config: dict[str, Any]) -> dict[str, list[str]]:
    """Return module path → llama.cpp's names of the tensors that hold the module's weight.

    There are two names if each tensor holds half of the rows.
    """
    names: dict[str, list[str]] = {}
    for theirs, (ours, _) in expected_tensors(config).items():
        parameter, _ = half_of(ours)
        if parameter.endswith(".weight"):
            names.setdefault(_path(model, parameter).removesuffix(".weight"), []).append(theirs)
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
    problems = _unsupported(config)
    if problems:
        raise ModelError(f"this model can't be written as GGUF: {join_problems(problems)}")

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
    shapes = {tensor: gguf_shape(tensor, shape, config) for tensor, (_, shape) in expected.items()}
    types = tensor_types(shapes, kind)
    for tensor, shape in shapes.items():
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
    for tensor, (name_here, _) in expected.items():
        parameter, half = half_of(name_here)
        module, _, leaf = _path(model, parameter).rpartition(".")
        weight = _merged(modules[module], leaf)
        if half is not None:
            weight = np.split(weight, 2)[half]
        weight = in_other_layout(weight, tensor, config, to_gguf=True)
        weight = weight.reshape(shapes[tensor])
        writer.write_tensor_data(quantize(weight, types[tensor]))
    for array in scaling.values():
        writer.write_tensor_data(array)
    writer.close()


def tensor_types(
    shapes: dict[str, tuple[int, ...]], kind: Merged
) -> dict[str, GGMLQuantizationType]:
    """Return the type to store each tensor in."""
    types: dict[str, GGMLQuantizationType] = {}
    for tensor, shape in shapes.items():
        # The biases of experts also have two axes, but they are not matrices.
        is_matrix = len(shape) >= 2 and tensor.endswith(".weight")
        is_small = any(part in tensor for part in _FULL_PRECISION)
        chosen = GGMLQuantizationType.F32
        if is_matrix and not is_small:
            chosen = GGMLQuantizationType[kind.upper()]

        # The embeddings and the head lose the most. llama.cpp also gives them more bits.
        if tensor in _SENSITIVE and kind not in _ENOUGH_BITS:
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
    problem = rope_problem(config, architecture.scalings)
    if problem:
        problems.append(problem)
    return problems


def _add_config(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Add the settings that describe the architecture to the metadata."""
    model_type = config["model_type"]
    architecture = ARCHITECTURES[model_type]
    for name, key in architecture.numbers.items():
        value = float(config[name]) if name in REALS else int(config[name])
        _add_value(writer, f"{writer.arch}.{key}", value)
    writer.add_vocab_size(config["vocab_size"])

    # Add what is stored in another form.
    if model_type in _FAMILY_METADATA:
        for key, value in _FAMILY_METADATA[model_type](config).items():
            _add_value(writer, f"{writer.arch}.{key}", value)
    if model_type == "gemma4_text":  # its heads have two sizes, which are added above
        return

    # Add the sizes of a head, and what changes its rotation.
    writer.add_value_length(config["head_dim"])
    if not model_type.startswith("gemma"):
        rotated = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
        writer.add_rope_dimension_count(rotated)
    if model_type == "gemma2":
        writer.add_sliding_window(_GEMMA2_WINDOW)
    add_rope_scaling(writer, config)


def _add_value(writer: GGUFWriter, key: str, value: float | list[Any]) -> None:
    """Add an integer, a real number, or a list of integers or truth values to the metadata."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
