"""Adapters as GGUF files for llama.cpp, Ollama and LM Studio.

``models/gguf/tensor_layout.py`` translates between the layouts of mlx-lm and llama.cpp. If the rows
of a matrix have another order in llama.cpp, as in Llama's queries and keys, so do the rows of its
adapter's B. The same is true of the columns of the matrix and of A.

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

from ..adapters.attach_saved import attach_saved
from ..adapters.base_layers import EMBEDDINGS, EXPERTS
from ..adapters.lora import Adapter
from ..adapters.stored_files import StoredConfig
from ..adapters.trainable import find_adapters, find_fully_trained
from ..errors import AdapterError, join_problems
from ..models.gguf.architectures import ARCHITECTURES
from ..models.gguf.reader import GGUFFile, read_gguf
from ..models.gguf.tensor_layout import in_column_order, in_row_order
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
        problem = _inexpressible(module, adapter, names, config)
        if problem:
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
        a, b = adapter.lora_matrices()
        b = b * (adapter.scale * a.shape[1] / alpha)

        # The matrices of experts have the same orientation in both.
        is_expert = isinstance(adapter.base, EXPERTS)
        is_embedding = isinstance(adapter.base, EMBEDDINGS)
        left = np.array(mx.contiguous(a if is_expert or is_embedding else a.T))
        right = np.array(mx.contiguous(b if is_expert else b.T)) * _output_scale(model, module)

        # Tensors that hold halves of a weight's rows have the same A, and halves of B.
        tensors = names[module]
        for name, part in zip(tensors, np.split(right, len(tensors), axis=-2), strict=True):
            writer.add_tensor(f"{name}.lora_a", in_column_order(left, name, config, to_gguf=True))
            writer.add_tensor(f"{name}.lora_b", in_row_order(part, name, config, to_gguf=True))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _inexpressible(
    module: str, adapter: Adapter, names: Mapping[str, list[str]], config: dict[str, Any]
) -> str | None:
    """Return the reason why llama.cpp can't express an adapter, or None."""
    if not adapter.is_plain_lora:
        return f"{adapter.kind} on {module}"
    if adapter.owns_base:
        return (
            f"{module} has a quantized base of its own (--quantize), which belongs to the adapter"
        )
    if isinstance(adapter.base, EMBEDDINGS) and config["tie_word_embeddings"]:
        return f"{module} is also the head, and llama.cpp can't adapt both"
    if module not in names:
        return f"{module} has no name in llama.cpp"
    return None


def _output_scale(model: nn.Module, module: str) -> np.ndarray:
    """Return the factor that llama.cpp applies to a layer's output, but not to its adapter's.

    This is the scale of every expert in Gemma 4, (experts, 1, 1), and 1 for all other layers. The
    adapter's B is multiplied by it. Source: ``build_lora_mm_id`` in llama.cpp's
    src/llama-graph.cpp.
    """
    layer, ending, _ = module.rpartition("experts.switch_glu.down_proj")
    if not ending:
        return np.ones(1, np.float32)
    router: Any = dict(model.named_modules())[f"{layer}router"]
    return np.array(router.per_expert_scale.astype(mx.float32))[:, None, None]


def load_gguf_lora(model: nn.Module, path: Path) -> nn.Module:
    """Apply a LoRA from a GGUF file to ``model``; this is the inverse of ``write_lora``.

    Raises:
        AdapterError: The file is not a LoRA, or does not fit the model.
        ModelError: The file is incomplete or not a GGUF file, or the architecture is
            not supported.
    """
    if path.is_dir():
        raise AdapterError(f"{path} is a folder: give the .gguf file of the LoRA")
    file = read_gguf(path)
    config = gguf_config(model)
    alpha = _read_alpha(file, config, path)
    names = tensor_names(model, config)
    modules = {theirs: ours for ours, tensors in names.items() for theirs in tensors}

    # The adapter has one scale: the scale of the first B. Another B may have a different rank, and
    # so a different scale; it is then multiplied by the ratio of the two scales.
    scale = None
    arrays: dict[str, np.ndarray] = {}
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
            array = in_row_order(array, name, config, to_gguf=False)
            array = array * np.float32(own_scale / scale) / _output_scale(model, modules[name])
        else:
            array = in_column_order(array, name, config, to_gguf=False)
        arrays[tensor] = array

    # An embedding's A and the matrices of experts are stored in the same orientation as ours.
    weights: dict[str, mx.array] = {}
    for module, tensors in names.items():
        for leaf, array in _joined(arrays, tensors, path).items():
            is_transposed = array.ndim == 2 and (leaf == "lora_b" or tensors[0] != _EMBEDDING)
            weights[f"{module}.{leaf}"] = mx.array(array.T if is_transposed else array)

    stored = StoredConfig.model_validate({"lora_parameters": {"scale": scale or alpha}})
    return attach_saved(model, stored, weights, {}, path)


def _joined(
    arrays: Mapping[str, np.ndarray], tensors: list[str], path: Path
) -> dict[str, np.ndarray]:
    """Return leaf → the A and B of a weight that the file has.

    If two tensors hold halves of the weight's rows, their adapters are joined into one.

    Raises:
        AdapterError: Only one half is adapted, or the ranks differ.
    """
    found: dict[str, list[np.ndarray]] = {}
    for leaf in ("lora_a", "lora_b"):
        parts = [arrays[f"{name}.{leaf}"] for name in tensors if f"{name}.{leaf}" in arrays]
        if parts:
            found[leaf] = parts
    if len(tensors) == 1 or not found:
        return {leaf: parts[0] for leaf, parts in found.items()}

    # The same A is used once. Two different ones become one of twice the rank.
    is_whole = len(found) == 2 and all(len(parts) == 2 for parts in found.values())
    if not is_whole or any(one.shape != other.shape for one, other in found.values()):
        raise AdapterError(
            f"{path} adapts {' and '.join(tensors)} differently, but they are one matrix here"
        )
    (a, other_a), (b, other_b) = found["lora_a"], found["lora_b"]
    if np.array_equal(a, other_a):
        return {"lora_a": a, "lora_b": np.concatenate([b, other_b])}
    zeros = np.zeros_like(b)
    blocks = np.block([[b, zeros], [zeros, other_b]])
    return {"lora_a": np.concatenate([a, other_a]), "lora_b": blocks}


def _read_alpha(file: GGUFFile, config: dict[str, Any], path: Path) -> float:
    """Return a LoRA's alpha.

    Raises:
        AdapterError: The file is not a LoRA, or is a LoRA for another architecture.
    """
    alpha = file.metadata.get("adapter.lora.alpha")
    is_lora = file.metadata.get("adapter.type") == "lora"
    if not is_lora or not isinstance(alpha, float) or not 0 < abs(alpha) < 1e9:
        raise AdapterError(
            f"{path} is not a LoRA: adapter.type or adapter.lora.alpha is missing or invalid (a"
            " model is given as --model)"
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
