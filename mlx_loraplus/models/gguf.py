"""GGUF → a folder that mlx-lm loads: weights, config and tokenizer, converted once into the cache.

What differs between the two formats: llama.cpp stores Llama's query and key rows with the two rotary halves of a head
interleaved, and Gemma's norm weights with 1 added. Sources: the GGUF specification; llama.cpp's convert_hf_to_gguf.py
(``LlamaModel.permute``, ``Gemma3Model.norm_shift``) and src/llama-model.cpp for the constants a file does not hold.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from gguf import MODEL_ARCH, get_tensor_name_map
from mlx.utils import tree_flatten

from ..errors import ModelError, OutputError, join_problems
from ..places import cached_folder
from .facts import make_skeleton
from .gguf_reader import GGUFFile, read_gguf
from .gguf_tokenizer import write_tokenizer

WeightFormat = Literal["float32", "4bit"]

_VERSION = 2  # of this converter; a new number makes every cached conversion stale
_SHARD_BYTES = 2 << 30

ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "gemma3": MODEL_ARCH.GEMMA3}


def weight_format() -> WeightFormat:
    """Return what weights are converted to: 4-bit on Metal; float32 on CPU, where everything else is slow."""
    return "4bit" if mx.metal.is_available() else "float32"


def convert_gguf(path: Path) -> Path:
    """Return the cached mlx-lm folder of a GGUF file, converting it at the first call.

    Raises: ModelError for a file that can't be used, OutputError when the cache can't be written.
    """
    try:
        stat = path.stat()
        with path.open("rb") as file:
            head = file.read(1 << 20)  # with size and time, enough to tell one file from another
    except OSError as problem:
        raise ModelError(f"{path} can't be read: {problem.strerror}") from None
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode() + head).hexdigest()
    return cached(f"{path.stem}-{digest[:16]}", lambda folder: write_folder(path, folder, weight_format()))


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """Return the cache's folder for a converted model, built if it is not there."""
    return cached_folder("models", f"{key}-{weight_format()}-v{_VERSION}", build)


def write_folder(path: Path, folder: Path, weights: WeightFormat) -> None:
    """Write model.safetensors, config.json and the tokenizer of a GGUF file into an existing, empty folder.

    Raises: ModelError for a file that can't be used, OutputError when the disk is too full.
    """
    file = read_gguf(path)
    try:
        config = read_config(file)
        _check_tensors(file, config)
        config |= write_tokenizer(file.metadata, folder)
    except ModelError as problem:
        raise ModelError(f"{path} can't be used: {problem}") from None
    if weights == "4bit":
        config["quantization"] = {"group_size": 64, "bits": 4, "mode": "affine"}
    needed = sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values()) * (4 if weights == "float32" else 1)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder.parent} has {free >> 20} MB free, {path.name} needs {needed >> 20} MB; free some space"
        )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_weights(file, config, folder)


def read_config(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json of a GGUF file, in the hub's terms.

    Raises: ModelError for another architecture, missing or impossible values, and what mlx-lm could not reproduce.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(f"its architecture is {architecture!r}; allowed are {', '.join(ARCHITECTURES)}")
    problems: list[str] = []

    def value(key: str, default: int | float | None, kind: type = int, most: float = 1 << 24) -> Any:
        found = file.metadata.get(f"{architecture}.{key}", default)
        if isinstance(found, bool) or not isinstance(found, int | kind) or not 0 < found <= most:
            problems.append(f"{architecture}.{key} is {_short(found)}, allowed is a number above 0 and up to {most:,}")
            return 1
        return found

    heads = value("attention.head_count", None)
    hidden = value("embedding_length", None)
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": value("block_count", None, most=len(file.tensors)),
        "intermediate_size": value("feed_forward_length", None),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads, most=heads),
        "head_dim": value("attention.key_length", 256 if architecture == "gemma3" else max(hidden // heads, 1)),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon", None, float, 1),
        "max_position_embeddings": value("context_length", None, most=1 << 40),
        "rope_theta": value("rope.freq_base", 10_000.0, float, 1e12),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if "token_embd.weight" in file.tensors:
        config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    else:
        problems.append("tensor 'token_embd.weight' is missing")
    if heads % config["num_key_value_heads"]:
        problems.append(f"{heads} heads can't share {config['num_key_value_heads']} key heads")
    head_sizes = {key: value(key, config["head_dim"]) for key in ("attention.value_length", "rope.dimension_count")}
    if set(head_sizes.values()) != {config["head_dim"]}:
        problems.append(f"{head_sizes} differ from the head's size {config['head_dim']}, which mlx-lm can't do")
    if file.metadata.get(f"{architecture}.expert_count"):
        problems.append("it is a mixture of experts, only dense models can be converted")
    config["rope_scaling"] = _rope_scaling(file, architecture, config, problems)

    if architecture == "llama":
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        config |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    else:
        if file.metadata.get("gemma3.final_logit_softcapping"):
            problems.append("it caps its logits, which mlx-lm's Gemma 3 does not")
        # llama.cpp: the 27B (62 blocks) scales by its hidden size per head, all others by the head's size
        scalar = hidden // heads if config["num_hidden_layers"] == 62 else config["head_dim"]
        config |= {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        config |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar}
        config |= {"sliding_window": value("attention.sliding_window", None), "sliding_window_pattern": 6}
        config["rope_local_base_freq"] = value("rope.freq_base_swa", 10_000.0, float, 1e12)
    if problems:
        raise ModelError(join_problems(problems))
    return config


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _rope_scaling(
    file: GGUFFile, architecture: str, config: dict[str, Any], problems: list[str]
) -> dict[str, Any] | None:
    """Return the hub's ``rope_scaling``: none, linear, or the llama3 rule that ``rope_freqs.weight`` was made with."""
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = file.metadata.get(f"{architecture}.rope.scaling.factor", 1.0)
    if kind not in ("none", "linear") or not isinstance(factor, int | float) or not 0 < factor < 1e6:
        problems.append(f"its RoPE scaling is {_short(kind)} by {_short(factor)}, allowed are none and linear")
        return None
    linear = {"rope_type": "linear", "factor": float(factor)} if kind == "linear" and factor != 1 else None
    if "rope_freqs.weight" not in file.tensors:
        return linear
    divisors = file.read("rope_freqs.weight").reshape(-1)
    for original in (8192, 4096, 16384, 32768):
        scaling = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
        expected = llama3_divisors(config["head_dim"], config["rope_theta"], scaling)
        if linear is None and expected.shape == divisors.shape and np.allclose(expected, divisors, rtol=1e-3):
            return scaling
    problems.append("its RoPE frequencies (rope_freqs.weight) follow no rule that mlx-lm knows")
    return None


def llama3_divisors(head_dim: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """Return what Llama 3.1 divides each frequency by: 1 for short waves, ``factor`` for long ones, smooth between.

    Source: ``Llama3RoPE`` of mlx-lm, and Meta's ``apply_scaling``.
    """
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # positions per turn
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)  # (head_dim / 2,)


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return GGUF name → (mlx-lm name, shape) for every tensor a model of this config has."""
    architecture = ARCHITECTURES["llama" if config["model_type"] == "llama" else "gemma3"]
    names = get_tensor_name_map(architecture, config["num_hidden_layers"])
    arrays: Any = tree_flatten(make_skeleton(config | {"quantization": None}).parameters())
    return {str(names.get_name(name, try_suffixes=(".weight",))): (name, array.shape) for name, array in arrays}


def _check_tensors(file: GGUFFile, config: dict[str, Any]) -> None:
    """Raise ModelError unless the file has exactly the tensors its config asks for, and a token for every id."""
    expected = expected_tensors(config)
    problems = [f"tensor {name!r} is missing" for name in expected if name not in file.tensors]
    for name, tensor in file.tensors.items():
        if name in expected and tensor.shape != expected[name][1]:
            problems.append(f"tensor {name!r} is {tensor.shape}, not {expected[name][1]}")
        elif name not in expected and name != "rope_freqs.weight":
            problems.append(f"tensor {name!r} has no place in mlx-lm's model")
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    if len(tokens) > config["vocab_size"]:
        problems.append(f"it has {len(tokens)} tokens for {config['vocab_size']} embeddings")
    if problems:
        raise ModelError(join_problems(problems, most=3))


def _write_weights(file: GGUFFile, config: dict[str, Any], folder: Path) -> None:
    """Convert tensor by tensor, and write a file whenever the next shard is full."""
    shard: dict[str, mx.array] = {}
    places: dict[str, str] = {}
    total = 0
    expected = expected_tensors(config)
    last = next(reversed(expected))
    for name, (target, _) in expected.items():
        weight = mx.array(in_hub_layout(file.read(name), name, config))
        shard |= _quantized(target, weight) if "quantization" in config else {target: weight}
        mx.eval(shard)
        size = sum(array.nbytes for array in shard.values())
        if size > _SHARD_BYTES or name == last:
            number = len(set(places.values())) + 1
            file_name = f"model-{number:05d}.safetensors" if places or name != last else "model.safetensors"
            _save(folder / file_name, shard)
            places |= dict.fromkeys(shard, file_name)
            total, shard = total + size, {}
    if len(set(places.values())) == 1:
        return
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _save(path: Path, weights: dict[str, mx.array]) -> None:
    try:
        mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    except RuntimeError as problem:  # mlx tells a full disk so
        reason = str(problem).rstrip(".")
        raise OutputError(f"{path} can't be written: {reason}; free some space or set MLX_LORAPLUS_CACHE") from None


def in_hub_layout(weight: np.ndarray, name: str, config: dict[str, Any]) -> np.ndarray:
    """Undo what llama.cpp's converter did to a tensor."""
    if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
        return weight - 1
    if config["model_type"] == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        # row 2i + half of a head → row half · head_dim/2 + i
        pairs = weight.reshape(-1, config["head_dim"] // 2, 2, weight.shape[-1])  # (heads, head_dim / 2, 2, hidden)
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
    return weight


def in_gguf_layout(weight: np.ndarray, name: str, config: dict[str, Any]) -> np.ndarray:
    """Do what llama.cpp's converter does to a tensor, the inverse of ``in_hub_layout``."""
    if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
        return weight + 1
    if config["model_type"] == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        halves = weight.reshape(-1, 2, config["head_dim"] // 2, weight.shape[-1])  # (heads, 2, head_dim / 2, columns)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
    return weight


def _quantized(name: str, weight: mx.array) -> dict[str, mx.array]:
    """Quantize a matrix to 4 bits in groups of 64 (32 where 64 does not divide the row); keep the rest in bfloat16."""
    group = next((size for size in (64, 32) if weight.ndim == 2 and weight.shape[-1] % size == 0), None)
    weight = weight.astype(mx.bfloat16)
    if group is None:
        return {name: weight}
    path = name.removesuffix(".weight")
    packed, scales, biases = mx.quantize(weight, group_size=group, bits=4)
    return {name: packed, f"{path}.scales": scales, f"{path}.biases": biases}
