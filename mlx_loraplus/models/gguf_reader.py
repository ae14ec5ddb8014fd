"""Read a GGUF file's header and tensors, trusting nothing in it.

Every count, length and offset is checked against the file's size before it is used, so a truncated or hostile file is
one ModelError and never a hang. ``gguf.GGUFReader`` trusts them, and takes 16 s and 690 MB for the 262,144 strings of
Gemma's vocabulary, where this takes 0.3 s and 30 MB.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from ..errors import ModelError

# What gguf.quants can turn into float32, less the rare ones
READABLE_TYPES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()  # noqa: SIM905

_SCALARS: dict[int, str] = {  # struct's and numpy's layouts
    GGUFValueType.UINT8: "<B", GGUFValueType.UINT16: "<H", GGUFValueType.UINT32: "<I", GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT8: "<b", GGUFValueType.INT16: "<h", GGUFValueType.INT32: "<i", GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f", GGUFValueType.FLOAT64: "<d", GGUFValueType.BOOL: "<?",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in its file."""

    shape: tuple[int, ...]  # row-major, so the reverse of the file's order
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file's metadata (arrays of numbers as numpy arrays, of strings as lists) and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as float32.

        Raises: ModelError when a value is not a finite number.
        """
        tensor = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, tensor.nbytes, offset=tensor.offset)
        block, block_bytes = GGML_QUANT_SIZES[tensor.type]
        rows = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * block_bytes)
        with np.errstate(all="ignore"):
            values = dequantize(rows, tensor.type).reshape(tensor.shape)
        if not np.isfinite(values).all():
            raise ModelError(f"{self.path} is broken: tensor {name!r} holds values that are not numbers; get it again")
        return values


class _BadBytesError(Exception):
    """What is wrong with the bytes."""


class _Cursor:
    """Bytes read in order, never past their end."""

    def __init__(self, buffer: mmap.mmap):
        self.buffer = buffer
        self.size = len(buffer)
        self.at = 0

    def take(self, count: int, what: str) -> int:
        """Move past ``count`` bytes and return where they start."""
        start = self.at
        if count > self.size - start:
            raise _BadBytesError(f"{what} needs {count} bytes at byte {start}, and the file ends at {self.size}")
        self.at += count
        return start

    def number(self, layout: str, what: str) -> Any:
        start = self.take(struct.calcsize(layout), what)
        return struct.unpack_from(layout, self.buffer, start)[0]

    def string(self, what: str) -> str:
        length = self.number("<Q", what)
        start = self.take(length, what)
        try:
            return self.buffer[start : start + length].decode()
        except UnicodeDecodeError:
            raise _BadBytesError(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string(what)
        if kind == GGUFValueType.ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise _BadBytesError(f"{what} has the unknown type {kind}")
        return self.number(_SCALARS[kind], what)

    def array(self, what: str) -> np.ndarray | list[str]:
        kind, count = self.number("<I", what), self.number("<Q", what)
        if kind == GGUFValueType.STRING:
            if 8 * count > self.size - self.at:  # each string has a length of 8 bytes
                raise _BadBytesError(f"{what} says it has {count} strings, more than the file can hold")
            return [self.string(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise _BadBytesError(f"{what} is an array of the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(count * dtype.itemsize, what)
        return np.frombuffer(self.buffer[start : self.at], dtype)


def read_gguf(path: Path) -> GGUFFile:
    """Read a GGUF file's header.

    Raises: ModelError when it is not a whole, well-formed, little-endian GGUF file of version 2 or 3.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            metadata, tensors = _parse(_Cursor(buffer))
    except _BadBytesError as problem:
        raise ModelError(f"{path} is not a whole GGUF file: {problem}; get it again") from None
    except (OSError, ValueError) as problem:  # mmap refuses an empty file with ValueError
        raise ModelError(f"{path} can't be read as a GGUF file: {problem}") from None
    return GGUFFile(path, metadata, tensors)


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    start = cursor.take(4, "the magic number")
    if cursor.buffer[start : cursor.at] != b"GGUF":
        raise _BadBytesError(f"it starts with {cursor.buffer[:4]!r}, not b'GGUF'")
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        raise _BadBytesError(f"its version is {version}, allowed are 2 and 3 (little-endian)")
    tensor_count, pair_count = cursor.number("<Q", "the tensor count"), cursor.number("<Q", "the metadata count")

    metadata: dict[str, Any] = {}
    for index in range(pair_count):
        key = cursor.string(f"metadata key {index}")
        label = repr(key[:64])  # a broken file's keys are as long as they like
        metadata[key] = cursor.value(cursor.number("<I", label), label)

    headers = [_tensor_header(cursor, index) for index in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _BadBytesError(f"general.alignment is {alignment!r}, allowed are powers of two")
    data_start = math.ceil(cursor.at / alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in headers:
        tensor = _place(name, shape, kind, data_start + offset)
        if tensor.offset + tensor.nbytes > cursor.size:
            raise _BadBytesError(
                f"tensor {name!r} ends at byte {tensor.offset + tensor.nbytes}, the file at {cursor.size}"
            )
        if name in tensors:
            raise _BadBytesError(f"tensor {name!r} is there twice")
        tensors[name] = tensor
    return metadata, tensors


def _tensor_header(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(f"the name of tensor {index}")
    if len(name) > 64:
        raise _BadBytesError(f"the name of tensor {index} has {len(name)} characters, allowed are 64")
    dims = cursor.number("<I", repr(name))
    if not 1 <= dims <= 4:
        raise _BadBytesError(f"tensor {name!r} has {dims} dimensions, allowed are 1 to 4")
    shape = tuple(cursor.number("<Q", repr(name)) for _ in range(dims))
    return name, shape[::-1], cursor.number("<I", repr(name)), cursor.number("<Q", repr(name))


def _place(name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
    label = next((member.name for member in GGMLQuantizationType if member == kind), str(kind))
    if label not in READABLE_TYPES:
        raise _BadBytesError(f"tensor {name!r} has the type {label}, allowed are {', '.join(READABLE_TYPES)}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[label]]
    if not all(shape) or shape[-1] % block:
        raise _BadBytesError(f"tensor {name!r} has the shape {shape}, whose last axis must be a multiple of {block}")
    return Tensor(shape, GGMLQuantizationType[label], offset, math.prod(shape) // block * block_bytes)
