"""GGUF files for llama.cpp, Ollama and LM Studio: an adapter alone, or a model with its adapter folded in.

What differs from mlx-lm is in models/gguf.py, both ways: the names, Llama's query and key rows with
the two halves of a head interleaved (so the rows of their B, too), and Gemma's norms with 1 added.
Sources: llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp (scale = alpha / rank of each
tensor; an embedding's A is not transposed), and convert_hf_to_gguf.py for the metadata.
"""

import dataclasses
import math
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
from ..models.gguf.reader import read_gguf
from ..models.gguf.write_tokenizer import add_tokenizer
from .peft import is_tied


def gguf_config(model: nn.Module) -> dict[str, Any]:
    """Return the config of a model in the hub's terms, defaults filled in, as models/gguf.py has it.

    Raises: ModelError where it is no Llama and no Gemma 3.
    """
    text: Any = getattr(model, "language_model", model)
    kind = {llama.Model: "llama", gemma3_text.Model: "gemma3_text"}.get(type(text))
    if kind is None:
        raise ModelError(
            f"{text.model_type} can't become GGUF here, allowed are Llama and Gemma 3: fuse it"
            " (mlx_loraplus.fuse --dequantize) and convert that with llama.cpp's"
            " convert_hf_to_gguf.py"
        )
    config = dataclasses.asdict(text.args)
    config["head_dim"] = (
        config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    )
    config["max_position_embeddings"] = config["max_position_embeddings"] or 2048
    return config | {"model_type": kind, "tie_word_embeddings": is_tied(model)}


def _names(model: nn.Module, config: dict[str, Any]) -> dict[str, str]:
    """Return path of a module → llama.cpp's name of it."""
    prefix = "language_model." if hasattr(model, "language_model") else ""
    found = {ours: theirs for theirs, (ours, _) in expected_tensors(config).items()}
    return {prefix + ours.removesuffix(".weight"): theirs for ours, theirs in found.items()}


def write_lora(model: nn.Module, path: Path) -> None:
    """Write the adapters of ``model`` as a LoRA that llama.cpp puts on a GGUF of the same base.

    Raises:
        AdapterError: Something that llama.cpp can't express, told with its names.
        ModelError: As ``gguf_config``.
    """
    config = gguf_config(model)
    names, adapters = _names(model, config), find_adapters(model)
    problems = [f"{path} trained in full" for path in find_fully_trained(model)]
    for module, adapter in adapters.items():
        if not adapter.is_plain_lora:
            problems.append(f"{adapter.kind} on {module}")
        elif adapter.owns_base:
            problems.append(
                f"{module} has a quantized base of its own (--quantize), which belongs to the"
                " adapter"
            )
        elif isinstance(adapter.base, EMBEDDINGS) and config["tie_word_embeddings"]:
            problems.append(f"{module} is the head, too, which llama.cpp can't adapt both")
        elif module not in names:
            problems.append(f"{module} has no name there")
    if problems:
        raise AdapterError(
            f"a LoRA in GGUF can't express this adapter: {join_problems(problems, most=3)}; write"
            " base and adapter as one instead: --merged f16"
        )
    first = next(iter(adapters.values()))
    alpha = (first.scale or 1.0) * first.lora_matrices()[0].shape[1]
    writer = GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for module, adapter in adapters.items():
        a, b = adapter.lora_matrices()
        b = b * (adapter.scale * a.shape[1] / alpha)  # llama.cpp's scale is alpha / rank
        left = a if isinstance(adapter.base, EMBEDDINGS) else a.T
        writer.add_tensor(f"{names[module]}.lora_a", np.array(mx.contiguous(left)))
        right = relaid(np.array(mx.contiguous(b.T)), names[module], config, to_gguf=True)
        writer.add_tensor(f"{names[module]}.lora_b", right)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_gguf_lora(model: nn.Module, path: Path) -> nn.Module:
    """Put a LoRA from a GGUF file on ``model``, the inverse of ``write_lora``.

    Raises:
        AdapterError: It is no LoRA, or does not fit the model.
        ModelError: It is no whole GGUF file, or as ``gguf_config``.
    """
    file, config = read_gguf(path), gguf_config(model)
    architecture, alpha = (
        file.metadata.get("general.architecture"),
        file.metadata.get("adapter.lora.alpha"),
    )
    if (
        file.metadata.get("adapter.type") != "lora"
        or not isinstance(alpha, float)
        or not 0 < abs(alpha) < 1e9
    ):
        raise AdapterError(
            f"{path} is no LoRA: adapter.type and adapter.lora.alpha are missing or not right"
        )
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise AdapterError(
            f"{path} is an activated LoRA, which acts only behind certain tokens: ours act"
            " everywhere"
        )
    if architecture != (ours := ARCHITECTURES[config["model_type"]]):
        raise AdapterError(f"{path} is for {architecture!r:.40}, the model is {ours}")
    modules = {theirs: ours for ours, theirs in _names(model, config).items()}
    weights: dict[str, mx.array] = {}
    scale = None
    for tensor, place in file.tensors.items():
        name, _, leaf = tensor.rpartition(".")
        if name not in modules or leaf not in ("lora_a", "lora_b") or len(place.shape) != 2:
            raise AdapterError(f"{path}: {tensor!r} has no place in this model")
        array = file.read(tensor)
        if leaf == "lora_b":
            rank = array.shape[1]
            scale = scale or alpha / rank
            array = (
                relaid(array, name, config, to_gguf=False)
                if array.shape[0] % config["head_dim"] == 0
                else array
            )
            array = array * np.float32(alpha / rank / scale)
        if leaf == "lora_b" or name != "token_embd.weight":
            array = array.T
        weights[f"{modules[name]}.{leaf}"] = mx.array(array)
    stored = StoredConfig.model_validate({"lora_parameters": {"scale": scale or alpha}})
    return attach_saved(model, stored, weights, {}, path)


def write_model(
    model: nn.Module, tokenizer: TokenizerWrapper, name: str, path: Path, kind: Merged
) -> None:
    """Write ``model`` with its adapters folded in, its tokenizer and its chat template, a tensor at a time.

    The model may be quantized, and have adapters or none. ``name`` is what it calls itself,
    ``kind`` the type of its matrices; norms stay f32.

    Raises: ModelError for another architecture, or something in it that llama.cpp's does not have.
    """
    config = gguf_config(model)
    if problems := _unlike(config):
        raise ModelError(f"this model can't become GGUF: {join_problems(problems)}")
    writer = GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(
        LlamaFileType.ALL_F32 if kind == "f32" else LlamaFileType[f"MOSTLY_{kind.upper()}"]
    )
    writer.add_quantization_version(2)
    _add_config(writer, config)
    add_tokenizer(writer, tokenizer, config["vocab_size"])
    types: dict[str, GGMLQuantizationType] = {}
    for tensor, (_, shape) in expected_tensors(config).items():
        types[tensor] = (
            GGMLQuantizationType[kind.upper()] if len(shape) == 2 else GGMLQuantizationType.F32
        )
        if shape[-1] % GGML_QUANT_SIZES[types[tensor]][0]:
            types[tensor] = GGMLQuantizationType.F16
        nbytes = math.prod(quant_shape_to_byte_shape(shape, types[tensor]))
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), nbytes, raw_dtype=types[tensor])
    divisors = np.zeros(0, np.float32)
    if _rope_kind(config) == "llama3":  # Llama 3.1's rule, which llama.cpp keeps as a tensor
        divisors = llama3_divisors(
            config["head_dim"], config["rope_theta"], config["rope_scaling"]
        ).astype(np.float32)
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    modules = dict(model.named_modules())
    for module, tensor in _names(model, config).items():
        weight = relaid(_weight(modules[module]), tensor, config, to_gguf=True)
        writer.write_tensor_data(quantize(weight, types[tensor]))
    if divisors.size:
        writer.write_tensor_data(divisors)
    writer.close()


def _weight(module: Any) -> np.ndarray:
    """Return a module's weight, its adapter folded in, float32."""
    if isinstance(module, Adapter):
        return np.array(module.merged(full_weight(module.base, mx.float32)))
    return np.array(full_weight(module, mx.float32))


def _unlike(config: dict[str, Any]) -> list[str]:
    """Say what of a model llama.cpp's Llama and Gemma 3 do not have."""
    problems = [
        key for key in ("attention_bias", "mlp_bias", "rope_traditional") if config.get(key)
    ]
    if config["model_type"] == "llama" and set(config["layer_types"]) != {"full_attention"}:
        problems.append("layer_types other than full_attention")
    theirs = {} if config["model_type"] == "llama" else gemma_settings(config)
    problems += [
        f"a {key} that is not Gemma 3's" for key, value in theirs.items() if config[key] != value
    ]
    kind = _rope_kind(config)
    if kind not in (None, "default", "linear") and (kind, config["model_type"]) != (
        "llama3",
        "llama",
    ):
        problems.append(f"RoPE scaling {kind!r}")
    return problems


def _rope_kind(config: dict[str, Any]) -> str | None:
    scaling = config["rope_scaling"] or {}
    return scaling.get("rope_type") or scaling.get("type")


def _add_config(writer: GGUFWriter, config: dict[str, Any]) -> None:
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
