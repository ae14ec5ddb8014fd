"""Save and load adapters in mlx-lm's own format.

An adapter's folder holds ``adapters.safetensors`` and ``adapter_config.json``. Stock
``mlx_lm.load(adapter_path=…)`` loads adapters saved by this module if it supports their layers, and
this module loads adapters saved by mlx-lm. The names of the tensors give the adapted modules, and
their shapes give the rank. Everything else comes from the config.

- A PiSSA adapter is stored in the form of ``lora_matrices``, a LoRA of rank 2 r on the original
  model. If ``start_rank`` is set, the second half is the start.
- If the adapter has its own quantized base (``quantize``), the base is stored with the adapter, as
  ``<path>.linear.weight`` and so on. Stock mlx-lm rejects these tensors. This is intended, because
  A and B are useless without that base.
- VeRA's ``vera_d`` and ``vera_b`` are stored with the projections that all layers share. Stock
  mlx-lm rejects these tensors too.
- Modules that train in full are in ``modules.safetensors``, so that stock mlx-lm can load the rest.
- ``model`` names the base by a short name, a hub id or an absolute path, so that the user need not
  name it again.
- ``base`` identifies the weights that the adapter was trained on. It is checked only against a
  model with the same quantization; the same model quantized differently is accepted.
- ``vocabulary`` identifies the ids of the tokens that the adapter was trained with.
- ``made_with`` holds the settings that the adapter was made with; see ``made_with.py``.

Stock mlx-lm ignores the last four keys.
"""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AdapterError, OutputError
from ..files import check_contents, remove_folder, replacing, write_atomically
from ..models.moved_run_paths import lasting_name
from ..models.prompt_format import PROMPT_FORMAT, format_of
from ..models.save_model_folder import save_model_folder
from ..models.vocabulary import known_vocabulary
from ..userpaths import path_of
from .attach_saved import attach_saved
from .base_layers import blocks_of, quantization
from .full import trains_weights
from .lora import Adapter, LoRA
from .made_with import read_record, record, recorded_settings
from .stored_files import (
    CONFIG,
    MODULES,
    WEIGHTS,
    StoredConfig,
    adapter_files,
    check_is_adapter,
    read_adapter_config,
    read_weights,
)
from .stored_tensors import PROJECTIONS, fingerprint_base
from .trainable import find_adapters, find_fully_trained
from .unfreeze import arrays_by_path

# Saving


def save_adapter(
    model: nn.Module, adapter_path: str | PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write the adapters of ``model`` to a folder, each file atomically.

    Args:
        model: A model with adapters.
        adapter_path: The folder, created if it does not exist. Other files in it are not changed.
        overwrite: Replace the adapter in the folder.

    Returns:
        The folder.

    Raises:
        AdapterError: The model has no adapters, or they hold NaN or infinite values.
        OutputError: The folder holds a run, a sweep, a model, data or (without ``overwrite``) an
            adapter, or cannot be written. Existing files are not changed.
    """
    folder = path_of(adapter_path, "--adapter-path", OutputError)
    check_contents(folder, ("a run", "a sweep", "a model", "data"), "--adapter-path")
    _check_finite(model)
    held = [name for name in (WEIGHTS, CONFIG, MODULES) if (folder / name).exists()]
    if held and not overwrite:
        raise OutputError(
            f"{folder} already holds an adapter ({held[0]}): give another --adapter-path, or"
            " --overwrite"
        )
    is_new = not folder.exists()
    try:
        return write_adapter(model, folder)
    except OutputError:
        if is_new:  # leave no part of an adapter
            remove_folder(folder)
        raise


def _check_finite(model: nn.Module) -> None:
    """Check that adapters can be used once they are saved.

    Raises:
        AdapterError: A value of an adapter is not finite.
    """
    finite: dict[str, mx.array] = {}
    for path, adapter in find_adapters(model).items():
        for name in adapter.groups:
            finite[f"{path}.{name}"] = mx.isfinite(adapter[name]).all()
    mx.eval(finite)
    for name, is_finite in finite.items():
        if not is_finite.item():
            raise AdapterError(
                f"{name} holds values that are not finite, as after a training that diverged, so it"
                " would be of no use: train again with a lower learning rate"
            )


def write_trained(model: nn.Module, tokenizer: TokenizerWrapper, folder: Path) -> None:
    """Write the adapters of ``model`` to a folder, or the whole model if its weights train.

    Raises:
        AdapterError: The model has neither.
        OutputError: The folder cannot be written. Existing files are not changed.
    """
    if trains_weights(model):
        save_model_folder(model, tokenizer, folder)
    else:
        write_adapter(model, folder)


def write_adapter(model: nn.Module, folder: Path) -> Path:
    """Write the adapters of ``model`` to a folder, and replace those in it.

    Raises:
        AdapterError: The model has no adapters.
        OutputError: The folder cannot be written. Existing files are not changed.
    """
    adapters = find_adapters(model)
    if not adapters:
        raise AdapterError("the model has no adapters to save: attach or train some first")

    # Write the modules that train in full first, so that the config never names a missing file.
    trained = find_fully_trained(model)
    if trained:
        _write(folder / MODULES, arrays_by_path(trained))

    # Write the weights last, because an adapter is complete only with them.
    config = _config_of(model, adapters, list(trained))
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    _write(folder / WEIGHTS, _tensors_of(adapters))
    return folder


def _config_of(
    model: nn.Module, adapters: Mapping[str, Adapter], trained: list[str]
) -> dict[str, Any]:
    """Return the contents of ``adapter_config.json``."""
    # mlx-lm's own keys.
    first = next(iter(adapters.values()))
    config: dict[str, Any] = {
        "fine_tune_type": first.kind,
        "num_layers": len(blocks_of(model)),
        "lora_parameters": {
            "rank": max(adapter.lora_matrices()[0].shape[1] for adapter in adapters.values()),
            "scale": first.scale,
            "dropout": first.dropout.p,
            "keys": list(adapters),
        },
    }

    # Our keys; the module's docstring explains the less obvious ones.
    if isinstance(first, LoRA) and first.has_start:
        config["start_rank"] = first.rank
    if first.owns_base:
        config["base_quantization"] = quantization(first.base)
    else:
        bases = [adapter.base for adapter in adapters.values()]
        config["base"] = fingerprint_base(bases).model_dump()
    if trained:
        config["train_modules"] = trained
    vocabulary = known_vocabulary(model)
    if vocabulary:
        config["vocabulary"] = vocabulary
    name = getattr(model, "exact_name", None)
    if name:
        config["model"] = lasting_name(name)
    config[PROMPT_FORMAT] = format_of(model).stored()
    made_with = recorded_settings(first)
    if made_with:
        config["made_with"] = made_with
    return config


def _tensors_of(adapters: Mapping[str, Adapter]) -> dict[str, mx.array]:
    """Return the contents of ``adapters.safetensors``."""
    tensors: dict[str, mx.array] = {}
    for path, adapter in adapters.items():
        for name, array in _arrays_of(adapter).items():
            tensors[f"{path}.{name}"] = array

    # All adapters share their projections, which are stored once.
    first = next(iter(adapters.values()))
    if first.projections is not None:
        tensors |= dict(zip(PROJECTIONS, first.projections, strict=True))
    return tensors


def _arrays_of(adapter: Adapter) -> dict[str, mx.array]:
    """Return the arrays that are stored for one adapter, by name."""
    # The keys of ``groups`` are the names of the parameters that train.
    arrays = {name: adapter[name] for name in adapter.groups}
    if isinstance(adapter, LoRA):
        # With a PiSSA start, the stored A and B include it.
        arrays["lora_a"], arrays["lora_b"] = adapter.lora_matrices()

    if adapter.owns_base:
        for name in ("weight", "scales", "biases"):
            array = adapter.base.get(name)
            if array is not None:
                arrays[f"{adapter.child}.{name}"] = array
    return arrays


def _write(path: Path, arrays: Mapping[str, mx.array]) -> None:
    """Write a safetensors file atomically."""
    with replacing(path) as file:
        mx.save_safetensors(file, dict(arrays), metadata={"format": "mlx"})


# Loading


def load_adapter(model: nn.Module, adapter_path: str | PathLike[str]) -> nn.Module:
    """Put a saved adapter on ``model``, for inference, training or fusing.

    Args:
        model: The base that the adapter was trained on, without adapters.
        adapter_path: A run, a folder written by ``save_adapter`` or by mlx-lm, or one of mlx-lm's
            weights files in such a folder, e.g. ``0000100_adapters.safetensors``.

    Returns:
        The same model.

    Raises:
        AdapterError: The folder does not hold an adapter, the adapter does not fit the model (the
            message gives the stored and the expected shapes), or the adapter was trained on other
            weights than the model's. The model is not changed.
    """
    path = path_of(adapter_path, "--adapter-path", AdapterError)
    folder, weights = adapter_files(path)
    check_is_adapter(folder)
    config = read_adapter_config(folder / CONFIG, StoredConfig)
    learned = read_weights(folder / MODULES) if config.train_modules else {}
    attach_saved(model, config, read_weights(folder / weights), learned, folder)
    record(model, read_record(config, folder))
    return model


def adapter_folder(path: str | PathLike[str]) -> Path:
    """Return the folder of the adapter at ``path``; ``path`` is as for ``adapter_files``."""
    folder, _ = adapter_files(Path(path))
    return folder
