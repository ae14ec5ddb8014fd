"""Read the header and the tensors of an untrusted GGUF file.

Every count, length and offset is checked against the file's size before it is used, so that a
truncated or hostile file raises a ModelError and never hangs. ``gguf.GGUFReader`` does not check
them. It also takes 16 s and 690 MB for the 262,144 strings of Gemma's vocabulary; this reader takes
0.3 s and 30 MB.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions
2 and 3).
"""

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quant_shape_to_byte_shape

from ...errors import ModelError, counted
from ...files import LFS_ADVICE, is_lfs_pointer

READABLE_TYPES = [
    *("F32", "F16", "BF16"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
]
"""The tensor types that can be read: those that gguf.quants dequantizes, except rare ones."""

_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT8: "<b",
    GGUFValueType.INT16: "<h",
    GGUFValueType.INT32: "<i",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
"""Type of a value → its format in struct and numpy."""

_MOST_DIMENSIONS = 4
_LONGEST_NAME = 64
_STRING_HEADER = 8  # bytes; the length that precedes each string


@dataclass(frozen=True)
class Tensor:
    """The position of one tensor in its file."""

    shape: tuple[int, ...]  # row-major; the file stores the reverse order
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    nbytes: int
    half: int | None = None  # 0 or 1 if it is the first or second half of the stored rows


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file's metadata (arrays as lists) and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as float32.

        Raises:
            ModelError: A value is not a finite number.
        """
        tensor = self.tensors[name]
        shape = tensor.shape
        if tensor.half is not None:
            shape = (*shape[:-2], 2 * shape[-2], shape[-1])
        raw = np.fromfile(self.path, np.uint8, tensor.nbytes, offset=tensor.offset)
        rows = raw.reshape(quant_shape_to_byte_shape(shape, tensor.type))

        with np.errstate(all="ignore"):
            values = dequantize(rows, tensor.type).reshape(shape)
        if tensor.half is not None:
            values = np.split(values, 2, axis=-2)[tensor.half]

        if not np.isfinite(values).all():
            raise ModelError(
                f"{self.path} is broken: tensor {name!r} holds values that are not numbers; get it"
                " again"
            )
        return values


class _BadBytesError(Exception):
    """The bytes are not a GGUF file; the message says what is wrong with them."""


class _Cursor:
    """A position in the bytes of a file; it never moves past their end."""

    def __init__(self, buffer: mmap.mmap):
        self.buffer = buffer
        self.size = len(buffer)
        self.at = 0

    def take(self, count: int) -> int:
        """Move past ``count`` bytes, and return the position of the first one."""
        start = self.at
        if count > self.size - start:
            raise _BadBytesError(
                f"at byte {start} it announces {counted(count, 'byte')}, but it ends at byte"
                f" {self.size}"
            )
        self.at += count
        return start

    def number(self, layout: str) -> Any:
        """Read one number; ``layout`` is its format in struct."""
        start = self.take(struct.calcsize(layout))
        (value,) = struct.unpack_from(layout, self.buffer, start)
        return value

    def string(self) -> str:
        """Read the length of a string, and then the string."""
        length = self.number("<Q")
        start = self.take(length)
        try:
            return self.buffer[start : self.at].decode()
        except UnicodeDecodeError:
            raise _BadBytesError(f"the string at byte {start} is not UTF-8") from None

    def value(self) -> Any:
        """Read the type of a value, and then the value."""
        kind = self.number("<I")
        if kind == GGUFValueType.ARRAY:
            return self.array()
        if kind == GGUFValueType.STRING:
            return self.string()
        return self.number(self._layout(kind))

    def array(self) -> list[Any]:
        """Read the type and the number of an array's values, and then the values."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind != GGUFValueType.STRING:
            layout = self._layout(kind)
            start = self.take(count * struct.calcsize(layout))
            return np.frombuffer(self.buffer[start : self.at], layout).tolist()

        # Strings have no fixed size. Check the count before making a list of that length.
        if count * _STRING_HEADER > self.size - self.at:
            raise _BadBytesError(
                f"at byte {self.at} it announces {counted(count, 'string')}, more than the file"
                " can hold"
            )
        return [self.string() for _ in range(count)]

    def _layout(self, kind: int) -> str:
        """Return the format of a number's type in struct."""
        if kind not in _SCALARS:
            raise _BadBytesError(f"the value at byte {self.at} has the unknown type {kind}")
        return _SCALARS[kind]


def read_gguf(path: Path) -> GGUFFile:
    """Read a GGUF file's header.

    Raises:
        ModelError: The file is not a complete, valid, little-endian GGUF file of version 2 or 3.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
        ):
            if is_lfs_pointer(buffer[:60]):
                raise ModelError(f"{path} is {LFS_ADVICE}")
            metadata, tensors = _parse(_Cursor(buffer))
            tensors = _with_split_experts(tensors)
    except _BadBytesError as problem:
        raise ModelError(f"{path} is not a whole GGUF file: {problem}; get it again") from None
    except (OSError, ValueError) as problem:  # mmap refuses an empty file with ValueError
        raise ModelError(f"{path} can't be read as a GGUF file: {problem}") from None
    return GGUFFile(path, metadata, tensors)


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file's metadata, and the positions of its tensors."""
    if cursor.buffer[cursor.take(4) : cursor.at] != b"GGUF":
        raise _BadBytesError(f"it starts with {cursor.buffer[:4]!r}, not b'GGUF'")

    # In a big-endian file, the bytes of the version are in reverse order.
    version = cursor.number("<I")
    if version not in (2, 3):
        raise _BadBytesError(f"its version is {version}, allowed are 2 and 3 (little-endian)")

    # Read the metadata, then one header per tensor.
    tensor_count, pair_count = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key] = cursor.value()
    headers = [_tensor_header(cursor) for _ in range(tensor_count)]

    # The data starts at the next multiple of the alignment.
    alignment = metadata.get("general.alignment", 32)
    is_power_of_two = (
        isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
    )
    if not is_power_of_two:
        raise _BadBytesError(f"general.alignment is {alignment!r:.40}, allowed are powers of two")
    data_start = math.ceil(cursor.at / alignment) * alignment

    # Check that every tensor lies inside the file.
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in headers:
        tensor = _locate(name, shape, kind, data_start + offset)
        end = tensor.offset + tensor.nbytes
        if end > cursor.size:
            raise _BadBytesError(f"tensor {name!r} ends at byte {end}, the file at {cursor.size}")
        if name in tensors:
            raise _BadBytesError(f"tensor {name!r} appears twice")
        tensors[name] = tensor
    return metadata, tensors


def _with_split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with separate entries for the gate and up matrices of experts.

    Some files store both in one tensor: the rows of each expert are those of gate, then those of
    up.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, fused, _ = name.partition("ffn_gate_up_exps.weight")
        if not fused or len(tensor.shape) != 3 or tensor.shape[1] % 2:
            split[name] = tensor
            continue
        shape = (tensor.shape[0], tensor.shape[1] // 2, tensor.shape[2])
        for half, own in enumerate(("ffn_gate_exps.weight", "ffn_up_exps.weight")):
            split[block + own] = replace(tensor, shape=shape, half=half)
    return split


def _tensor_header(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read the header of a tensor: its name, shape, type, and offset in the data."""
    name, dims = cursor.string(), cursor.number("<I")
    if len(name) > _LONGEST_NAME or not 1 <= dims <= _MOST_DIMENSIONS:
        raise _BadBytesError(
            f"tensor {name!r:.70} has {counted(dims, 'dimension')} and a name of"
            f" {counted(len(name), 'character')},"
            f" allowed are 1 to {_MOST_DIMENSIONS} dimensions and {_LONGEST_NAME} characters"
        )
    shape = tuple(cursor.number("<Q") for _ in range(dims))
    return name, shape[::-1], cursor.number("<I"), cursor.number("<Q")


def _locate(name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
    """Return a tensor's position, after checking that its type and shape can be read."""
    type_name = next((member.name for member in GGMLQuantizationType if member == kind), str(kind))
    if type_name not in READABLE_TYPES:
        raise _BadBytesError(
            f"tensor {name!r} has the type {type_name}, allowed are {', '.join(READABLE_TYPES)}"
        )

    known = GGMLQuantizationType[type_name]
    block_size, _ = GGML_QUANT_SIZES[known]
    if not all(shape) or shape[-1] % block_size:
        raise _BadBytesError(
            f"tensor {name!r} has the shape {shape}; its sizes must be above 0, and the last one a"
            f" multiple of {block_size}"
        )
    nbytes = math.prod(quant_shape_to_byte_shape(shape, known))
    return Tensor(shape, known, offset, nbytes)
