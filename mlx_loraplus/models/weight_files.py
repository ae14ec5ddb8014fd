"""Check the weight files of a model's folder before mlx-lm reads them."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from ..errors import ModelError, join_problems
from ..files import LFS_ADVICE, is_lfs_pointer
from .find_model import indexed_shards, missing_file

_HEAD = ("lm_head.weight",)
_EMBEDDINGS = (
    "embed_tokens.weight",
    "tok_embeddings.weight",
    "word_embeddings.weight",
    ".embeddings.weight",
    "embed_in.weight",
    "wte.weight",
)
"""The endings of the names of a head and of token embeddings; the prefix varies by family."""

_PACKED = (
    *(".qweight", ".qzeros", "scales", ".scale", ".weight_packed", ".weight_scale"),
    *(".weight_scale_inv", "_blocks", ".absmax"),
)
"""The endings of the names of tensors that only quantized weights have, in any program."""

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Floating-point types in safetensors → the bytes of a number."""


@dataclass(frozen=True)
class StoredWeights:
    """What a model's weight files hold.

    Attributes:
        size: Bytes of the files.
        itemsize: Bytes of a number in the floating-point type that most numbers have.
    """

    size: int
    itemsize: int


def stored_weights(folder: Path) -> StoredWeights | None:
    """Return what a folder's weight files hold, from their headers.

    None if a file is missing or broken, which an error reports when the model is loaded, or if no
    tensor holds floating-point numbers.
    """
    if missing_file(folder) is not None:
        return None

    files = list(folder.glob("model*.safetensors"))
    elements: Counter[str] = Counter()
    try:
        for file in files:
            with safe_open(file, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118  it is no mapping
                    tensor = opened.get_slice(name)
                    elements[tensor.get_dtype()] += math.prod(tensor.get_shape())
        size = sum(file.stat().st_size for file in files)
    except (SafetensorError, OSError):
        return None

    floats = {dtype: count for dtype, count in elements.items() if dtype in _FLOATS}
    if not floats:
        return None
    return StoredWeights(size, _FLOATS[max(floats, key=lambda dtype: floats[dtype])])


def index_tensors(folder: Path) -> dict[str, Path]:
    """Return tensor name → file for all weights in a folder.

    mlx-lm loads every model*.safetensors. If two tensors have the same name, it keeps the one that
    it reads last, and the order is not defined. Therefore each tensor must be in only one file, and
    each file must be in the index.

    Raises:
        ModelError: The header of a file does not match the size of the file, a tensor is in two
            files, or a file is not in the index.
    """
    # If the folder has an index, every file must be in it.
    files = sorted(folder.glob("model*.safetensors"))
    shards = indexed_shards(folder)
    unnamed = [file.name for file in files if shards is not None and file.name not in shards]
    if unnamed:
        raise ModelError(
            f"{folder} holds {join_problems(unnamed)}, which model.safetensors.index.json does not"
            " name, but mlx-lm would load: move the file elsewhere, or get the folder again"
        )

    # Opening a file checks its header.
    tensors: dict[str, Path] = {}
    problems: list[str] = []
    for file in files:
        try:
            with safe_open(file, "numpy") as opened:
                names = list(opened.keys())
        except (SafetensorError, OSError) as problem:
            with file.open("rb") as opened:
                if is_lfs_pointer(opened.read(60)):
                    raise ModelError(f"{file} is {LFS_ADVICE}") from None
            problems.append(f"{file} is broken or cut short ({one_line(problem)})")
            continue

        # Two files must not have the same tensor.
        twice = next((name for name in names if name in tensors), None)
        if twice is not None:
            raise ModelError(
                f"{folder} holds the tensor {twice} in {tensors[twice].name} and in {file.name},"
                " and mlx-lm would load either: move the wrong file elsewhere"
            )
        tensors |= dict.fromkeys(names, file)
    if problems:
        raise ModelError(f"{join_problems(problems)}; get the file again")
    return tensors


def check_packed(config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Check that weights are quantized if a program other than mlx-lm says so in config.json.

    Raises:
        ModelError: They are plain. mlx-lm would load them, and call them quantized.
    """
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None

    # mlx-lm writes its own settings too, and bitnet's weights may be plain.
    if not method or config.get("quantization") or method == "bitnet":
        return
    if find_packed(tensors) is None:
        raise ModelError(
            f"its config.json has a quantization_config ({method}), but its weights are plain:"
            " remove quantization_config from config.json if they were dequantized, or get the"
            " folder again"
        )


def find_packed(tensors: Iterable[str]) -> str | None:
    """Return the name of a tensor that only quantized weights have, or None."""
    names = set(tensors)

    # A scale without a weight, as in the routers of Gemma 4, is a parameter of its own.
    def is_packed(name: str) -> bool:
        if name.endswith(".scale"):
            return f"{name.removesuffix('scale')}weight" in names
        return name.endswith(_PACKED)

    return next((name for name in sorted(names) if is_packed(name)), None)


def check_tied_head(model: nn.Module, tensors: Mapping[str, Path]) -> None:
    """Check that a stored head equals the embeddings, if mlx-lm uses the embeddings instead.

    Raises:
        ModelError: The head differs from the embeddings, so the logits would be wrong.
    """
    arrays: Any = tree_flatten(model.parameters())
    if any("lm_head" in name for name, _ in arrays):
        return

    # Compare the stored head with the stored embeddings.
    head, embedding = _find(tensors, _HEAD), _find(tensors, _EMBEDDINGS)
    if head is None or embedding is None:
        return
    if mx.array_equal(_read(tensors, head), _read(tensors, embedding), equal_nan=True).item():
        return
    raise ModelError(
        "its config.json ties the head to the embeddings (tie_word_embeddings), but its weights"
        f" contain a different {head}, which mlx-lm would drop: set tie_word_embeddings to false in"
        " config.json, or remove the tensor if it is a leftover"
    )


def one_line(problem: BaseException) -> str:
    """Return an error's message as one line of at most 300 characters, with its type if needed."""
    text = str(problem)
    if not isinstance(problem, ValueError):
        text = f"{type(problem).__name__}: {text}"
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _find(tensors: Mapping[str, Path], endings: tuple[str, ...]) -> str | None:
    """Return the tensor name with one of these endings, or None.

    If there are several, return the shortest name, which belongs to the main model.
    """
    names = [name for name in tensors if name.endswith(endings)]
    return min(names, key=len, default=None)


def _read(tensors: Mapping[str, Path], name: str) -> mx.array:
    """Return one tensor; it is read from disk when it is used."""
    arrays: Any = mx.load(str(tensors[name]))
    return arrays[name]
