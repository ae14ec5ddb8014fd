"""Convert a GGUF file into a folder that mlx-lm loads: weights, config and tokenizer.

Each file is converted once, into the cache.
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

from ...errors import ModelError, join_problems
from ...files import cached_folder
from .architectures import config_from_gguf, expected_tensors, relaid
from .reader import GGUFFile, read_gguf
from .tokenizer import write_tokenizer

WeightFormat = Literal["float32", "stored", "4bit"]
"""All weights in float32; each as close to its stored type as MLX allows; all in 4 bits."""

_VERSION = 3  # of this converter; a new number makes every cached conversion stale
_SHARD_BYTES = 2 << 30
_GROUP_SIZES = (64, 32)  # of MLX's quantization, the preferred one first


def weight_format() -> WeightFormat:
    """Return the format that weights are converted to on this machine.

    On Metal they stay as they are stored. On CPU only float32 is fast.
    """
    return "stored" if mx.metal.is_available() else "float32"


def convert_gguf(path: Path) -> Path:
    """Return the cached mlx-lm folder of a GGUF file; the first call converts it.

    Raises:
        ModelError: The file can't be used.
        OutputError: The cache can't be written.
    """
    # Hash the whole file: one that was changed in place may keep its size, time and first bytes
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
    except OSError as problem:
        raise ModelError(f"{path} can't be read: {problem.strerror}") from None

    key = f"{path.stem}-{digest[:32]}"
    return cached(key, lambda folder: write_folder(path, folder, weight_format()))


def describe_conversion(path: Path) -> str:
    """Return one line that says what the matrices of a GGUF file are converted to, and why.

    Raises:
        ModelError: The file can't be used.
    """
    # Only matrices are quantized
    matrices = [tensor for tensor in read_gguf(path).tensors.values() if len(tensor.shape) == 2]
    types = sorted({tensor.type.name for tensor in matrices})

    if weight_format() == "float32":
        result = "float32, since this machine has no Metal, where float32 is the fastest"
    else:
        changes: list[str] = []
        for name in types:
            bits = _bits(name)
            changes.append(f"{name} → {bits} bits" if bits else f"{name} stays")
        result = ", ".join(changes)
    return f"{path.name} was converted from GGUF ({', '.join(types)}): its matrices are {result}"


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """Return the cache's folder for a converted model; build it if it is missing."""
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
    # A value of the wrong type; tokenizers has no narrower class for its errors
    except Exception as problem:
        reason = " ".join(str(problem).split())
        raise ModelError(
            f"{path} can't be used: its metadata is broken ({reason:.200})"
        ) from problem

    # The config says how its matrices are quantized
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
    """Return the bits of MLX's quantization for a type of GGUF; None for full precision.

    MLX's affine quantization gets as many bits as the type has, but at least 4.
    """
    digits = re.match(r"I?Q(\d)", type_name)
    return max(4, int(digits[1])) if digits else None


def _check_tensors(file: GGUFFile, config: dict[str, Any]) -> None:
    """Check that a file has exactly the tensors of its config, and not too many tokens.

    Raises:
        ModelError: It does not.
    """
    expected = expected_tensors(config)
    problems = [f"tensor {name!r} is missing" for name in expected if name not in file.tensors]
    for name, tensor in file.tensors.items():
        if name in expected and tensor.shape != expected[name][1]:
            problems.append(f"tensor {name!r} is {tensor.shape}, not {expected[name][1]}")
        elif name not in expected and name != "rope_freqs.weight":
            problems.append(f"tensor {name!r} has no place in mlx-lm's model")

    # An id above the last embedding would read past their end
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    if len(tokens) > config["vocab_size"]:
        problems.append(f"it has {len(tokens)} tokens for {config['vocab_size']} embeddings")
    if problems:
        raise ModelError(join_problems(problems, most=3))


def _stored_quantization(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return config.json's ``quantization`` that gives each matrix the bits it has in the file.

    It is None if no matrix is quantized.
    """
    widths: dict[str, int | None] = {}
    columns: dict[str, int] = {}
    for name, (target, shape) in expected_tensors(config).items():
        if len(shape) == 2:
            layer = target.removesuffix(".weight")
            widths[layer] = _bits(file.tensors[name].type.name)
            columns[layer] = shape[-1]
    quantized = [width for width in widths.values() if width]
    if not quantized:
        return None

    # The most common width is the rule, and every other layer an exception
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
    """Return the type of a file's plain matrices; bfloat16 if it has none or quantizes some.

    Norms take this type too. GGUF always stores them in float32.
    """
    dtypes = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    plain: Counter[str] = Counter()
    for tensor in file.tensors.values():
        type_name = tensor.type.name
        if _bits(type_name):
            return mx.bfloat16
        if len(tensor.shape) == 2 and type_name in dtypes:
            plain[type_name] += 1

    # The most common type wins
    if not plain:
        return mx.bfloat16
    ((common, _),) = plain.most_common(1)
    return dtypes[common]


@dataclass
class _Shards:
    """The weight files of a folder, written one after the other."""

    folder: Path
    tensors: dict[str, mx.array] = field(default_factory=dict[str, mx.array])  # not yet written
    file_of: dict[str, str] = field(default_factory=dict[str, str])  # tensor → file
    count: int = 0
    nbytes: int = 0  # in all files

    def add(self, tensors: dict[str, mx.array], *, is_last: bool) -> None:
        """Add tensors, and write a file if that makes it full."""
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
        """Write the index, which a single file does not need."""
        if self.count > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": self.file_of}
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2))


def _write_weights(file: GGUFFile, config: dict[str, Any], folder: Path, dtype: mx.Dtype) -> None:
    """Convert tensor by tensor, so that only one shard is in memory."""
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

    Groups have 64 columns, or 32 if 64 does not divide the row.
    """
    path = name.removesuffix(".weight")
    own_settings = settings.get(path, settings) if settings else None
    if weight.ndim != 2 or not own_settings:
        return {name: weight}

    # MLX quantizes groups of columns
    fitting = [size for size in _GROUP_SIZES if weight.shape[-1] % size == 0]
    if not fitting:
        return {name: weight}
    packed, scales, biases = mx.quantize(weight, group_size=fitting[0], bits=own_settings["bits"])
    return {name: packed, f"{path}.scales": scales, f"{path}.biases": biases}
