"""Export and import adapters: each format in ``setting_types.py`` has a case here."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..command_config import ExportConfig
from ..errors import ConfigError, join_problems
from ..files import Contents, check_free, replacing_folder
from ..setting_types import Read, Written
from ..userpaths import shell_word

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..models.find_model import ModelSource


@dataclass(frozen=True)
class _Loaded:
    """A base with the adapter to export applied to it, and its config.json."""

    model: "nn.Module"
    tokenizer: "TokenizerWrapper"
    source: "ModelSource"
    config: Mapping[str, Any]


def check(config: ExportConfig) -> None:
    """Check that the settings are compatible with each other.

    Raises:
        ConfigError: A setting is missing, or can't be combined with the others.
    """
    problems: list[str] = []

    if (config.to is None) == (config.from_ is None):
        written = ", ".join(get_args(Written))
        read = ", ".join(get_args(Read))
        example = f"mlx_loraplus.export {shell_word(config.adapter_path)} --to gguf"
        problems.append(f"give one of --to ({written}) and --from ({read}), as in {example}")
    if config.from_ == "gguf" and config.model is None:
        problems.append("a LoRA in GGUF does not name its base: give --model")

    if config.merged is not None and config.to != "gguf":
        problems.append("--merged is for --to gguf only: leave it out")

    if config.to != "hub" and config.repo_id:
        problems.append(f"--repo-id {config.repo_id!r:.80} is for --to hub: leave it out")
    if config.to == "hub" and not re.fullmatch(r"[\w.-]+/[\w.-]+", config.repo_id):
        given = f", not {config.repo_id!r:.80}" if config.repo_id else ""
        problems.append(f"--to hub needs --repo-id OWNER/NAME{given}")

    if problems:
        raise ConfigError(join_problems(problems))


def export_adapter(config: ExportConfig, log: Callable[[str], None]) -> None:
    """Write the requested formats into ``save_path``. If anything fails, nothing is written.

    Raises:
        AdapterError: The adapter does not fit the base, or the format can't express it.
        ModelError: The base can't be loaded or exported.
        OutputError: ``save_path`` is already in use.
    """
    # These are imported here so that --help starts fast.
    from ..adapters.stored_files import is_model_folder, model_for
    from .written_files import (
        ADAPTER,
        GGUF,
        HUB,
        MODEL,
        PEFT,
        check_files_and_folders,
        is_one_of,
        kept_files_note,
    )

    # The folder of a run with adapter full is a whole model.
    is_whole = is_model_folder(config.adapter_path)
    if is_whole:
        config = _for_whole_model(config, log)

    # Report an occupied folder before the model is loaded.
    save_path = Path(config.save_path)
    ours = {None: ADAPTER, "peft": PEFT, "gguf": GGUF, "hub": (*HUB, *MODEL)}[config.to]
    name = model_for(config.model, config.adapter_path)
    refused: tuple[Contents, ...] = ("a run", "a sweep", "data")
    if config.to is not None:
        refused = (*refused, "an adapter")
    if config.to in (None, "peft"):  # an adapter beside a model would be applied to it
        refused = (*refused, "a model")
    check_free(save_path, [name, config.adapter_path], overwrite=config.overwrite, refused=refused)
    check_files_and_folders(save_path, ours)

    loaded = _load(config, name, log, is_whole=is_whole)

    with replacing_folder(save_path, is_ours=is_one_of(ours)) as folder:
        match config.to:
            case None:
                _write_adapter(loaded, folder)
            case "peft":
                _write_peft(loaded, folder, log)
            case "gguf" if config.merged is not None:
                _write_merged_gguf(config, loaded, folder)
            case "gguf":
                _write_gguf_lora(config, loaded, folder, log)
            case "hub" if is_whole:
                _publish_model(config, loaded, folder, log)
            case "hub":
                _publish(config, loaded, folder, log)
        written = sorted(path.name for path in folder.iterdir())

    # Report the written files, and the files that were already there.
    log(f"{save_path}: {', '.join(written)}")
    if line := kept_files_note(save_path, ours):
        log(line)
    if config.to is None:
        log(f"try it: mlx_loraplus.generate {shell_word(config.save_path)} --prompt '...'")


def _for_whole_model(config: ExportConfig, log: Callable[[str], None]) -> ExportConfig:
    """Return the settings for a whole model, which is both base and result.

    Raises:
        ConfigError: A whole model has no such format.
    """
    folder = config.adapter_path
    if config.model is not None or config.to in (None, "peft"):
        raise ConfigError(
            f"{folder} is a whole model, not an adapter: export it alone with --to gguf or --to"
            " hub; programs that load models take the folder itself"
        )
    if config.to == "gguf" and config.merged is None:
        log("the whole model is written as f16 (--merged chooses another type)")
        config = replace(config, merged="f16")
    return replace(config, model=folder)


def _load(
    config: ExportConfig, name: str, log: Callable[[str], None], *, is_whole: bool
) -> _Loaded:
    """Load the base with this name, and apply the adapter to it, unless it is a whole model."""
    from ..adapters.storage import load_adapter
    from ..models.find_model import find_model
    from ..models.loading import load_folder
    from ..models.prompt_format import PROMPT_FORMAT, PromptFormat
    from .gguf_lora import load_gguf_lora
    from .peft import find_doubts, load_peft

    source = find_model(name)
    if source.note:
        log(source.note)

    model, tokenizer, stored = load_folder(source.path)
    if is_whole:
        model.prompt_format = PromptFormat.read(stored.get(PROMPT_FORMAT))
        return _Loaded(model, tokenizer, source, stored)
    attach = {None: load_adapter, "peft": load_peft, "gguf": load_gguf_lora}[config.from_]
    attach(model, Path(config.adapter_path))
    for note in find_doubts(Path(config.adapter_path)) if config.from_ == "peft" else ():
        log(note)

    # An adapter names its base, but what is published contains no local path.
    if config.to != "hub" or not Path(source.exact_name).exists():
        model.exact_name = source.exact_name
    return _Loaded(model, tokenizer, source, stored)


def _write_adapter(loaded: _Loaded, folder: Path) -> None:
    """Write an adapter from another program in our own format."""
    from ..adapters.storage import write_adapter

    write_adapter(loaded.model, folder)


def _write_peft(loaded: _Loaded, folder: Path, log: Callable[[str], None]) -> None:
    """Write the adapter for PEFT, and report anything that could make loading fail."""
    from .peft import unchecked_names, write_peft

    base, note = _base_for_peft(loaded.source.base)
    if note:
        log(note)
    refusals = write_peft(loaded.model, base, folder)
    if refusals:
        problems = join_problems(refusals, most=3)
        log(f"PEFT loads this adapter, but vLLM does not serve it as it is: {problems}")
    if line := unchecked_names(loaded.model):
        log(line)


def _base_for_peft(base: str) -> tuple[str, str]:
    """Return the name of the base for PEFT, and a note on it if it is a path; "" otherwise."""
    path = Path(base).expanduser()
    setting = "base_model_name_or_path in adapter_config.json"
    if path.is_file():
        return path.name, (
            f"PEFT can't load {path.name} as the base: set {setting} to the hub id or the folder of"
            " the model that the file was made from"
        )
    if path.is_dir():
        return str(path.absolute()), (
            f"PEFT will look for the base in {path.absolute()}: before you publish the adapter, set"
            f" {setting} to the base's hub id"
        )
    return base, ""


def _write_merged_gguf(config: ExportConfig, loaded: _Loaded, folder: Path) -> None:
    """Write the base with the adapter folded in as a GGUF model, with its Modelfile."""
    from ..models.prompt_format import format_of
    from .gguf_model import write_model
    from .ollama import modelfile

    assert config.merged is not None
    name = Path(config.save_path).name
    write_model(loaded.model, loaded.tokenizer, name, folder / "model.gguf", config.merged)
    text = modelfile(loaded.tokenizer, "./model.gguf", prompt_format=format_of(loaded.model))
    (folder / "Modelfile").write_bytes(text.encode())


def _write_gguf_lora(
    config: ExportConfig, loaded: _Loaded, folder: Path, log: Callable[[str], None]
) -> None:
    """Write the adapter alone as GGUF, with its Modelfile."""
    from ..models.prompt_format import format_of
    from .gguf_lora import write_lora
    from .ollama import modelfile

    write_lora(loaded.model, folder / "adapter.gguf")
    text = modelfile(loaded.tokenizer, "./base.gguf", "./adapter.gguf", format_of(loaded.model))
    (folder / "Modelfile").write_bytes(text.encode())

    # The base is not copied, so the user has to place it in this folder.
    base = Path(loaded.source.name)
    place = shell_word(Path(config.save_path) / "base.gguf")
    if base.suffix.lower() == ".gguf":
        remedy = f"run ln -s {shell_word(base.resolve())} {place}"
    else:
        made = f"{Path(config.save_path)}_base"
        command = (
            f"mlx_loraplus.export {shell_word(loaded.source.path)} --to gguf --merged f16"
            f" --save-path {shell_word(made)}"
        )
        remedy = (
            "export again with --merged q8_0, which needs no base, or make it from the base that"
            f" the adapter was trained on: {command} && mv {shell_word(f'{made}/model.gguf')}"
            f" {place}"
        )
    log(f"the Modelfile expects the base as base.gguf in the same folder; {remedy}")


def _publish(
    config: ExportConfig, loaded: _Loaded, folder: Path, log: Callable[[str], None]
) -> None:
    """Write the repository's files, and upload them."""
    from ..adapters.storage import adapter_folder
    from .hub import upload, write_repository
    from .peft import CONFIG, unchecked_names

    adapter = adapter_folder(Path(config.adapter_path))
    problems = write_repository(
        loaded.model, loaded.tokenizer, loaded.source, config.repo_id, adapter, folder
    )
    for problem in problems:
        log(f"left out: {problem}")

    line = unchecked_names(loaded.model)
    if line and (folder / CONFIG).is_file():
        log(line)
    log(f"uploaded: {upload(folder, config.repo_id)}")


def _publish_model(
    config: ExportConfig, loaded: _Loaded, folder: Path, log: Callable[[str], None]
) -> None:
    """Write the repository of a whole model, and upload it."""
    from .hub import upload
    from .whole_model import write_model_repository

    write_model_repository(
        loaded.model, loaded.tokenizer, loaded.config, loaded.source.path, config.repo_id, folder
    )
    log(f"uploaded: {upload(folder, config.repo_id)}")
