"""``mlx_loraplus.fuse``: fuse adapters into a base, write the folder, and report the quality."""

from collections.abc import Callable
from pathlib import Path

from ..adapters.merge import load_adapters, parse_adapters
from ..adapters.storage import adapter_folder
from ..adapters.stored_files import model_for
from ..config import FuseConfig
from ..files import check_free
from ..models.loading import load_folder, shared_copy, stored_dtypes
from ..models.registry import find_model
from ..userpaths import public_name, public_names
from .fuse import find_vision, fuse_adapter, leave_report, save_fused, size_on_disk
from .fuse_quality import (
    collect_answers,
    data_settings,
    gather_inputs,
    layer_change_table,
    losses,
    sample_examples,
)
from .written_files import MODEL, check_kinds, what_stays


def fuse_folder(config: FuseConfig, log: Callable[[str], None]) -> None:
    """Fold adapters into their base and write a folder that stock mlx_lm loads.

    Raises:
        AdapterError: An adapter does not fit the base.
        DataError: The data that ``config`` names can't be used.
        ModelError: The base can't be loaded or fused.
        OutputError: ``save_path`` is already in use.
    """
    # Report every error that can be found before the model is loaded.
    weights, save_path = parse_adapters(config.adapter_path), Path(config.save_path)
    folders = [adapter_folder(path) for path in weights]
    name = model_for(config.model, folders[0])
    check_free(save_path, [name, *weights, *config.data], overwrite=config.overwrite)
    check_kinds(save_path, MODEL)
    run = data_settings(config, folders, log)

    # Load the base, and apply the adapters to a copy that shares its arrays.
    source = find_model(name)
    if source.note:
        log(source.note)
    base, tokenizer, base_config = load_folder(source.path)
    vision = find_vision(base, source.path, keep=config.keep_vision, log=log)
    model = load_adapters(shared_copy(base), weights)

    # Collect both models' answers to training examples before the adapters are folded in.
    sample = sample_examples(run, base, tokenizer, config, log) if run else None
    figures = losses({"base": collect_answers(base, sample[0])}) if sample else {}
    del base
    answers = collect_answers(model, sample[0]) if sample else None
    inputs = gather_inputs(model, sample[1]) if sample else None

    # Fuse, and measure how well the changes are preserved.
    dtypes = stored_dtypes(source.path)
    changes = fuse_adapter(
        model, bits=config.bits, dequantize=config.dequantize, inputs=inputs, dtypes=dtypes
    )
    del inputs
    log(layer_change_table(changes))
    if sample and answers:
        fused = collect_answers(model, sample[0])
        figures |= losses({"base + adapter": answers, "fused": fused})
        shown = ", ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
        log(
            f"on {len(answers.targets):,} tokens of training examples, loss and"
            f" KL(base + adapter || fused): {shown}"
        )

    # Write the folder. If anything fails, nothing is written.
    size = size_on_disk(source.path)
    report = {
        "schema": 1,
        "model": public_name(name),
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
    log(f"fused {' and '.join(weights)} into {name}: {save_path} ({sizes})")
    log(f"try it: mlx_loraplus.generate --model {config.save_path} --prompt '...'")
