"""mlx_loraplus.fuse: adapters folded into their base, and how much of what was learned is kept."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import command, tell
from .config import FuseConfig
from .files import check_free
from .userpaths import public_name, public_names


def main(arguments: Sequence[str] | None = None) -> None:
    """Fold adapters into their base and write a folder that stock mlx_lm loads."""
    words = spell_out(sys.argv[1:] if arguments is None else arguments)
    with command("mlx_loraplus.fuse", FuseConfig, words) as (config, _):
        from .adapters.merge import load_adapters, parse_adapters
        from .adapters.storage import adapter_folder
        from .export.fuse import find_vision, fuse_adapter, leave_report, save_fused, size_of
        from .export.fuse_quality import ask, change_table, gather_inputs, losses, sample_rows, training_of
        from .export.written import MODEL, check_kinds, what_stays
        from .models.loading import load_folder, shared_copy, stored_dtypes
        from .models.registry import find_model

        weights, save_path = parse_adapters(config.adapter_path), Path(config.save_path)
        check_free(save_path, [config.model, *weights, *config.data], overwrite=config.overwrite)
        check_kinds(save_path, MODEL)
        rows_of = training_of(config, map(adapter_folder, weights), tell)
        source = find_model(config.model)
        if source.note:
            tell(source.note)
        model, tokenizer, base_config = load_folder(source.path)
        vision = find_vision(model, source.path, keep=config.keep_vision, tell=tell)
        size = size_of(model, vision)
        base, model = model, load_adapters(shared_copy(model), weights)
        sample = sample_rows(rows_of, tokenizer, config, tell) if rows_of else None
        figures = losses({"base": ask(base, sample[0])}) if sample else {}
        del base
        answers, inputs = (ask(model, sample[0]), gather_inputs(model, sample[1])) if sample else (None, None)
        dtypes = stored_dtypes(source.path)
        changes = fuse_adapter(model, bits=config.bits, dequantize=config.dequantize, inputs=inputs, dtypes=dtypes)
        del inputs
        tell(change_table(changes))
        if sample and answers:
            figures |= losses({"base + adapter": answers, "fused": ask(model, sample[0])})
            tell(f"on {len(answers.targets):,} tokens of training rows, loss and KL(base + adapter || fused): "
                 + ", ".join(f"{name} {figure:.4f}" for name, figure in figures.items()))  # fmt: skip
        written = save_fused(model, tokenizer, base_config, source.path, save_path, vision=vision, report={
            "schema": 1, "model": public_name(config.model), "save_path": save_path.resolve().name,
            "adapters": {name: weights[path] for path, name in public_names(weights).items()},
            "bytes_before": size, "answers": figures, "layers": {change.path: change.figures() for change in changes},
        })  # fmt: skip
        leave_report(save_path, map(adapter_folder, weights), tell)
        if line := what_stays(save_path, MODEL):
            tell(line)
        sizes = f"{size / 1e9:.2f} → {written / 1e9:.2f} GB"
        tell(f"fused {' and '.join(weights)} into {config.model}: {save_path} ({sizes})")
        tell(f"try it: mlx_loraplus.generate --model {config.save_path} --prompt '...'")


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with ``--adapter a:0.7 --adapter b:0.3`` as ``--adapter-path a:0.7 b:0.3``."""
    pairs = list(zip(["", *arguments], arguments, strict=False))
    folders = [word for before, word in pairs if before == "--adapter"]
    rest = [word for before, word in pairs if "--adapter" not in (before, word)]
    return [*rest, "--adapter-path", *folders] if folders else list(arguments)


if __name__ == "__main__":
    main()
