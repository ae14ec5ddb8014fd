"""Write a model in memory as a folder that stock mlx_lm loads: config, tokenizer and weights."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import save_config

from ..errors import ConfigError
from ..files import read_bounded, replacing, write_atomically
from .prompt_format import PROMPT_FORMAT, format_of

MODEL_WEIGHTS, MODEL_CONFIG, GENERATION = (
    "model.safetensors", "config.json", "generation_config.json",
)  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tiktoken.model", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Patterns of the files that a tokenizer may write."""

_MAX_BYTES = 1 << 28  # of a tokenizer's file
_TYPES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16"}


@dataclass(frozen=True)
class ModelOrigin:
    """Where a model was loaded from.

    Attributes:
        folder: The model's folder.
        config: Its config.json as mlx-lm used it.
    """

    folder: Path
    config: Mapping[str, Any]


def origin_of(model: nn.Module) -> ModelOrigin:
    """Return where a model was loaded from.

    Raises:
        ConfigError: The model was not loaded by ``mlx_loraplus.load``.
    """
    origin = getattr(model, "origin", None)
    if origin is None:
        raise ConfigError(
            "--adapter full saves the whole model with its config.json, which is known only for"
            " models from mlx_loraplus.load: load the model with it"
        )
    return origin


def save_model_folder(model: nn.Module, tokenizer: TokenizerWrapper, folder: Path) -> None:
    """Write a model into a folder, each file atomically and the weights last.

    The weights keep their types in memory. Other files in the folder are not changed.

    Raises:
        ConfigError: The model was not loaded by ``mlx_loraplus.load``.
        OutputError: The folder cannot be written.
    """
    origin = origin_of(model)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))

    # mlx-lm and the tokenizer write files directly, so they write into a temporary folder.
    with tempfile.TemporaryDirectory() as built:
        save_config(_config_of(model, origin, weights), Path(built) / MODEL_CONFIG)
        tokenizer.save_pretrained(built)
        if (origin.folder / GENERATION).is_file():
            shutil.copy(origin.folder / GENERATION, built)
        for file in sorted(Path(built).rglob("*")):
            if file.is_file():
                _write_if_changed(file, folder / file.relative_to(built))

    with replacing(folder / MODEL_WEIGHTS) as file:
        mx.save_safetensors(file, weights, metadata={"format": "mlx"})


def remove_model_files(folder: Path) -> None:
    """Remove the files that ``save_model_folder`` has written."""
    patterns = (MODEL_WEIGHTS, MODEL_CONFIG, GENERATION, *TOKENIZER_FILES)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        is_written = any(
            fnmatchcase(name, pattern) and pattern.count("/") == name.count("/")
            for pattern in patterns
        )
        if is_written and file.is_file():
            file.unlink()


def _config_of(
    model: nn.Module, origin: ModelOrigin, weights: Mapping[str, mx.array]
) -> dict[str, Any]:
    """Return the config.json of a model whose weights are not quantized."""
    config = {
        name: value for name, value in origin.config.items() if not name.startswith("quantization")
    }
    config[PROMPT_FORMAT] = format_of(model).stored()

    # transformers converts weights to the type that the config names.
    dtype = next((_TYPES[each.dtype] for each in weights.values() if each.dtype in _TYPES), None)
    for name in ("torch_dtype", "dtype"):
        if name in config and dtype is not None:
            config[name] = dtype
    return config


def _write_if_changed(source: Path, target: Path) -> None:
    """Copy a small file atomically, unless the target is the same already."""
    content = read_bounded(source, _MAX_BYTES)
    if not target.is_file() or read_bounded(target, _MAX_BYTES) != content:
        write_atomically(target, content)
