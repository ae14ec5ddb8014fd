"""What --to writes and --from reads: a target is a name in ``Written`` or ``Read``, and its line in ``export``."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import arg

from ..config import UserPath
from ..errors import ConfigError, join_problems
from ..files import check_free, replacing_folder
from ..userpaths import public_name

Written = Literal["peft", "gguf", "hub"]
Read = Literal["peft", "gguf"]
Whole = Literal["f16", "q8_0", "f32"]


@dataclass(frozen=True)
class ExportConfig:
    """An adapter for other programs (--to), or one of another program for this one (--from)."""

    to: Written | None = None
    """What to write: for PEFT, transformers and vLLM; for llama.cpp, Ollama and LM Studio; or all of it, on the hub."""
    from_: Annotated[Read | None, arg(name="from")] = None
    """What adapter_path is instead: a folder that PEFT saved, or a LoRA's GGUF file; save_path becomes an adapter."""
    model: UserPath = "gemma-3"
    """The base that the adapter was trained on: a name, hub id, folder or .gguf file."""
    adapter_path: UserPath = "adapters"
    """Folder of the adapter."""
    save_path: UserPath = "exported"
    """Folder to write."""
    whole: Whole | None = None
    """With --to gguf: write base and adapter as one model of this type, not the adapter alone."""
    repo_id: str = ""
    """With --to hub: the repository, owner/name; if it is not there, it is made, private."""
    overwrite: bool = False
    """Replace what save_path holds."""


def check(config: ExportConfig) -> None:
    """Raise ConfigError where settings do not go together."""
    problems = []
    if (config.to is None) == (config.from_ is None):
        written, read = (", ".join(get_args(names)) for names in (Written, Read))
        problems.append(f"give one of --to ({written}) and --from ({read})")
    if config.whole is not None and config.to != "gguf":
        problems.append("whole is for --to gguf")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+" if config.to == "hub" else "", config.repo_id):
        problems.append("--to hub needs a repo_id, owner/name, and nothing else has one")
    if problems:
        raise ConfigError(join_problems(problems))


def export(config: ExportConfig, tell: Callable[[str], None]) -> None:
    """Write what the settings say into ``save_path``, whole or not at all."""
    from ..adapters.storage import adapter_folder, load_adapter, save_adapter  # here, so that --help starts fast
    from ..models.loading import load_folder
    from ..models.registry import find_model
    from .gguf_lora import attach_gguf, write_lora, write_model
    from .hub import prepare, upload
    from .ollama import modelfile
    from .peft import attach_peft, write_peft
    from .written import ADAPTER, GGUF, HUB, PEFT, check_kinds, is_one_of, what_stays

    adapter, save_path = Path(config.adapter_path), Path(config.save_path)
    check_free(save_path, [config.model, config.adapter_path], overwrite=config.overwrite)
    ours = {None: ADAPTER, "peft": PEFT, "gguf": GGUF, "hub": HUB}[config.to]
    check_kinds(save_path, ours)
    source = find_model(config.model)
    if source.note:
        tell(source.note)
    model, tokenizer, _ = load_folder(source.path)
    {None: load_adapter, "peft": attach_peft, "gguf": attach_gguf}[config.from_](model, adapter)
    with replacing_folder(save_path, is_ours=is_one_of(ours)) as folder:
        match config.to:
            case None:
                save_adapter(model, folder)
                tell(f"try it: mlx_loraplus.generate --model {config.model} --adapter-path {save_path} --prompt '...'")
            case "peft":
                if refusals := write_peft(model, public_name(source.base), folder):
                    tell(f"PEFT takes it, vLLM would not: {join_problems(refusals, most=3)}")
            case "gguf" if config.whole is not None:
                write_model(model, tokenizer, save_path.name, folder / "model.gguf", config.whole)
                (folder / "Modelfile").write_bytes(modelfile(tokenizer, "./model.gguf").encode())
            case "gguf":
                write_lora(model, folder / "adapter.gguf")
                (folder / "Modelfile").write_bytes(modelfile(tokenizer, "./base.gguf", "./adapter.gguf").encode())
                base = Path(config.model)
                link = f": ln -s {base.resolve()} {save_path / 'base.gguf'}" if base.suffix.lower() == ".gguf" else ""
                tell(f"the Modelfile wants the base, a GGUF file, beside it as base.gguf{link}")
            case "hub":
                for problem in prepare(model, tokenizer, source, config.repo_id, adapter_folder(adapter), folder):
                    tell(f"left out: {problem}")
                tell(f"uploaded: {upload(folder, config.repo_id)}")
        written = sorted(path.name for path in folder.iterdir())
    tell(f"{save_path}: {', '.join(written)}")
    if line := what_stays(save_path, ours):
        tell(line)
