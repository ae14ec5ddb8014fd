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

from ...device import on_gpu
from ...errors import ModelError, join_problems
from ...files import cached_folder
from .architectures import expected_tensors, relaid
from .read_config import config_from_gguf
from .reader import GGUFFile, read_gguf
from .rope_scaling import ROPE_TENSORS
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
    # Hash the whole file: a change in place may not affect its size, time and first bytes
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
    # Consider only matrices, because other tensors are not quantized
    matrices = [tensor for tensor in read_gguf(path).tensors.values() if len(tensor.shape) >= 2]
    types = sorted({tensor.type.name for tensor in matrices})

    if weight_format() == "float32":
        result = "float32, which is the fastest on a CPU"
    else:
        changes: list[str] = []
        for name in types:
            bits = _bits(name)
            changes.append(f"{name} → {bits} bits" if bits else f"{name} stays")
        result = ", ".join(changes)
    return f"{path.name} was converted from GGUF ({', '.join(types)}): its matrices are {result}"


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
    try:
        config = config_from_gguf(file)
        _check_tensors(file, config)
        config |= write_tokenizer(file.metadata, folder)
    except OSError:
        raise
    except ModelError as problem:
        raise ModelError(f"{path} can't be used: {problem}") from problem
    # A value has the wrong type, or the tokenizers library raised a plain Exception
    except Exception as problem:
        reason = " ".join(str(problem).split())
        raise ModelError(
            f"{path} can't be used: its metadata is broken ({reason:.200})"
        ) from problem

    # Add the quantization to the config
    if weights == "4bit":
        config["quantization"] = {"group_size": 64, "bits": 4, "mode": "affine"}
    elif weights == "stored":
        settings = _stored_quantization(file, config)
        if settings:
            config["quantization"] = settings
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    dtypes = {"float32": mx.float32, "4bit": mx.bfloat16}
    dtype = dtypes[weights] if weights in dtypes else _stored_dtype(file)
    _write_weights(file, config, folder, dtype)


def _bits(type_name: str) -> int | None:
    """Return the bits of MLX's quantization for a GGUF type; None for full precision.

    The affine quantization of MLX uses as many bits as the GGUF type, but at least 4.
    """
    digits = re.match(r"I?Q(\d)", type_name)
    return max(4, int(digits[1])) if digits else None


def _check_tensors(file: GGUFFile, config: dict[str, Any]) -> None:
    """Check that a file has exactly the tensors of its config, and a matching vocabulary.

    Raises:
        ModelError: A tensor is missing, unexpected or has a wrong shape, or the file has more
            tokens than embeddings.
    """
    expected = expected_tensors(config)
    problems = [f"tensor {name!r} is missing" for name in expected if name not in file.tensors]
    for name, tensor in file.tensors.items():
        if name in expected and tensor.shape != expected[name][1]:
            problems.append(f"tensor {name!r} is {tensor.shape}, not {expected[name][1]}")
        elif name not in expected and name not in ROPE_TENSORS:
            problems.append(f"tensor {name!r} has no place in mlx-lm's model")

    # A token id without an embedding would read past the end of the embeddings
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    if len(tokens) > config["vocab_size"]:
        problems.append(f"it has {len(tokens)} tokens for {config['vocab_size']} embeddings")
    if problems:
        raise ModelError(join_problems(problems, most=3))


def _stored_quantization(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return config.json's ``quantization`` with the bits that each matrix has in the file.

    Return None if no matrix is quantized.
    """
    widths: dict[str, int | None] = {}
    columns: dict[str, int] = {}
    for name, (target, shape) in expected_tensors(config).items():
        if len(shape) >= 2:
            layer = target.removesuffix(".weight")
            widths[layer] = _bits(file.tensors[name].type.name)
            columns[layer] = shape[-1]
    quantized = [width for width in widths.values() if width]
    if not quantized:
        return None

    # Use the most common width as the default, and list the other layers as exceptions
    ((common, _),) = Counter(quantized).most_common(1)
    rule = {"group_size": 64, "bits": common, "mode": "affine"}
    settings: dict[str, Any] = dict(rule)
    for layer, width in widths.items():
        if width is None:
            settings[layer] = False
        elif width != common:
            group_size = 64 if columns[layer] % 64 == 0 else 32
            settings[layer] = rule | {"bits": width, "group_size": group_size}
    return settings


def _stored_dtype(file: GGUFFile) -> mx.Dtype:
    """Return the most common type of a file's matrices.

    The result is bfloat16 if any tensor is quantized, or if no matrix has a plain type.
    Norms are converted to this type too. GGUF always stores norms in float32.
    """
    dtypes = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    plain: Counter[str] = Counter()
    for tensor in file.tensors.values():
        type_name = tensor.type.name
        if _bits(type_name):
            return mx.bfloat16
        if len(tensor.shape) >= 2 and type_name in dtypes:
            plain[type_name] += 1

    # Choose the most common type
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
    for name, (target, _) in expected.items():
        weight = mx.array(relaid(file.read(name), name, config, to_gguf=False))
        tensors = _quantized(target, weight.astype(dtype), config.get("quantization"))
        shards.add(tensors, is_last=name == last)
    shards.write_index()


def _quantized(name: str, weight: mx.array, settings: dict[str, Any] | None) -> dict[str, mx.array]:
    """Return the arrays that store a weight, quantized if it is a matrix and the settings say so.

    Groups have 64 columns, or 32 if the number of columns is not a multiple of 64.
    """
    path = name.removesuffix(".weight")
    own_settings = settings.get(path, settings) if settings else None
    if weight.ndim < 2 or not own_settings:
        return {name: weight}

    # MLX quantizes groups of columns, so a group size must divide the number of columns
    fitting = [size for size in _GROUP_SIZES if weight.shape[-1] % size == 0]
    if not fitting:
        return {name: weight}
    packed, scales, biases = mx.quantize(weight, group_size=fitting[0], bits=own_settings["bits"])
    return {name: packed, f"{path}.scales": scales, f"{path}.biases": biases}
