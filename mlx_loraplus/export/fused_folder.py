"""``mlx_loraplus.fuse``: from a base and adapters to a fused folder, with what the fuse kept."""

from collections.abc import Callable
from pathlib import Path

from ..adapters.merge import load_adapters, parse_adapters
from ..adapters.storage import adapter_folder
from ..config import FuseConfig
from ..files import check_free
from ..models.loading import load_folder, shared_copy, stored_dtypes
from ..models.registry import find_model
from ..userpaths import public_name, public_names
from .fuse import find_vision, fuse_adapter, leave_report, save_fused, size_of
from .fuse_quality import ask, gather_inputs, layer_change_table, losses, sample_rows, training_of
from .written import MODEL, check_kinds, what_stays


def fuse_folder(config: FuseConfig, log: Callable[[str], None]) -> None:
    """Fold adapters into their base and write a folder that stock mlx_lm loads.

    Raises:
        AdapterError: An adapter does not fit the base.
        ModelError: The base can't be loaded or fused.
        OutputError: ``save_path`` is not free.
    """
    # What can be refused is refused before the model is loaded.
    weights, save_path = parse_adapters(config.adapter_path), Path(config.save_path)
    folders = [adapter_folder(path) for path in weights]
    check_free(save_path, [config.model, *weights, *config.data], overwrite=config.overwrite)
    check_kinds(save_path, MODEL)
    rows_of = training_of(config, folders, log)

    # The base, and beside it a copy that shares its arrays and gets the adapters.
    source = find_model(config.model)
    if source.note:
        log(source.note)
    base, tokenizer, base_config = load_folder(source.path)
    vision = find_vision(base, source.path, keep=config.keep_vision, log=log)
    size = size_of(base, vision)
    model = load_adapters(shared_copy(base), weights)

    # What both answer on training rows, before the adapters are folded in.
    sample = sample_rows(rows_of, tokenizer, config, log) if rows_of else None
    figures = losses({"base": ask(base, sample[0])}) if sample else {}
    del base
    answers = ask(model, sample[0]) if sample else None
    inputs = gather_inputs(model, sample[1]) if sample else None

    # Fuse, and measure what was kept.
    dtypes = stored_dtypes(source.path)
    changes = fuse_adapter(
        model, bits=config.bits, dequantize=config.dequantize, inputs=inputs, dtypes=dtypes
    )
    del inputs
    log(layer_change_table(changes))
    if sample and answers:
        figures |= losses({"base + adapter": answers, "fused": ask(model, sample[0])})
        shown = ", ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
        log(
            f"on {len(answers.targets):,} tokens of training rows, loss and KL(base + adapter ||"
            f" fused): {shown}"
        )

    # Write the folder, whole or not at all.
    report = {
        "schema": 1,
        "model": public_name(config.model),
        "save_path": save_path.resolve().name,
        "adapters": {name: weights[path] for path, name in public_names(weights).items()},
        "bytes_before": size,
        "answers": figures,
        "layers": {change.path: change.figures() for change in changes},
    }
    written = save_fused(
        model, tokenizer, base_config, source.path, save_path, vision=vision, report=report
    )
    leave_report(save_path, folders, log)
    if line := what_stays(save_path, MODEL):
        log(line)

    sizes = f"{size / 1e9:.2f} → {written / 1e9:.2f} GB"
    log(f"fused {' and '.join(weights)} into {config.model}: {save_path} ({sizes})")
    log(f"try it: mlx_loraplus.generate --model {config.save_path} --prompt '...'")
