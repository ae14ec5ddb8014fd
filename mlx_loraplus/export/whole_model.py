"""Copy, quantize or publish a whole model, such as the result of a run with adapter full."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from huggingface_hub import ModelCard
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.stored_files import is_model_folder
from ..command_config import FuseConfig
from ..errors import AdapterError
from ..files import check_free
from ..models.loading import load_folder
from ..models.save_model_folder import ModelOrigin, save_model_folder
from ..rich_display import tracked
from ..runs.history import PLOT, SETTINGS, Run
from ..userpaths import public_name, shell_word
from .fuse import find_vision, quantize_plain, save_fused, size_on_disk
from .fuse_quality import collect_answers, data_settings, losses, sample_examples
from .fused_layer import is_quantized
from .hub import licence_of, model_card
from .written_files import MODEL, check_files_and_folders, kept_files_note


def whole_model_of(weights: Mapping[str, float], model: str | None) -> Path | None:
    """Return the folder of the run that trained a whole model, or None if none of the runs did.

    Args:
        weights: Each folder, with its weight.
        model: The base that the user gave.

    Raises:
        AdapterError: A whole model is given together with a base, an adapter or a weight.
    """
    whole = [folder for folder in weights if _is_full_run(folder)]
    if not whole:
        return None

    folder = whole[0]
    if model is not None or len(weights) > 1 or weights[folder] != 1.0:
        raise AdapterError(
            f"{folder} is a whole model, which can't be added to others or weighted: give it alone,"
            " without --model"
        )
    return Path(folder)


def _is_full_run(folder: str) -> bool:
    """Return whether a folder holds the model that a run with adapter full has written."""
    return is_model_folder(folder) and (Path(folder) / SETTINGS).is_file()


def copy_model(config: FuseConfig, folder: Path, log: Callable[[str], None]) -> None:
    """Write a whole model as a folder of its own, quantized if ``bits`` is given.

    Raises:
        DataError: The data that ``config`` names can't be used.
        ModelError: The model can't be loaded or quantized.
        OutputError: ``save_path`` is already in use.
    """
    save_path = Path(config.save_path)
    check_free(save_path, [str(folder), *config.data], overwrite=config.overwrite)
    check_files_and_folders(save_path, MODEL)
    model, tokenizer, base_config = load_folder(folder)
    vision = find_vision(model, folder, keep=config.keep_vision, log=log)

    # Quantize it, and compare the answers before and after.
    is_rounded = config.bits != "auto" and not any(map(is_quantized, model.modules()))
    if config.dequantize:
        note_if_plain(model, str(folder), log)
    if not is_rounded and (config.data or config.sample_tokens):
        log("note: no weight is rounded, so the answers are not compared")
    run = data_settings(config, [folder], log) if is_rounded else None
    sample = sample_examples(run, model, tokenizer, config, log) if run else None
    before = None if sample is None else collect_answers(model, sample[0], "the model", tracked)
    if config.bits != "auto":
        quantize_plain(model, config.bits)
    if sample is not None and before is not None:
        after = collect_answers(model, sample[0], "the quantized model", tracked)
        figures = losses({"before": before, "quantized": after})
        shown = ", ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
        log(
            f"on {len(before.targets):,} tokens of training examples, loss and"
            f" KL(before || quantized): {shown}"
        )

    log(f"writing {save_path}")
    size = size_on_disk(folder)
    written = save_fused(model, tokenizer, base_config, folder, save_path, vision=vision)
    if line := kept_files_note(save_path, MODEL):
        log(line)
    sizes = f"{size / 1e9:.2f} → {written / 1e9:.2f} GB"
    log(f"{folder} has no adapter to fuse, so its weights are copied: {save_path} ({sizes})")
    log(f"try it: mlx_loraplus.generate --model {shell_word(config.save_path)} --prompt '...'")


def write_model_repository(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: Mapping[str, Any],
    source: Path,
    repo_id: str,
    folder: Path,
) -> None:
    """Write a folder for the hub: the whole model for mlx-lm, and a model card.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        config: Its config.json.
        source: The folder that it was loaded from. If it is a run's folder, the card describes it.
        repo_id: The repository's id, owner/name.
        folder: The folder to fill.
    """
    model.origin = ModelOrigin(source, config)
    save_model_folder(model, tokenizer, folder)

    run = Run.load(source) if (source / SETTINGS).is_file() else None
    if (source / PLOT).is_file():
        shutil.copy(source / PLOT, folder)
    base = public_name(str(source) if run is None else run.config.model)
    card: ModelCard = model_card(base, licence_of(base), repo_id, run, ["model"])
    card.save(folder / "README.md")


def note_if_plain(model: nn.Module, name: str, log: Callable[[str], None]) -> None:
    """Report that ``--dequantize`` has no effect on a model without quantized layers."""
    if not any(map(is_quantized, model.modules())):
        log(f"note: --dequantize changes nothing, because no weight of {name} is quantized")
