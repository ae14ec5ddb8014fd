"""The paths that fuse and export write in save_path: with --overwrite these are replaced, and all others stay."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from ..adapters import storage
from ..errors import OutputError
from ..files import others_in
from ..runs.history import FUSED, PLOT
from . import peft

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model",
    "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
MODEL = (
    "config.json", "model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors", "model.safetensors.index.json",
    "generation_config.json", FUSED, *_TOKENIZER, *PROCESSOR_FILES,
)  # fmt: skip
ADAPTER = (storage.WEIGHTS, storage.CONFIG, storage.MODULES)
PEFT = (peft.WEIGHTS, peft.CONFIG)
GGUF = ("adapter.gguf", "model.gguf", "Modelfile")
HUB = (*PEFT, "adapter.gguf", "Modelfile", "README.md", PLOT, *(f"mlx/{name}" for name in ADAPTER))


def is_one_of(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Return what tells whether a path in save_path is one of these."""

    def is_ours(path: str) -> bool:
        return any(
            fnmatchcase(path, each) and path.count("/") == each.count("/") for each in patterns
        )

    return is_ours


def check_kinds(save_path: Path, patterns: tuple[str, ...]) -> None:
    """Raise OutputError where a folder has the path of a file to write, or a file that of a folder."""
    is_ours = is_one_of(patterns)
    needed = {path.partition("/")[0] for path in patterns if "/" in path}
    for entry in sorted(save_path.iterdir()) if save_path.is_dir() else ():
        if entry.is_dir() and is_ours(entry.name):
            raise OutputError(
                f"{entry} is a folder, where a file is written: move it, or give another"
                " --save-path"
            )
        if not entry.is_dir() and entry.name in needed:
            raise OutputError(
                f"{entry} is a file, where a folder is written: move it, or give another"
                " --save-path"
            )


def what_stays(save_path: Path, patterns: tuple[str, ...]) -> str:
    """Return a line on the files that were in save_path and stay, or nothing where there are none."""
    others = others_in(save_path, is_one_of(patterns))
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    return (
        f"kept what is also in {save_path}: {', '.join(map(str, others[:3]))}{more}"
        if others
        else ""
    )
