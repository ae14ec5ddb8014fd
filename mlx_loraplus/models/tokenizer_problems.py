"""Find which file of a model's folder keeps transformers from loading the tokenizer."""

import json
from pathlib import Path

from transformers import AutoConfig

from ..files import LFS_ADVICE, is_lfs_pointer, read_bounded
from .weight_files import one_line

_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""The files with JSON objects that transformers reads for a tokenizer."""

_VOCABULARIES = (
    "tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json",
)  # fmt: skip
"""Patterns of the files that may hold a tokenizer's vocabulary."""


def explain_tokenizer_problem(folder: Path, problem: Exception) -> str:
    """Return why the tokenizer of a folder can't be loaded, with the file and what to do."""
    again = "get it again from where the model is from"
    if not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        return "it has no tokenizer.json: get it from where the model is from"

    # Check that every file holds a JSON object, which transformers expects.
    for name in _JSON_FILES:
        if reason := _broken(folder / name):
            return f"its {name} {reason}: {again}"
    if reason := _refused_config(folder):
        return (
            f"transformers can't read its config.json ({reason}): correct config.json, or {again}"
        )

    found = [name for name in _JSON_FILES if (folder / name).is_file()]
    files = " and ".join(found) or "its vocabulary"
    reason = one_line(problem).rstrip(".")
    return f"transformers can't read {files} ({reason}): get the folder again"


def _broken(file: Path) -> str | None:
    """Return why a file is not a JSON object; None if it is one, or is not there."""
    if not file.is_file():
        return None
    try:
        stored = read_bounded(file)
        if is_lfs_pointer(stored[:60]):
            return f"is {LFS_ADVICE}"
        content = json.loads(stored)
    except (ValueError, OSError, RecursionError) as problem:
        return f"is not JSON ({one_line(ValueError(problem))})"
    return None if isinstance(content, dict) else "is not a JSON object"


def _refused_config(folder: Path) -> str | None:
    """Return why transformers refuses a folder's config.json, or None if it reads it."""
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # transformers may raise any kind of error, and does not know every family.
    except (ValueError, OSError):
        return None
    except Exception as problem:  # noqa: BLE001
        return one_line(problem).rstrip(".")
    return None
