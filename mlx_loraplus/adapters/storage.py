"""Save and load adapters in mlx-lm's own format.

An adapter's folder holds ``adapters.safetensors`` and ``adapter_config.json``. Stock
``mlx_lm.load(adapter_path=…)`` loads adapters saved by this module if it supports their layers, and
this module loads adapters saved by mlx-lm. The names of the tensors give the adapted modules, and
their shapes give the rank. Everything else comes from the config.

- A PiSSA adapter is stored in the form of ``lora_matrices``, a LoRA of rank 2 r on the original
  model. If ``start_rank`` is set, the second half is the start.
- If the adapter has its own quantized base (LoftQ), the base is stored with the adapter, as
  ``<path>.linear.weight`` and so on. Stock mlx-lm rejects these tensors. This is intended, because
  A and B are useless without that base.
- VeRA's ``vera_d`` and ``vera_b`` are stored with the projections that all layers share. Stock
  mlx-lm rejects these tensors too.
- Modules that train in full are in ``modules.safetensors``, so that stock mlx-lm can load the rest.
- ``model`` names the base, so that an adapter can be used without naming it again: a name, a hub
  id or an absolute path.
- ``base`` identifies the weights that the adapter was trained on. It is checked only against a
  model with the same quantization; the same model quantized differently is accepted. Stock mlx-lm
  ignores both keys.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError, join_problems
from ..files import replacing, write_atomically
from ..models.prompt_format import PROMPT_FORMAT, PromptFormat, format_of
from ..models.run_paths import lasting_name
from ..userpaths import user_path
from .adapter import Adapter, Projections
from .attach import (
    adapt,
    find_adapters,
    find_fully_trained,
    layer_for,
    put_adapters,
)
from .layers import (
    QUANTIZED,
    base_shape,
    blocks_of,
    fingerprint,
    packed_layer,
    quantization,
    whole_lines,
)
from .lora import LoRA
from .stored_files import (
    CONFIG,
    MODULES,
    WEIGHTS,
    BaseFingerprint,
    StoredConfig,
    adapter_files,
    check_is_adapter,
    read_adapter_config,
    read_weights,
    recorded_model,
)
from .stored_tensors import (
    MISSING,
    PROJECTIONS,
    find_misfits,
    find_too_small,
    group_tensors,
    stored_shapes,
)
from .tensor_parallel import is_sharded
from .unfreeze import own_arrays

# Saving


def save_adapter(model: nn.Module, adapter_path: str | Path) -> Path:
    """Write the adapters of ``model`` to a folder, each file atomically.

    Args:
        model: A model with adapters.
        adapter_path: The folder, created if it does not exist. Other files in it are not changed.

    Returns:
        The folder.

    Raises:
        AdapterError: The model has no adapters.
        OutputError: The folder cannot be written. Existing files are not changed.
    """
    adapters = find_adapters(model)
    if not adapters:
        raise AdapterError("the model has no adapters to save: attach or train some first")
    folder = Path(adapter_path)

    # Write the modules that train in full first, so that the config never names a missing file.
    trained = find_fully_trained(model)
    if trained:
        _write(folder / MODULES, _arrays_by_path(trained))

    # Write the weights last, because an adapter is complete only with them.
    config = _config_of(model, adapters, list(trained))
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    _write(folder / WEIGHTS, _tensors_of(adapters))
    return folder


def _config_of(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    trained: list[str],
) -> dict[str, Any]:
    """Return the contents of ``adapter_config.json``; mlx-lm's own keys come first."""
    first = next(iter(adapters.values()))
    config: dict[str, Any] = {
        "fine_tune_type": first.kind,
        "num_layers": len(blocks_of(model)),
        "lora_parameters": {
            "rank": first.lora_matrices()[0].shape[1],
            "scale": first.scale,
            "dropout": first.dropout.p,
            "keys": list(adapters),
        },
    }

    if isinstance(first, LoRA) and first.has_start:
        config["start_rank"] = first.rank
    if first.owns_base:
        config["base_quantization"] = quantization(first.base)
    else:
        config["base"] = _describe(adapter.base for adapter in adapters.values()).model_dump()
    if trained:
        config["train_modules"] = trained
    if name := getattr(model, "exact_name", None):
        config["model"] = lasting_name(name)
    config[PROMPT_FORMAT] = format_of(model).stored()
    return config


def _tensors_of(adapters: Mapping[str, Adapter]) -> dict[str, mx.array]:
    """Return the contents of ``adapters.safetensors``."""
    tensors: dict[str, mx.array] = {}
    for path, adapter in adapters.items():
        for name, array in _stored(adapter).items():
            tensors[f"{path}.{name}"] = array

    # All adapters share their projections, which are stored once.
    first = next(iter(adapters.values()))
    if first.projections is not None:
        tensors |= dict(zip(PROJECTIONS, first.projections, strict=True))
    return tensors


def _stored(adapter: Adapter) -> dict[str, mx.array]:
    """Return the arrays that are stored for one adapter, by name."""
    arrays = {name: adapter[name] for name in adapter.groups}
    if isinstance(adapter, LoRA):
        arrays["lora_a"], arrays["lora_b"] = adapter.lora_matrices()

    if adapter.owns_base:
        for name in ("weight", "scales", "biases"):
            array = adapter.base.get(name)
            if array is not None:
                arrays[f"{adapter.child}.{name}"] = array
    return arrays


def _describe(bases: Iterable[Any]) -> BaseFingerprint:
    """Return the fingerprint of the weights of these layers."""
    layers = list(bases)
    arrays = [array for layer in layers for array in own_arrays(layer).values()]
    settings = quantization(layers[0]) if isinstance(layers[0], QUANTIZED) else None
    digest = fingerprint(arrays, whole_lines(layers))
    return BaseFingerprint(fingerprint=digest, quantization=settings)


def _arrays_by_path(modules: Mapping[str, nn.Module]) -> dict[str, mx.array]:
    """Return the arrays of modules by their full names."""
    arrays: dict[str, mx.array] = {}
    for path, module in modules.items():
        for name, array in own_arrays(module).items():
            arrays[f"{path}.{name}"] = array
    return arrays


def _write(path: Path, arrays: Mapping[str, mx.array]) -> None:
    """Write a safetensors file atomically."""
    with replacing(path) as file:
        mx.save_safetensors(file, dict(arrays), metadata={"format": "mlx"})


# Loading


def load_adapter(model: nn.Module, adapter_path: str | Path) -> nn.Module:
    """Put a saved adapter on ``model``, for inference, training or fusing.

    Args:
        model: The base that the adapter was trained on, without adapters.
        adapter_path: A folder written by ``save_adapter`` or by mlx-lm, or one of mlx-lm's weights
            files in such a folder, e.g. ``0000100_adapters.safetensors``.

    Returns:
        The same model.

    Raises:
        AdapterError: The folder does not hold an adapter, the adapter does not fit the model (the
            message gives the stored and the expected shapes), or the adapter was trained on other
            weights than the model's. The model is not changed.
    """
    # Expand ~ to the home folder, as on the command line.
    try:
        path = Path(user_path(adapter_path))
    except ValueError as error:
        raise AdapterError(f"adapter_path {str(adapter_path)!r:.80} {error}") from None

    folder, weights = adapter_files(path)
    check_is_adapter(folder)
    config = read_adapter_config(folder / CONFIG, StoredConfig)
    learned = read_weights(folder / MODULES) if config.train_modules else {}
    return attach_saved(model, config, read_weights(folder / weights), learned, folder)


def adapter_folder(path: str | Path) -> Path:
    """Return the folder of the adapter at ``path``; ``path`` is as for ``adapter_files``."""
    folder, _ = adapter_files(Path(path))
    return folder


def attach_saved(
    model: nn.Module,
    config: StoredConfig,
    weights: Mapping[str, mx.array],
    learned: Mapping[str, mx.array],
    source: Path,
) -> nn.Module:
    """Put an adapter in the stored form on ``model``.

    Args:
        model: The base, without adapters.
        config: The adapter's config.
        weights: The adapter's tensors.
        learned: The arrays of ``config.train_modules``.
        source: The folder that error messages name.

    Returns:
        The same model.

    Raises:
        AdapterError: The adapter does not fit the model, is incomplete, or holds numbers that are
            not finite. The model is not changed.
    """
    if find_adapters(model):
        raise AdapterError(
            "the model has adapters already: fuse them or load the model again before loading"
            " others"
        )
    is_plain = config.fine_tune_type == "lora" and not config.base_quantization
    if is_sharded(model) and (not is_plain or config.train_modules):
        raise AdapterError(
            f"{source} is not a plain LoRA, and parallel tensor supports only plain LoRA: use"
            " parallel data"
        )

    # Make the adapters and collect all problems before the model changes.
    layers, projections = group_tensors(weights, config, source)
    modules = dict(model.named_modules())
    adapters, problems = _build_adapters(modules, layers, projections, config)
    trained = _trainable_in_full(modules, config.train_modules, adapters)
    shapes = {name: array.shape for name, array in _arrays_by_path(trained).items()}
    problems += find_misfits("", learned, shapes)
    if problems and all(problem.endswith(MISSING) for problem in problems):
        raise AdapterError(f"{source} is incomplete: {join_problems(problems, most=1)}")
    if problems:
        raise AdapterError(
            f"{source} belongs to another model{_own_model(source)}:"
            f" {join_problems(problems, most=1)}"
        )
    _check_finite(source, {**weights, **learned})

    # The weights may differ although all shapes match.
    here = _describe(modules[path] for path in adapters)
    if config.base and config.base.quantization == here.quantization and config.base != here:
        raise AdapterError(
            f"{source} belongs to another model{_own_model(source)}: it fits in shape, but the"
            " weights it was trained over are not these; load it on its own base (to use it on this"
            " one anyway, remove base from adapter_config.json)"
        )

    put_adapters(model, adapters, trained)
    in_float32 = [(name, array.astype(mx.float32)) for name, array in learned.items()]
    model.load_weights(in_float32, strict=False)
    model.prompt_format = PromptFormat.read(config.prompt_format)
    return model


def _check_finite(source: Path, arrays: Mapping[str, mx.array]) -> None:
    """Raise ``AdapterError`` if an array holds NaN or infinite numbers."""
    for name, array in arrays.items():
        if not mx.isfinite(array).all().item():
            raise AdapterError(
                f"{source} is damaged: {name} holds numbers that are not finite; use an earlier"
                " checkpoint, or train again with a lower learning rate"
            )


def _own_model(folder: Path) -> str:
    """Return the model that an adapter's folder names, for an error message, or nothing."""
    with suppress(AdapterError):
        if model := recorded_model(folder):
            return f", {model!r:.200} (commands load that if you leave out --model)"
    return ""


def _build_adapters(
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, Mapping[str, mx.array]],
    projections: Projections | None,
    config: StoredConfig,
) -> tuple[dict[str, Adapter], list[str]]:
    """Return path → adapter with its stored arrays, and a message for each misfit."""
    kind, settings = config.fine_tune_type, config.lora_parameters
    adapters: dict[str, Adapter] = {}
    problems: list[str] = []
    for path, arrays in layers.items():
        if path not in modules or not layer_for(kind, modules[path]):
            problems.append(f"{path[:200]!r} is no layer of this model that can be adapted")
            continue

        # Each layer has its own rank, which is the rank of its A.
        rank = arrays["lora_a"].shape[1] if "lora_a" in arrays else settings.rank
        adapter = adapt(kind, modules[path], rank, settings.scale, settings.dropout, projections)
        adapters[path] = adapter

        misfits = find_misfits(f"{path}.", arrays, stored_shapes(adapter, config))
        if projections is not None:
            misfits += find_too_small(path, projections, base_shape(modules[path]))
        if not misfits:
            _fill(adapter, arrays, config)
        problems += misfits
    return adapters, problems


def _trainable_in_full(
    modules: Mapping[str, nn.Module],
    paths: Iterable[str],
    adapters: Mapping[str, Adapter],
) -> dict[str, nn.Module]:
    """Return path → module for the modules at ``paths`` that can train in full."""
    trained: dict[str, nn.Module] = {}
    for path in paths:
        module = modules.get(path)
        if module is None or path in adapters:
            continue
        if not module.children() and not isinstance(module, QUANTIZED):
            trained[path] = module
    return trained


def _fill(
    adapter: Adapter,
    arrays: Mapping[str, mx.array],
    config: StoredConfig,
) -> None:
    """Set the arrays of ``adapter`` to the stored arrays, whose shapes have been checked."""
    # Set the base first, because ``settle`` computes values from it.
    packing = config.base_quantization
    if packing is not None:
        packed = {name: arrays[f"{adapter.child}.{name}"] for name in packing.names}
        adapter.replace_base(packed_layer(adapter.base, packed, packing.model_dump()))

    own = {name: arrays[name].astype(mx.float32) for name in adapter.groups}
    if isinstance(adapter, LoRA):
        a, b = own.pop("lora_a"), own.pop("lora_b")
        adapter.set_lora_matrices(a, b, start_rank=config.start_rank)
        adapter.settle()
    adapter.update(own)
