"""GGUF files for llama.cpp, Ollama and LM Studio: only the adapter, or the fused model.

``models/gguf/architectures.py`` translates the differences from mlx-lm in both directions: tensor
names, the order of Llama's query and key rows (the two halves of a head are interleaved, also in
the rows of an adapter's B), and Gemma's norm weights, which are stored with 1 added.

Sources: llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp (each tensor's scale is
alpha / rank; an embedding's A is not transposed), and convert_hf_to_gguf.py for the metadata.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGUFWriter, RopeScalingType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize
from mlx_lm.models import gemma3_text, llama
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.adapter import Adapter
from ..adapters.attach import find_adapters, find_fully_trained
from ..adapters.layers import EMBEDDINGS, full_weight
from ..adapters.storage import StoredConfig, attach_saved
from ..config import Merged
from ..errors import AdapterError, ModelError, join_problems
from ..models.gguf.architectures import (
    ARCHITECTURES,
    NUMBERS,
    REALS,
    expected_tensors,
    gemma_settings,
    llama3_divisors,
    relaid,
)
from ..models.gguf.reader import GGUFFile, read_gguf
from ..models.gguf.write_tokenizer import add_tokenizer
from .peft import is_tied

_KINDS = {llama.Model: "llama", gemma3_text.Model: "gemma3_text"}
_EMBEDDING = "token_embd.weight"


def gguf_config(model: nn.Module) -> dict[str, Any]:
    """Return a model's config in the hub's terms, with the defaults that models/gguf needs.

    Raises:
        ModelError: The model is neither a Llama nor a Gemma 3.
    """
    text: Any = getattr(model, "language_model", model)
    kind = _KINDS.get(type(text))
    if kind is None:
        raise ModelError(
            f"{text.model_type} can't become GGUF here, allowed are Llama and Gemma 3: fuse it"
            " (mlx_loraplus.fuse --dequantize) and convert that with llama.cpp's"
            " convert_hf_to_gguf.py"
        )

    config = dataclasses.asdict(text.args)
    config["model_type"] = kind
    config["head_dim"] = (
        config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    )
    config["max_position_embeddings"] = config["max_position_embeddings"] or 2048
    config["tie_word_embeddings"] = is_tied(model)
    return config


def _tensor_names(model: nn.Module, config: dict[str, Any]) -> dict[str, str]:
    """Return module path → llama.cpp's name of the module's weight."""
    prefix = "language_model." if hasattr(model, "language_model") else ""
    names: dict[str, str] = {}
    for theirs, (ours, _) in expected_tensors(config).items():
        names[prefix + ours.removesuffix(".weight")] = theirs
    return names


def write_lora(model: nn.Module, path: Path) -> None:
    """Write the adapters of ``model`` as a LoRA for llama.cpp.

    The LoRA is used with a GGUF file of the same base.

    Raises:
        AdapterError: llama.cpp can't express the adapter.
        ModelError: The model is neither a Llama nor a Gemma 3.
    """
    config = gguf_config(model)
    names = _tensor_names(model, config)
    adapters = find_adapters(model)

    problems = [f"{path} trained in full" for path in find_fully_trained(model)]
    for module, adapter in adapters.items():
        if problem := _inexpressible(module, adapter, names, config):
            problems.append(problem)
    if problems:
        raise AdapterError(
            f"a LoRA in GGUF can't express this adapter: {join_problems(problems, most=3)}; write"
            " base and adapter as one model instead: --merged f16"
        )

    # The file has one alpha. llama.cpp's scale is alpha / rank, so B takes the remaining factor.
    first = next(iter(adapters.values()))
    alpha = (first.scale or 1.0) * first.lora_matrices()[0].shape[1]

    writer = GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)

    for module, adapter in adapters.items():
        name = names[module]
        a, b = adapter.lora_matrices()
        b = b * (adapter.scale * a.shape[1] / alpha)

        left = a if isinstance(adapter.base, EMBEDDINGS) else a.T
        right = relaid(np.array(mx.contiguous(b.T)), name, config, to_gguf=True)
        writer.add_tensor(f"{name}.lora_a", np.array(mx.contiguous(left)))
        writer.add_tensor(f"{name}.lora_b", right)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _inexpressible(
    module: str, adapter: Adapter, names: Mapping[str, str], config: dict[str, Any]
) -> str | None:
    """Return the reason why llama.cpp can't express an adapter, or None."""
    if not adapter.is_plain_lora:
        return f"{adapter.kind} on {module}"
    if adapter.owns_base:
        return (
            f"{module} has a quantized base of its own (--quantize), which belongs to the adapter"
        )
    if isinstance(adapter.base, EMBEDDINGS) and config["tie_word_embeddings"]:
        return f"{module} is the head, too, and llama.cpp can't adapt both"
    if module not in names:
        return f"{module} has no name in llama.cpp"
    return None


def load_gguf_lora(model: nn.Module, path: Path) -> nn.Module:
    """Apply a LoRA from a GGUF file to ``model``; this is the inverse of ``write_lora``.

    Raises:
        AdapterError: The file is not a LoRA, or does not fit the model.
        ModelError: The file is incomplete or not a GGUF file, or the model is neither a Llama nor
            a Gemma 3.
    """
    file = read_gguf(path)
    config = gguf_config(model)
    alpha = _read_alpha(file, config, path)
    modules = {theirs: ours for ours, theirs in _tensor_names(model, config).items()}

    # The adapter has one scale: the scale of the first B. Another B may have a different rank, and
    # so a different scale; it is then multiplied by the ratio of the two scales.
    scale = None
    weights: dict[str, mx.array] = {}
    for tensor, place in file.tensors.items():
        name, _, leaf = tensor.rpartition(".")
        if name not in modules or leaf not in ("lora_a", "lora_b") or len(place.shape) != 2:
            raise AdapterError(f"{path}: {tensor!r} has no place in this model")

        array = file.read(tensor)
        if leaf == "lora_b":
            own_scale = alpha / array.shape[1]
            scale = scale or own_scale
            if array.shape[0] % config["head_dim"] == 0:
                array = relaid(array, name, config, to_gguf=False)
            array = array * np.float32(own_scale / scale)

        # An embedding's A is stored in the same orientation as ours.
        if leaf == "lora_b" or name != _EMBEDDING:
            array = array.T
        weights[f"{modules[name]}.{leaf}"] = mx.array(array)

    stored = StoredConfig.model_validate({"lora_parameters": {"scale": scale or alpha}})
    return attach_saved(model, stored, weights, {}, path)


def _read_alpha(file: GGUFFile, config: dict[str, Any], path: Path) -> float:
    """Return a LoRA's alpha.

    Raises:
        AdapterError: The file is not a LoRA, or is a LoRA for another architecture.
    """
    alpha = file.metadata.get("adapter.lora.alpha")
    is_lora = file.metadata.get("adapter.type") == "lora"
    if not is_lora or not isinstance(alpha, float) or not 0 < abs(alpha) < 1e9:
        raise AdapterError(
            f"{path} is no LoRA: adapter.type or adapter.lora.alpha is missing or invalid"
        )
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise AdapterError(
            f"{path} is an activated LoRA, which acts only after certain tokens; adapters here act"
            " on every token"
        )

    architecture = file.metadata.get("general.architecture")
    ours = ARCHITECTURES[config["model_type"]]
    if architecture != ours:
        raise AdapterError(f"{path} is for {architecture!r:.40}, the model is {ours}")
    return alpha


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
    writer = GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    writer.add_type("model")
    writer.add_name(name)
    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_quantization_version(2)
    _add_config(writer, config)
    add_tokenizer(writer, tokenizer, config["vocab_size"])

    # Add the list of tensors.
    types = _tensor_types(config, kind)
    for tensor, (_, shape) in expected_tensors(config).items():
        nbytes = math.prod(quant_shape_to_byte_shape(shape, types[tensor]))
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), nbytes, raw_dtype=types[tensor])
    divisors = _rope_divisors(config)
    if divisors.size:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    # Write the tensors' data in the same order.
    modules = dict(model.named_modules())
    for module, tensor in _tensor_names(model, config).items():
        weight = relaid(_merged_weight(modules[module]), tensor, config, to_gguf=True)
        writer.write_tensor_data(quantize(weight, types[tensor]))
    if divisors.size:
        writer.write_tensor_data(divisors)
    writer.close()


def _tensor_types(config: dict[str, Any], kind: Merged) -> dict[str, GGMLQuantizationType]:
    """Return the type to store each tensor in."""
    types: dict[str, GGMLQuantizationType] = {}
    for tensor, (_, shape) in expected_tensors(config).items():
        is_matrix = len(shape) == 2
        chosen = GGMLQuantizationType[kind.upper()] if is_matrix else GGMLQuantizationType.F32

        # A quantized row must consist of whole blocks.
        block_size = GGML_QUANT_SIZES[chosen][0]
        types[tensor] = chosen if shape[-1] % block_size == 0 else GGMLQuantizationType.F16
    return types


def _rope_divisors(config: dict[str, Any]) -> np.ndarray:
    """Return the divisors of Llama 3.1's RoPE scaling, or an empty array for other models.

    llama.cpp stores them as a tensor.
    """
    if _rope_kind(config) != "llama3":
        return np.zeros(0, np.float32)
    divisors = llama3_divisors(config["head_dim"], config["rope_theta"], config["rope_scaling"])
    return divisors.astype(np.float32)


def _merged_weight(module: Any) -> np.ndarray:
    """Return a module's weight with its adapter folded in, float32."""
    if isinstance(module, Adapter):
        return np.array(module.merged(full_weight(module.base, mx.float32)))
    return np.array(full_weight(module, mx.float32))


def _unsupported(config: dict[str, Any]) -> list[str]:
    """Return the features of a model that llama.cpp's Llama and Gemma 3 do not support."""
    switches = ("attention_bias", "mlp_bias", "rope_traditional")
    problems = [key for key in switches if config.get(key)]

    is_llama = config["model_type"] == "llama"
    if is_llama and set(config["layer_types"]) != {"full_attention"}:
        problems.append("layer_types other than full_attention")
    if not is_llama:
        for key, value in gemma_settings(config).items():
            if config[key] != value:
                problems.append(f"a {key} that differs from Gemma 3's {value}")

    rope = _rope_kind(config)
    supported = (None, "default", "linear", "llama3") if is_llama else (None, "default", "linear")
    if rope not in supported:
        problems.append(f"RoPE scaling {rope!r}")
    return problems


def _rope_kind(config: dict[str, Any]) -> str | None:
    """Return the name of a model's RoPE scaling, or None if it has no scaling."""
    scaling = config["rope_scaling"] or {}
    return scaling.get("rope_type") or scaling.get("type")


def _add_config(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Add the numbers that describe the architecture to the metadata."""
    for name, key in NUMBERS[writer.arch].items():
        add = writer.add_float32 if name in REALS else writer.add_uint32
        add(f"{writer.arch}.{key}", config[name])

    writer.add_vocab_size(config["vocab_size"])
    writer.add_value_length(config["head_dim"])
    if config["model_type"] == "llama":
        writer.add_rope_dimension_count(config["head_dim"])

    if _rope_kind(config) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
