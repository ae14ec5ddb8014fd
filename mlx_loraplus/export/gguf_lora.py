"""Adapters as GGUF files for llama.cpp, Ollama and LM Studio.

``models/gguf/architectures.py`` translates the differences from mlx-lm in both directions. The
order of Llama's query and key rows (the two halves of a head are interleaved) is also the order of
the rows of an adapter's B.

Sources: llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp (each tensor's scale is
alpha / rank; an embedding's A and the matrices of experts are not transposed).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGUFWriter

from ..adapters.adapter import Adapter
from ..adapters.attach_saved import attach_saved
from ..adapters.layers import EMBEDDINGS, EXPERTS
from ..adapters.stored_files import StoredConfig
from ..adapters.trainable import find_adapters, find_fully_trained
from ..errors import AdapterError, join_problems
from ..models.gguf.architectures import ARCHITECTURES, relaid
from ..models.gguf.reader import GGUFFile, read_gguf
from .gguf_model import gguf_config, tensor_names

_EMBEDDING = "token_embd.weight"


def write_lora(model: nn.Module, path: Path) -> None:
    """Write the adapters of ``model`` as a LoRA for llama.cpp.

    The LoRA is used with a GGUF file of the same base.

    Raises:
        AdapterError: llama.cpp can't express the adapter.
        ModelError: The architecture is not supported.
    """
    config = gguf_config(model)
    names = tensor_names(model, config)
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

    writer = GGUFWriter(path, ARCHITECTURES[config["model_type"]].name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)

    for module, adapter in adapters.items():
        name = names[module]
        a, b = adapter.lora_matrices()
        b = b * (adapter.scale * a.shape[1] / alpha)

        # The matrices of experts have the same orientation in both
        is_expert = isinstance(adapter.base, EXPERTS)
        left = a if is_expert or isinstance(adapter.base, EMBEDDINGS) else a.T
        right = np.array(mx.contiguous(b if is_expert else b.T))
        writer.add_tensor(f"{name}.lora_a", np.array(mx.contiguous(left)))
        writer.add_tensor(f"{name}.lora_b", relaid(right, name, config, to_gguf=True))

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
        ModelError: The file is incomplete or not a GGUF file, or the architecture is
            not supported.
    """
    file = read_gguf(path)
    config = gguf_config(model)
    alpha = _read_alpha(file, config, path)
    modules = {theirs: ours for ours, theirs in tensor_names(model, config).items()}

    # The adapter has one scale: the scale of the first B. Another B may have a different rank, and
    # so a different scale; it is then multiplied by the ratio of the two scales.
    scale = None
    weights: dict[str, mx.array] = {}
    for tensor, place in file.tensors.items():
        name, _, leaf = tensor.rpartition(".")
        if (
            name not in modules
            or leaf not in ("lora_a", "lora_b")
            or len(place.shape) not in (2, 3)
        ):
            raise AdapterError(f"{path}: {tensor!r} has no place in this model")

        array = file.read(tensor)
        if leaf == "lora_b":
            own_scale = alpha / array.shape[-1]
            scale = scale or own_scale
            if array.shape[0] % config["head_dim"] == 0:
                array = relaid(array, name, config, to_gguf=False)
            array = array * np.float32(own_scale / scale)

        # An embedding's A and the matrices of experts are stored in the same orientation as ours
        if array.ndim == 2 and (leaf == "lora_b" or name != _EMBEDDING):
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
    ours = ARCHITECTURES[config["model_type"]].name
    if architecture != ours:
        raise AdapterError(f"{path} is for {architecture!r:.40}, the model is {ours}")
    return alpha
