"""``mlx_loraplus.fuse``: fuse adapters into a base, write the folder, and report the quality."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..adapters.combined_adapters import load_adapters, parse_adapters
from ..adapters.storage import adapter_folder
from ..adapters.stored_files import check_not_peft, is_model, model_for
from ..command_config import FuseConfig
from ..data.dataset import Examples
from ..errors import AdapterError, counted
from ..files import check_free
from ..models.find_model import find_model
from ..models.loading import load_folder, shared_copy, stored_dtypes
from ..rich_display import tracked
from ..userpaths import public_name, public_names, shell_word
from .base_tensor_names import stored_tensors
from .fuse import copy_report, find_vision, fuse_adapter, save_fused, size_on_disk
from .fuse_quality import (
    Answers,
    collect_answers,
    data_settings,
    gather_inputs,
    layer_change_table,
    losses,
    sample_examples,
)
from .fused_layer import is_quantized
from .whole_model import copy_model, note_if_plain, whole_model_of
from .written_files import MODEL, check_files_and_folders, kept_files_note


def fuse_folder(config: FuseConfig, log: Callable[[str], None]) -> None:
    """Fold adapters into their base and write a folder that stock mlx_lm loads.

    The folder of a run with adapter full is a whole model, which is copied, or quantized.

    Raises:
        AdapterError: An adapter does not fit the base.
        DataError: The data that ``config`` names can't be used.
        ModelError: The base can't be loaded or fused.
        OutputError: ``save_path`` is already in use.
    """
    # Report every error that can be found before the model is loaded.
    weights, save_path = parse_adapters(config.adapter_path), Path(config.save_path)
    whole = whole_model_of(weights, config.model)
    if whole is not None:
        copy_model(config, whole, log)
        return
    for path in weights:
        if is_model(path):
            raise AdapterError(
                f"{path} is a model, not an adapter: give the folder of a run or an adapter, and"
                f" --model {path} if this is its base; to try the model, mlx_loraplus.generate"
                f" --model {shell_word(path)} --prompt '...'"
            )
    folders = [adapter_folder(path) for path in weights]
    for folder in folders:
        check_not_peft(folder)
    name = model_for(config.model, folders[0])
    check_free(
        save_path,
        [name, *weights, *config.data],
        overwrite=config.overwrite,
        refused=("a run", "a sweep", "an adapter", "data"),
    )
    check_files_and_folders(save_path, MODEL)
    run = data_settings(config, folders, log)

    # Load the base, and apply the adapters to a copy that shares its arrays.
    source = find_model(name)
    if source.note:
        log(source.note)
    base, tokenizer, base_config = load_folder(source.path)
    vision = find_vision(base, source.path, keep=config.keep_vision, log=log)
    model = load_adapters(shared_copy(base), weights)

    if config.dequantize:
        note_if_plain(model, name, log)

    # If no weight is rounded, the fused model gives the same answers as base + adapter.
    if run and not _compares(config, model):
        log(
            "no weight is quantized, so the answers are not compared (--sample-tokens 2048 compares"
            " them anyway)"
        )
        run = None
    sample = sample_examples(run, base, tokenizer, config, log) if run else None

    # Fuse, and compare the answers of the base, base + adapter, and the fused model.
    comparison = _Comparison(sample)
    comparison.start(base, model)
    del base
    changes = fuse_adapter(
        model,
        bits=config.bits,
        dequantize=config.dequantize,
        inputs=comparison.inputs,
        dtypes=stored_dtypes(source.path),
        track=tracked,
    )
    comparison.inputs = None
    log(layer_change_table(changes))
    comparison.finish(model, log)

    # Write the folder. If anything fails, nothing is written.
    log(f"writing {save_path}")
    size = size_on_disk(source.path)
    report = {
        "schema": 1,
        "model": public_name(name),
        "save_path": save_path.resolve().name,
        "adapters": {short: weights[path] for path, short in public_names(weights).items()},
        "bytes_before": size,
        "answers": comparison.figures,
        "layers": {change.path: change.figures() for change in changes},
    }
    written = save_fused(
        model, tokenizer, base_config, source.path, save_path, vision=vision, report=report
    )
    copy_report(save_path, folders, log)
    if line := kept_files_note(save_path, MODEL):
        log(line)
    if line := renamed_weights_note(source.path, save_path):
        log(line)

    sizes = f"{size / 1e9:.2f} → {written / 1e9:.2f} GB"
    log(f"fused {' and '.join(weights)} into {name}: {save_path} ({sizes})")
    log(f"try it: mlx_loraplus.generate --model {shell_word(config.save_path)} --prompt '...'")


def renamed_weights_note(base: Path, fused: Path) -> str | None:
    """Return a note if an unquantized fused model has weights with mlx-lm's names or shapes.

    For example, mlx-lm joins the experts of a block into one weight. transformers expects the names
    of the original checkpoint.
    """
    stored = {name: array.shape for name, array in stored_tensors(base).items()}
    written = {name: array.shape for name, array in stored_tensors(fused).items()}
    if any(name.endswith(".scales") for name in written):
        return None

    # A quantized base shows no original names, but experts are always joined.
    if any(name.endswith(".scales") for name in stored):
        others = sorted(name for name in written if ".switch_mlp." in name)
    else:
        others = sorted(name for name, shape in written.items() if stored.get(name) != shape)
    if not others:
        return None
    return (
        "note: transformers can't load this model, because mlx-lm renamed or reshaped"
        f" {counted(len(others), 'weight')} of it, such as {others[0]}; for transformers, export"
        " the adapter with mlx_loraplus.export --to peft"
    )


@dataclass
class _Comparison:
    """The answers to a sample of training examples before and after the fuse.

    Attributes:
        sample: The examples to answer and those for ``inputs``, or None to compare nothing.
        figures: The loss of each model, in nats per token.
        inputs: The inputs of the adapted layers, for rounding.
    """

    sample: tuple[Examples, Examples] | None
    figures: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, list[mx.array]] | None = None
    _tuned: Answers | None = None

    def start(self, base: nn.Module, model: nn.Module) -> None:
        """Collect the answers of the base and of the model with its adapters."""
        if self.sample is None:
            return
        examples, others = self.sample
        self.figures = losses({"base": collect_answers(base, examples, "the base", tracked)})
        self._tuned = collect_answers(model, examples, "base + adapter", tracked)
        self.inputs = gather_inputs(model, others, tracked)

    def finish(self, model: nn.Module, log: Callable[[str], None]) -> None:
        """Collect the answers of the fused model, and report the comparison."""
        if self.sample is None or self._tuned is None:
            return
        fused = collect_answers(model, self.sample[0], "the fused model", tracked)
        self.figures |= losses({"base + adapter": self._tuned, "fused": fused})
        shown = ", ".join(f"{name} {figure:.4f}" for name, figure in self.figures.items())
        log(
            f"on {len(self._tuned.targets):,} tokens of training examples, loss and"
            f" KL(base + adapter || fused): {shown}"
        )


def _compares(config: FuseConfig, model: nn.Module) -> bool:
    """Return whether to compare answers: if weights are rounded, or the user asks for it."""
    if config.sample_tokens is not None or config.data:
        return True
    if config.dequantize:
        return False
    is_rounded = any(is_quantized(module) for _, module in model.named_modules())
    return is_rounded or config.bits != "auto"
