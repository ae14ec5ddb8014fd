"""The paths that fuse and export write in save_path. --overwrite replaces only these paths."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from ..adapters import storage
from ..errors import OutputError
from ..files import others_in
from ..models.save_model_folder import TOKENIZER_FILES
from ..runs.history import FUSED, PLOT
from . import peft

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.json")
MODEL = (
    "config.json", "model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors",
    "model.safetensors.index.json", "generation_config.json", FUSED, *TOKENIZER_FILES,
    *PROCESSOR_FILES,
)  # fmt: skip
ADAPTER = (storage.WEIGHTS, storage.CONFIG, storage.MODULES)
PEFT = (peft.WEIGHTS, peft.CONFIG)
GGUF = ("adapter.gguf", "model.gguf", "Modelfile")
HUB = (
    *PEFT, "adapter.gguf", "Modelfile", "README.md", PLOT, *(f"mlx/{name}" for name in ADAPTER),
)  # fmt: skip


def is_one_of(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Return a function that checks whether a path inside save_path matches one of the patterns."""

    def is_ours(path: str) -> bool:
        depth = path.count("/")
        return any(
            fnmatchcase(path, pattern) and pattern.count("/") == depth for pattern in patterns
        )

    return is_ours


def check_files_and_folders(save_path: Path, patterns: tuple[str, ...]) -> None:
    """Check that no folder in ``save_path`` has the name of a file to write, or the reverse.

    Raises:
        OutputError: An entry of ``save_path`` is a folder instead of a file, or the reverse.
    """
    is_ours = is_one_of(patterns)
    folders = {path.partition("/")[0] for path in patterns if "/" in path}
    entries = sorted(save_path.iterdir()) if save_path.is_dir() else []

    for entry in entries:
        is_folder = entry.is_dir()
        if is_folder and is_ours(entry.name):
            raise OutputError(
                f"{entry} is a folder, but a file must be written there: move it, or give another"
                " --save-path"
            )
        if not is_folder and entry.name in folders:
            raise OutputError(
                f"{entry} is a file, but a folder must be written there: move it, or give another"
                " --save-path"
            )


def kept_files_note(save_path: Path, patterns: tuple[str, ...]) -> str:
    """Return a line that lists the other files in ``save_path``, or "" if there are none."""
    others = others_in(save_path, is_one_of(patterns))
    if not others:
        return ""

    shown = ", ".join(map(str, others[:3]))
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    return f"kept the other files in {save_path}: {shown}{more}"
