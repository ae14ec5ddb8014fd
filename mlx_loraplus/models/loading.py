"""The one door to mlx-lm: a folder becomes a model and its tokenizer."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_config, load_model, load_tokenizer

from ..errors import ModelError, join_problems
from .names import missing_file


def load_folder(path: Path) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Load a model's folder and return (model, tokenizer, config). Without Metal, all floating weights become float32.

    Code that a folder brings along is never run.

    Raises: ModelError, in one line, when a file is missing, cut short or broken, or mlx-lm does not know the model.
    """
    if missing := missing_file(path):
        raise ModelError(f"the folder {path} is not a model: {missing}")
    _check_config(path)
    problems = [problem for file in sorted(path.glob("model*.safetensors")) if (problem := _broken(file))]
    if problems:
        raise ModelError(f"{join_problems(problems)}; get the file again")
    try:
        model, config = load_model(path, lazy=True, trust_remote_code=False)
        if not mx.metal.is_available():
            model.set_dtype(mx.float32)  # bfloat16 and float16 are ~40 times slower on CPU
        mx.eval(model.parameters())
    except Exception as problem:  # mlx-lm's model classes answer a strange config with errors of every kind
        raise ModelError(f"{path} can't be loaded by mlx-lm: {_one_line(problem)}") from problem
    return model, load_folder_tokenizer(path), config


def load_folder_tokenizer(path: Path) -> TokenizerWrapper:
    """Load the tokenizer of a model's folder, without the model.

    Raises: ModelError, in one line, when it can't be loaded.
    """
    _check_config(path)
    try:
        return load_tokenizer(path, {"trust_remote_code": False}, eos_token_ids=load_config(path).get("eos_token_id"))
    except Exception as problem:  # transformers answers a strange tokenizer with errors of every kind
        raise ModelError(f"the tokenizer in {path} can't be loaded: {_one_line(problem)}") from problem


def _one_line(problem: Exception) -> str:
    """Return an error's kind and message in at most 300 characters of one line."""
    text = f"{type(problem).__name__}: {problem}" if not isinstance(problem, ValueError) else str(problem)
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _check_config(path: Path) -> None:
    try:
        config = load_config(path)
    except (ValueError, OSError) as problem:
        raise ModelError(f"{path / 'config.json'} is not JSON: {_one_line(problem)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path / 'config.json'} has no model_type, so its kind of model is not known")


def _broken(file: Path) -> str | None:
    """Say what is wrong with a safetensors file's header or length, or return None.

    Source: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, then the tensors' bytes).
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return f"{file} is cut short at {size} bytes"
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError):
            return f"{file} has no safetensors header"
    return None if whole == size else f"{file} has {size} bytes, its header says {whole}"
