"""Convert a GGUF file into a folder that mlx-lm loads: weights, config and tokenizer.

Each file is converted once, and the result is stored in the cache.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from ...device import on_gpu
from ...errors import ModelError, counted, join_problems
from ...files import cached_folder
from .architectures import expected_tensors, half_of
from .llama4 import as_config_json
from .lora_files import import_command
from .read_config import config_from_gguf, extra_layers
from .reader import GGUFFile, read_gguf
from .rope_scaling import ROPE_TENSORS
from .tensor_layout import in_other_layout
from .tokenizer import write_tokenizer

WeightFormat = Literal["float32", "stored", "4bit"]
"""All weights in float32; each in the MLX type closest to its stored type; all in 4 bits."""

_VERSION = 4  # the converter's version; a new number invalidates every cached conversion
_SHARD_BYTES = 2 << 30
_GROUP_SIZES = (64, 32)  # group sizes of MLX's quantization, in order of preference


def weight_format() -> WeightFormat:
    """Return the format that weights are converted to on this machine.

    On a GPU, weights keep their stored precision. On a CPU, only float32 is fast.
    """
    return "stored" if on_gpu() else "float32"


def convert_gguf(path: Path) -> Path:
    """Return the cached mlx-lm folder of a GGUF file; the first call converts the file.

    Raises:
        ModelError: The file can't be used.
        OutputError: The cache can't be written.
    """
    # Hash the whole file: a change in place may not affect its size, time and first bytes.
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
    except OSError as problem:
        raise ModelError(f"{path} can't be read: {problem.strerror}") from None

    key = f"{path.stem}-{digest[:32]}"
    return cached(key, lambda folder: write_folder(path, folder, weight_format()))


def describe_conversion(path: Path) -> str:
    """Return a line with the format that a GGUF file's matrices are converted to, and why.

    Raises:
        ModelError: The file can't be used.
    """
    # Consider only matrices, because other tensors are not quantized.
    file = read_gguf(path)
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) >= 2]
    types = sorted({tensor.type.name for tensor in matrices})

    if weight_format() == "float32":
        result = "float32, which is the fastest on a CPU"
    else:
        changes: list[str] = []
        for name in types:
            rule = _mlx_quantization(name)
            changes.append(f"{name} → {rule['bits']} bits" if rule else f"{name} stays")
        result = ", ".join(changes)
    note = "; its layer that predicts further tokens is left out" if extra_layers(file) else ""
    return (
        f"{path.name} was converted from GGUF ({', '.join(types)}): its matrices are {result}{note}"
    )


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """Return the cached folder of a converted model; call ``build`` if it is missing."""
    return cached_folder("models", f"{key}-{weight_format()}-v{_VERSION}", build)


def write_folder(path: Path, folder: Path, weights: WeightFormat) -> None:
    """Convert a GGUF file into an existing, empty folder.

    Args:
        path: The file.
        folder: Where model.safetensors, config.json and the tokenizer are written.
        weights: The format of the weights.

    Raises:
        ModelError: The file can't be used.
        OSError: The folder can't be written.
    """
    file = read_gguf(path)
    _check_is_model(file)
    try:
        config = config_from_gguf(file)
        check_tensors(file, config)
        config |= write_tokenizer(file.metadata, folder)
    except OSError:
        raise
    except ModelError as problem:
        raise ModelError(f"{path} can't be used: {problem}") from problem
    # A value has the wrong type, or the tokenizers library raised a plain Exception.
    except Exception as problem:
        reason = " ".join(str(problem).split())
        raise ModelError(
            f"{path} can't be used: its metadata is broken ({reason:.200})"
        ) from problem

    # Add the quantization to the config.
    if weights == "4bit":
        config["quantization"] = {"group_size": 64, "bits": 4, "mode": "affine"}
    elif weights == "stored":
        settings = _stored_quantization(file, config)
        if settings:
            config["quantization"] = settings
    (folder / "config.json").write_text(json.dumps(as_config_json(config), indent=2))

    dtypes = {"float32": mx.float32, "4bit": mx.bfloat16}
    dtype = dtypes[weights] if weights in dtypes else _stored_dtype(file)
    _write_weights(file, config, folder, dtype)


def _check_is_model(file: GGUFFile) -> None:
    """Check that a GGUF file holds a whole model, and not something that belongs to one.

    Raises:
        ModelError: It does not; the message says what the file is.
    """
    # Other types of files: adapters, and the parts of multimodal models.
    path, metadata = file.path, file.metadata
    kind = metadata.get("general.type", "model")
    if kind == "adapter":
        raise ModelError(
            f"{path} is a LoRA adapter, not a model: convert it with {import_command(path)}, and"
            " use the folder imported as an adapter"
        )
    if kind == "mmproj" or metadata.get("general.architecture") == "clip":
        raise ModelError(
            f"{path} is the vision part of a model: give the .gguf file of its text part"
        )
    if kind != "model":
        raise ModelError(f"{path} is a GGUF file of type {kind!r:.40}, not a model: give a model")

    causal = f"{metadata.get('general.architecture')}.attention.causal"
    if metadata.get(causal, True) is not True:
        raise ModelError(
            f"{path} is a model that reads texts in both directions ({causal} is"
            f" {metadata[causal]!r:.40}), as embedding models do: give a model that generates text"
        )

    # A large model may be split into several files.
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise ModelError(
            f"{path} is one of {parts} parts of a model: join them first, with llama.cpp's"
            " llama-gguf-split --merge FIRST_PART whole.gguf"
        )


def _mlx_quantization(type_name: str) -> dict[str, Any] | None:
    """Return MLX's quantization for a GGUF type; None for full precision.

    MXFP4 is the same in MLX. For other types, the affine quantization has as many bits as the GGUF
    type, but at least 4.
    """
    if type_name == "MXFP4":
        return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    digits = re.match(r"I?Q(\d)", type_name)
    bits = max(4, int(digits[1])) if digits else None
    return {"group_size": 64, "bits": bits, "mode": "affine"} if bits else None


def check_tensors(file: GGUFFile, config: dict[str, Any]) -> None:
    """Check that a file has exactly the tensors of its config, and a matching vocabulary.

    Raises:
        ModelError: A tensor is missing, unexpected or has a wrong shape, or the file has more
            tokens than embeddings.
    """
    expected = expected_tensors(config)
    problems = [f"tensor {name!r} is missing" for name in expected if name not in file.tensors]
    layers = config["num_hidden_layers"]
    left_out = tuple(f"blk.{layers + layer}." for layer in range(extra_layers(file)))
    for name, tensor in file.tensors.items():
        if name in expected and _essential(tensor.shape) != _essential(expected[name][1]):
            problems.append(f"tensor {name!r} is {tensor.shape}, not {expected[name][1]}")
        elif name not in expected and name not in ROPE_TENSORS and not name.startswith(left_out):
            problems.append(f"tensor {name!r} has no place in mlx-lm's model")

    # A token id without an embedding would read past the end of the embeddings.
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    if len(tokens) > config["vocab_size"]:
        embeddings = counted(config["vocab_size"], "embedding")
        problems.append(f"it has {counted(len(tokens), 'token')} for {embeddings}")
    if problems:
        raise ModelError(join_problems(problems, most=3))


def _essential(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without axes of size 1, which llama.cpp leaves out."""
    return tuple(size for size in shape if size > 1)


def _stored_quantization(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return config.json's ``quantization`` with the bits that each matrix has in the file.

    Return None if no matrix is quantized.
    """
    rules: dict[str, dict[str, Any] | None] = {}
    for name, (full_name, shape) in expected_tensors(config).items():
        target, _ = half_of(full_name)
        if len(shape) < 2 or not target.endswith(".weight"):
            continue
        rule = _mlx_quantization(file.tensors[name].type.name)
        if rule and shape[-1] % rule["group_size"]:
            rule["group_size"] = 32
        rules[target.removesuffix(".weight")] = rule

    # Use the most common bits as the default, and list the other layers as exceptions.
    used = [(rule["bits"], rule["mode"]) for rule in rules.values() if rule]
    if not used:
        return None
    ((common, _),) = Counter(used).most_common(1)
    by_default = next(rule for rule in rules.values() if rule and _kind(rule) == common)
    settings: dict[str, Any] = by_default | {"group_size": 32 if common[1] == "mxfp4" else 64}
    for layer, rule in rules.items():
        if rule is None:
            settings[layer] = False
        elif rule != {name: settings[name] for name in rule}:
            settings[layer] = rule
    return settings


def _kind(rule: dict[str, Any]) -> tuple[int, str]:
    return rule["bits"], rule["mode"]


def _stored_dtype(file: GGUFFile) -> mx.Dtype:
    """Return the most common type of a file's matrices.

    The result is bfloat16 if any tensor is quantized, or if no matrix has a plain type.
    Norms are converted to this type too. GGUF always stores norms in float32.
    """
    dtypes = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    plain: Counter[str] = Counter()
    for tensor in file.tensors.values():
        type_name = tensor.type.name
        if _mlx_quantization(type_name):
            return mx.bfloat16
        if len(tensor.shape) >= 2 and type_name in dtypes:
            plain[type_name] += 1

    # Choose the most common type.
    if not plain:
        return mx.bfloat16
    ((common, _),) = plain.most_common(1)
    return dtypes[common]


@dataclass
class _Shards:
    """Writes the weight files of a folder one after the other."""

    folder: Path
    tensors: dict[str, mx.array] = field(default_factory=dict[str, mx.array])  # not yet written
    file_of: dict[str, str] = field(default_factory=dict[str, str])  # tensor → file
    count: int = 0
    nbytes: int = 0  # total size of the tensors in all files

    def add(self, tensors: dict[str, mx.array], *, is_last: bool) -> None:
        """Add tensors, and write a file if it is full or if these tensors are the last."""
        mx.eval(tensors)
        self.tensors |= tensors
        size = sum(array.nbytes for array in self.tensors.values())
        if size > _SHARD_BYTES or is_last:
            self._write(is_single=is_last and self.count == 0)
            self.nbytes += size

    def _write(self, *, is_single: bool) -> None:
        self.count += 1
        name = "model.safetensors" if is_single else f"model-{self.count:05d}.safetensors"
        with (self.folder / name).open("wb") as file:
            mx.save_safetensors(file, self.tensors, metadata={"format": "mlx"})
        self.file_of |= dict.fromkeys(self.tensors, name)
        self.tensors = {}

    def write_index(self) -> None:
        """Write the index, unless there is only one file."""
        if self.count > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": self.file_of}
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2))


def _write_weights(file: GGUFFile, config: dict[str, Any], folder: Path, dtype: mx.Dtype) -> None:
    """Convert the tensors one at a time, so that only one shard is in memory."""
    shards = _Shards(folder)
    expected = expected_tensors(config)
    last = next(reversed(expected))
    first_half: np.ndarray | None = None
    for name, (full_name, shape) in expected.items():
        target, half = half_of(full_name)
        array = in_other_layout(file.read(name), name, config, to_gguf=False).reshape(shape)
        if half == 0:
            first_half = array
            continue
        if half == 1 and first_half is not None:
            array = np.concatenate([first_half, array])

        weight = mx.array(array)
        # The decay rates of a delta net need float32, which mlx-lm also keeps.
        own_dtype = mx.float32 if target.endswith("A_log") else dtype
        tensors = _quantized(target, weight.astype(own_dtype), config.get("quantization"))
        shards.add(tensors, is_last=name == last)
    shards.write_index()


def _quantized(name: str, weight: mx.array, settings: dict[str, Any] | None) -> dict[str, mx.array]:
    """Return the arrays that store a weight, quantized if it is a matrix and the settings say so.

    Groups have 64 columns, or 32 if the number of columns is not a multiple of 64.
    """
    path = name.removesuffix(".weight")
    rule = settings.get(path, settings) if settings else None
    if weight.ndim < 2 or not name.endswith(".weight") or not rule:
        return {name: weight}

    # The scales of MXFP4 have no biases.
    if rule.get("mode") == "mxfp4" and weight.shape[-1] % 32 == 0:
        arrays: Any = mx.quantize(weight, group_size=32, bits=4, mode="mxfp4")
        return {name: arrays[0], f"{path}.scales": arrays[1]}

    # MLX quantizes groups of columns, so a group size must divide the number of columns.
    fitting = [size for size in _GROUP_SIZES if weight.shape[-1] % size == 0]
    if not fitting:
        return {name: weight}
    packed, scales, biases = mx.quantize(weight, group_size=fitting[0], bits=rule["bits"])
    return {name: packed, f"{path}.scales": scales, f"{path}.biases": biases}
