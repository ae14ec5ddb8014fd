"""The targets of export: each is a name in ``config.Written`` or ``Read``, and a case in ``export_adapter``."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from ..config import ExportConfig, Read, Written
from ..errors import ConfigError, join_problems
from ..files import check_free, replacing_folder
from ..userpaths import public_name


def check(config: ExportConfig) -> None:
    """Raise ConfigError where settings do not go together."""
    problems = []
    if (config.to is None) == (config.from_ is None):
        written, read = (", ".join(get_args(names)) for names in (Written, Read))
        problems.append(f"give one of --to ({written}) and --from ({read})")
    if config.merged is not None and config.to != "gguf":
        problems.append("merged is for --to gguf")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+" if config.to == "hub" else "", config.repo_id):
        problems.append("--to hub needs a repo_id, owner/name, and nothing else has one")
    if problems:
        raise ConfigError(join_problems(problems))


def export_adapter(config: ExportConfig, log: Callable[[str], None]) -> None:
    """Write what the settings say into ``save_path``, whole or not at all."""
    from ..adapters.storage import (
        adapter_folder,
        load_adapter,
        save_adapter,
    )  # here, so that --help starts fast
    from ..models.loading import load_folder
    from ..models.registry import find_model
    from .gguf_lora import load_gguf_lora, write_lora, write_model
    from .hub import upload, write_repository
    from .ollama import modelfile
    from .peft import load_peft, write_peft
    from .written import ADAPTER, GGUF, HUB, PEFT, check_kinds, is_one_of, what_stays

    adapter, save_path = Path(config.adapter_path), Path(config.save_path)
    check_free(save_path, [config.model, config.adapter_path], overwrite=config.overwrite)
    ours = {None: ADAPTER, "peft": PEFT, "gguf": GGUF, "hub": HUB}[config.to]
    check_kinds(save_path, ours)
    source = find_model(config.model)
    if source.note:
        log(source.note)
    model, tokenizer, _ = load_folder(source.path)
    {None: load_adapter, "peft": load_peft, "gguf": load_gguf_lora}[config.from_](model, adapter)
    with replacing_folder(save_path, is_ours=is_one_of(ours)) as folder:
        match config.to:
            case None:
                save_adapter(model, folder)
                log(
                    f"try it: mlx_loraplus.generate --model {config.model} --adapter-path"
                    f" {save_path} --prompt '...'"
                )
            case "peft":
                if refusals := write_peft(model, public_name(source.base), folder):
                    log(f"PEFT takes it, vLLM would not: {join_problems(refusals, most=3)}")
            case "gguf" if config.merged is not None:
                write_model(model, tokenizer, save_path.name, folder / "model.gguf", config.merged)
                (folder / "Modelfile").write_bytes(modelfile(tokenizer, "./model.gguf").encode())
            case "gguf":
                write_lora(model, folder / "adapter.gguf")
                (folder / "Modelfile").write_bytes(
                    modelfile(tokenizer, "./base.gguf", "./adapter.gguf").encode()
                )
                base = Path(config.model)
                link = (
                    f": ln -s {base.resolve()} {save_path / 'base.gguf'}"
                    if base.suffix.lower() == ".gguf"
                    else ""
                )
                log(f"the Modelfile wants the base, a GGUF file, beside it as base.gguf{link}")
            case "hub":
                for problem in write_repository(
                    model, tokenizer, source, config.repo_id, adapter_folder(adapter), folder
                ):
                    log(f"left out: {problem}")
                log(f"uploaded: {upload(folder, config.repo_id)}")
        written = sorted(path.name for path in folder.iterdir())
    log(f"{save_path}: {', '.join(written)}")
    if line := what_stays(save_path, ours):
        log(line)
