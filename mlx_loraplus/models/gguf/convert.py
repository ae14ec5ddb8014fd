"""GGUF → a folder that mlx-lm loads: weights, config and tokenizer, converted once into the cache.

What differs between the two formats: llama.cpp stores Llama's query and key rows with the two
rotary halves of a head interleaved, and Gemma's norm weights with 1 added. Sources: the GGUF
specification; llama.cpp's convert_hf_to_gguf.py (``LlamaModel.permute``,
``Gemma3Model.norm_shift``) and src/llama-model.cpp for the constants a file does not hold.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from gguf import MODEL_ARCH, get_tensor_name_map
from mlx.utils import tree_flatten

from ...errors import ModelError, join_problems
from ...files import cached_folder
from ..skeleton import make_skeleton
from .reader import GGUFFile, read_gguf
from .tokenizer import write_tokenizer

WeightFormat = Literal["float32", "stored", "4bit"]
"""All in float32; each tensor as near to how the file stores it as MLX has it; all in 4 bits."""

_VERSION = 3  # of this converter; a new number makes every cached conversion stale
_SHARD_BYTES = 2 << 30

ARCHITECTURES = {"llama": "llama", "gemma3_text": "gemma3"}
"""The hub's model_type: llama.cpp's architecture."""
_LLAMA = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length", "rope_theta": "rope.freq_base",
}  # fmt: skip
NUMBERS = {
    "llama": _LLAMA,
    "gemma3": (
        _LLAMA
        | {
            "sliding_window": "attention.sliding_window",
            "rope_local_base_freq": "rope.freq_base_swa",
        }
    ),
}
"""Of each architecture the numbers in its config: the hub's names, and llama.cpp's."""
REALS = {"rms_norm_eps", "rope_theta", "rope_local_base_freq"}
"""Those of them that need not be whole."""


def weight_format() -> WeightFormat:
    """Return what weights are converted to: as they are stored on Metal; float32 on CPU, where all else is slow."""
    return "stored" if mx.metal.is_available() else "float32"


def convert_gguf(path: Path) -> Path:
    """Return the cached mlx-lm folder of a GGUF file, converting it at the first call.

    Raises: ModelError for a file that can't be used, OutputError when the cache can't be written.
    """
    try:
        with path.open(
            "rb"
        ) as file:  # all of it: a file changed in place may keep its size, its time and its head
            digest = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
    except OSError as problem:
        raise ModelError(f"{path} can't be read: {problem.strerror}") from None
    return cached(
        f"{path.stem}-{digest[:32]}", lambda folder: write_folder(path, folder, weight_format())
    )


def describe_conversion(path: Path) -> str:
    """Return one line on what the matrices of a GGUF file become, and why.

    Raises: ModelError for a file that can't be used.
    """
    types = sorted({t.type.name for t in read_gguf(path).tensors.values() if len(t.shape) == 2})
    if weight_format() == "float32":
        became = "float32, since this machine has no Metal, where float32 is the fastest"
    else:
        became = ", ".join(
            f"{name} → {_bits(name)} bits" if _bits(name) else f"{name} stays" for name in types
        )
    return f"{path.name} was converted from GGUF ({', '.join(types)}): its matrices are {became}"


def _bits(kind: str) -> int | None:
    """Return the bits of MLX's own quantization for one of GGUF's: as many, at least 4; None for full precision."""
    digits = re.match(r"I?Q(\d)", kind)
    return max(4, int(digits[1])) if digits else None


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """Return the cache's folder for a converted model, built if it is not there."""
    return cached_folder("models", f"{key}-{weight_format()}-v{_VERSION}", build)


def write_folder(path: Path, folder: Path, weights: WeightFormat) -> None:
    """Write model.safetensors, config.json and the tokenizer of a GGUF file into an existing, empty folder.

    Raises: ModelError for a file that can't be used, OSError where the folder can't be written.
    """
    file = read_gguf(path)
    try:
        config = read_config(file)
        _check_tensors(file, config)
        config |= write_tokenizer(file.metadata, folder)
    except OSError:
        raise
    except (
        Exception
    ) as problem:  # a value of another type than belongs there; tokenizers raises nothing narrower
        broken = f"its metadata is broken ({' '.join(str(problem).split()):.200})"
        raise ModelError(
            f"{path} can't be used: {problem if isinstance(problem, ModelError) else broken}"
        ) from problem
    if weights == "4bit":
        config["quantization"] = {"group_size": 64, "bits": 4, "mode": "affine"}
    if weights == "stored" and (settings := _stored_quantization(file, config)):
        config["quantization"] = settings
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    dtype = {"float32": mx.float32, "4bit": mx.bfloat16}.get(weights) or _stored_dtype(file)
    _write_weights(file, config, folder, dtype)


def read_config(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json of a GGUF file, in the hub's terms.

    Raises: ModelError for another architecture, missing or impossible values, and what mlx-lm could
    not reproduce.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in NUMBERS:
        raise ModelError(
            f"its architecture is {architecture!r:.40}; allowed are {', '.join(NUMBERS)}"
        )
    problems: list[str] = []

    def number(name: str, default: float | None = None, most: float = 1 << 24) -> Any:
        key = f"{architecture}.{NUMBERS[architecture].get(name, name)}"
        found = file.metadata.get(key, default)
        kind = int | float if name in REALS else int
        if isinstance(found, bool) or not isinstance(found, kind) or not 0 < found <= most:
            problems.append(
                f"{key} is {found!r:.40}, allowed is a number above 0 and up to {most:,}"
            )
            return 1
        return found

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head = 256 if architecture == "gemma3" else max(hidden // heads, 1)
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": head,
        "rope_theta": 1e4,
        "rope_local_base_freq": 1e4,
    }
    most = {
        "num_hidden_layers": len(file.tensors), "num_key_value_heads": heads, "rms_norm_eps": 1,
        "max_position_embeddings": 1 << 40, "rope_theta": 1e12, "rope_local_base_freq": 1e12,
    }  # fmt: skip
    config: dict[str, Any] = {"hidden_size": hidden, "num_attention_heads": heads}
    for name in [name for name in NUMBERS[architecture] if name not in config]:
        config[name] = number(name, defaults.get(name), most.get(name, 1 << 24))
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    if "token_embd.weight" in file.tensors:
        config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    else:
        problems.append("tensor 'token_embd.weight' is missing")
    if heads % config["num_key_value_heads"]:
        problems.append(f"{heads} heads can't share {config['num_key_value_heads']} key heads")
    head_sizes = {
        key: number(key, config["head_dim"])
        for key in ("attention.value_length", "rope.dimension_count")
    }
    if set(head_sizes.values()) != {config["head_dim"]}:
        problems.append(
            f"{head_sizes} differ from the head's size {config['head_dim']}, which mlx-lm can't do"
        )
    if file.metadata.get(f"{architecture}.expert_count"):
        problems.append("it is a mixture of experts, only dense models can be converted")
    config["rope_scaling"] = _rope_scaling(file, architecture, config, problems)

    if architecture == "llama":
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        config |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    else:
        if file.metadata.get("gemma3.final_logit_softcapping"):
            problems.append("it caps its logits, which mlx-lm's Gemma 3 does not")
        config |= {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        config |= {"hidden_activation": "gelu_pytorch_tanh"} | gemma_settings(config)
    if problems:
        raise ModelError(join_problems(problems))
    return config


def gemma_settings(config: dict[str, Any]) -> dict[str, int]:
    """Return what llama.cpp takes for granted: 27B (62 blocks) scales by its hidden size per head, others by head."""
    per_head = config["hidden_size"] // config["num_attention_heads"]
    scalar = per_head if config["num_hidden_layers"] == 62 else config["head_dim"]
    return {"query_pre_attn_scalar": scalar, "sliding_window_pattern": 6}


def _rope_scaling(
    file: GGUFFile, architecture: str, config: dict[str, Any], problems: list[str]
) -> dict[str, Any] | None:
    """Return the hub's ``rope_scaling``: none, linear, or the llama3 rule that ``rope_freqs.weight`` was made with."""
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = file.metadata.get(f"{architecture}.rope.scaling.factor", 1.0)
    if (
        kind not in ("none", "linear")
        or not isinstance(factor, int | float)
        or not 0 < factor < 1e6
    ):
        problems.append(
            f"its RoPE scaling is {kind!r:.40} by {factor!r:.40}, allowed are none and linear"
        )
        return None
    linear = (
        {"rope_type": "linear", "factor": float(factor)}
        if kind == "linear" and factor != 1
        else None
    )
    if "rope_freqs.weight" not in file.tensors:
        return linear
    divisors = file.read("rope_freqs.weight").reshape(-1)
    for original in (8192, 4096, 16384, 32768):
        scaling = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
        expected = llama3_divisors(config["head_dim"], config["rope_theta"], scaling)
        if (
            linear is None
            and expected.shape == divisors.shape
            and np.allclose(expected, divisors, rtol=1e-3)
        ):
            return scaling
    problems.append("its RoPE frequencies (rope_freqs.weight) follow no rule that mlx-lm knows")
    return None


def llama3_divisors(head_dim: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """Return what Llama 3.1 divides each frequency by: 1 for short waves, ``factor`` for long ones, smooth between.

    Source: ``Llama3RoPE`` of mlx-lm, and Meta's ``apply_scaling``.
    """
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # positions per turn
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip(
        (scaling["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1
    )
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)  # (head_dim / 2,)


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return GGUF name → (mlx-lm name, shape) for every tensor a model of this config has."""
    architecture = ARCHITECTURES[config["model_type"]]
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    arrays: Any = tree_flatten(make_skeleton(config | {"quantization": None}).parameters())
    return {
        str(names.get_name(name, try_suffixes=(".weight",))): (name, array.shape)
        for name, array in arrays
    }


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


def _stored_quantization(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return config.json's ``quantization``, each matrix in the bits that the file has; None where it has no such."""
    widths: dict[str, int | None] = {}
    columns: dict[str, int] = {}
    for name, (target, shape) in expected_tensors(config).items():
        if len(shape) == 2:
            widths[target.removesuffix(".weight")] = _bits(file.tensors[name].type.name)
            columns[target.removesuffix(".weight")] = shape[-1]
    if not any(widths.values()):
        return None

    # The commonest width is the rule, and every other layer an exception
    common = Counter(width for width in widths.values() if width).most_common(1)[0][0]
    rule = {"group_size": 64, "bits": common, "mode": "affine"}
    settings: dict[str, Any] = dict(rule)
    for path, width in widths.items():
        if width is None:
            settings[path] = False
        elif width != common:
            settings[path] = rule | {
                "bits": width,
                "group_size": 64 if columns[path] % 64 == 0 else 32,
            }
    return settings


def _stored_dtype(file: GGUFFile) -> mx.Dtype:
    """Return the type of the file's plain matrices, or bfloat16; norms, which GGUF always has in float32, take it."""
    types = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    plain = Counter(
        t.type.name for t in file.tensors.values() if len(t.shape) == 2 and t.type.name in types
    )
    quantized = any(_bits(tensor.type.name) for tensor in file.tensors.values())
    return mx.bfloat16 if quantized or not plain else types[plain.most_common(1)[0][0]]


def _write_weights(file: GGUFFile, config: dict[str, Any], folder: Path, dtype: mx.Dtype) -> None:
    """Convert tensor by tensor, and write a file whenever the next shard is full."""
    shard: dict[str, mx.array] = {}
    places: dict[str, str] = {}
    total = 0
    expected = expected_tensors(config)
    last = next(reversed(expected))
    for name, (target, _) in expected.items():
        weight = mx.array(relaid(file.read(name), name, config, to_gguf=False))
        shard |= _quantized(target, weight.astype(dtype), config.get("quantization"))
        mx.eval(shard)
        size = sum(array.nbytes for array in shard.values())
        if size > _SHARD_BYTES or name == last:
            number = len(set(places.values())) + 1
            file_name = (
                f"model-{number:05d}.safetensors" if places or name != last else "model.safetensors"
            )
            with (folder / file_name).open("wb") as written:
                mx.save_safetensors(written, shard, metadata={"format": "mlx"})
            places |= dict.fromkeys(shard, file_name)
            total, shard = total + size, {}
    if len(set(places.values())) == 1:
        return
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def relaid(weight: np.ndarray, name: str, config: dict[str, Any], *, to_gguf: bool) -> np.ndarray:
    """Do to a tensor what llama.cpp's converter does, or undo it."""
    if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
        return weight + 1 if to_gguf else weight - 1
    if config["model_type"] == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        half = (
            config["head_dim"] // 2
        )  # its row half · i + j of a head is llama.cpp's row 2 j + i, for i of 0 and 1
        rows = weight.reshape(-1, *((2, half) if to_gguf else (half, 2)), weight.shape[-1])
        return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)
    return weight


def _quantized(name: str, weight: mx.array, settings: dict[str, Any] | None) -> dict[str, mx.array]:
    """Quantize a matrix as the settings say, in groups of 64 (32 where 64 does not divide the row)."""
    path = name.removesuffix(".weight")
    group = next(
        (size for size in (64, 32) if weight.ndim == 2 and weight.shape[-1] % size == 0), None
    )
    own = settings.get(path, settings) if settings else None
    if group is None or not own:
        return {name: weight}
    packed, scales, biases = mx.quantize(weight, group_size=group, bits=own["bits"])
    return {name: packed, f"{path}.scales": scales, f"{path}.biases": biases}
