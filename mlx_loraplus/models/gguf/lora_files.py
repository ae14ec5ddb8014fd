"""Tell GGUF files that hold a LoRA from those that hold a model."""

from pathlib import Path

from ...errors import ModelError
from ...userpaths import shell_word
from .reader import read_gguf


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def is_gguf_lora(path: Path) -> bool:
    """Return whether a GGUF file holds a LoRA. One that can't be read counts as a model."""
    try:
        return read_gguf(path).metadata.get("general.type") == "adapter"
    except ModelError:
        return False


def import_command(path: Path) -> str:
    """Return the command that converts a LoRA in a GGUF file to an adapter of this package."""
    return (
        f"mlx_loraplus.export --from gguf --model BASE --adapter-path {shell_word(path)}"
        " --save-path imported"
    )
