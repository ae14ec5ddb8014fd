"""mlx_loraplus.export: an adapter for other programs and the hub, or one from another program for this one."""

from collections.abc import Sequence
from pathlib import Path

from ..commandline import Switches, run, tell
from ..config import ExportConfig
from ..errors import join_problems


def main(arguments: Sequence[str] | None = None) -> None:
    """Export an adapter, or import one."""
    run("mlx_loraplus.export", ExportConfig, _export, arguments)


def _export(config: ExportConfig, _switches: Switches) -> None:
    from ..adapters.storage import load_adapter, save_adapter
    from ..models.loading import load_folder
    from ..models.names import find_model
    from ..places import check_free, replacing_folder, write_atomically
    from .gguf import attach_gguf, write_lora, write_model
    from .ollama import modelfile
    from .peft import attach_peft, write_peft
    from .publish import prepare, upload

    check_free(Path(config.save_path), [config.model, config.adapter_path], overwrite=config.overwrite)
    source = find_model(config.model)
    if source.note:
        tell(source.note)
    model, tokenizer, _ = load_folder(source.path)
    adapter, save_path = Path(config.adapter_path), Path(config.save_path)
    {None: load_adapter, "peft": attach_peft, "gguf": attach_gguf}[config.from_](model, adapter)
    with replacing_folder(save_path) as folder:
        if config.from_ is not None:
            save_adapter(model, folder)
            tell(f"try it: mlx_loraplus.generate --model {config.model} --adapter-path {save_path} --prompt '...'")
        elif config.to == "peft":
            if refusals := write_peft(model, source.base, folder):
                tell(f"PEFT takes it, vLLM would not: {join_problems(refusals, most=3)}")
        elif config.to == "hub":
            for problem in prepare(model, tokenizer, source, config.repo_id, adapter, folder):
                tell(f"left out: {problem}")
        elif config.whole is not None:
            write_model(model, tokenizer, save_path.name, folder / "model.gguf", config.whole)
            write_atomically(folder / "Modelfile", modelfile(tokenizer, "./model.gguf").encode())
        else:
            write_lora(model, folder / "adapter.gguf")
            base = str(Path(config.model).resolve()) if config.model.endswith(".gguf") else "./base.gguf"
            if base == "./base.gguf":
                tell("the Modelfile wants the base, a GGUF file, beside it as base.gguf")
            write_atomically(folder / "Modelfile", modelfile(tokenizer, base, "./adapter.gguf").encode())
        written = sorted(path.name for path in folder.iterdir())
    tell(f"{save_path}: {', '.join(written)}")
    if config.to == "hub":
        tell(f"uploaded: {upload(save_path, config.repo_id)}")


if __name__ == "__main__":
    main()
