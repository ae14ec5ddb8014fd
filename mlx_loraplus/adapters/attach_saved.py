"""Put stored adapters on a model, after checking that their tensors fit it."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError, join_problems
from ..models.derived_weights import forget_derived
from ..models.prompt_format import PromptFormat
from ..models.vocabulary import known_vocabulary
from .attach import adapt, find_layer_class, put_adapters
from .base_layers import QUANTIZED, base_shape, blocks_of, packed_layer
from .damaged_files import how_to_restore
from .lora import Adapter, LoRA, Projections
from .stored_files import StoredConfig, check_floating, recorded_model
from .stored_tensors import (
    MISSING,
    PACKED,
    find_misfits,
    find_too_small,
    fingerprint_base,
    group_tensors,
    stored_shapes,
)
from .tensor_parallel import is_sharded
from .trainable import check_no_foreign_adapters, find_adapters
from .unfreeze import arrays_by_path


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
        AdapterError: The adapter does not fit the model, is incomplete, or holds values that are
            not finite. The model is not changed.
    """
    if find_adapters(model):
        raise AdapterError(
            "the model has adapters already: fuse them or load the model again before loading"
            " others"
        )
    check_no_foreign_adapters(model)
    is_plain = config.fine_tune_type == "lora" and not config.base_quantization
    if is_sharded(model) and (not is_plain or config.train_modules):
        raise AdapterError(
            f"{source} is not a plain LoRA, and --parallel tensor supports only plain LoRA: use"
            " --parallel data"
        )

    # Make the adapters and collect all problems before the model changes.
    layers, projections = group_tensors(weights, config, source)
    modules = dict(model.named_modules())
    adapters, problems = _build_adapters(modules, layers, projections, config)
    trained = _trainable_in_full(modules, config.train_modules, adapters)
    shapes = {name: array.shape for name, array in arrays_by_path(trained).items()}
    problems += find_misfits("", learned, shapes)
    for path in _named_by_keys(model, config):
        if path in modules and path not in layers:
            problems.append(f"{path}, which lora_parameters.keys names, {MISSING}")
    if problems and all(problem.endswith(MISSING) for problem in problems):
        raise AdapterError(
            f"{source} is incomplete: {join_problems(problems, most=1)}; {how_to_restore(source)}"
        )
    on_this_base = config.base and layers.keys() <= modules.keys()
    if problems and on_this_base and config.base == fingerprint_base([modules[p] for p in layers]):
        raise AdapterError(
            f"{source} was trained on this model, but its files were changed:"
            f" {join_problems(problems, most=1)}; {how_to_restore(source)}"
        )
    if problems:
        raise AdapterError(
            f"{source} belongs to another model{_own_model(source)}:"
            f" {join_problems(problems, most=1)}"
        )
    _check_values(source, {**weights, **learned})

    # The weights may differ although all shapes match.
    here = fingerprint_base([modules[path] for path in adapters])
    if config.base and config.base.quantization == here.quantization and config.base != here:
        raise AdapterError(
            f"{source} belongs to another model{_own_model(source)}: its shapes fit, but it was"
            " trained on other weights; load it on its own base (to use it on this one anyway,"
            " remove base from adapter_config.json)"
        )

    _check_vocabulary(model, config, source)

    put_adapters(model, adapters, trained)
    in_float32 = [(name, array.astype(mx.float32)) for name, array in learned.items()]
    model.load_weights(in_float32, strict=False)
    forget_derived(model)
    model.prompt_format = PromptFormat.read(config.prompt_format)
    return model


def _named_by_keys(model: nn.Module, config: StoredConfig) -> list[str]:
    """Return the paths that ``lora_parameters.keys`` may name; some may not exist."""
    keys = config.lora_parameters.keys or []
    blocks, count = blocks_of(model), config.num_layers
    if not keys or not isinstance(count, int):
        return keys

    # As in mlx-lm, a number below 1 means all blocks.
    path_of = {id(module): path for path, module in model.named_modules()}
    chosen = blocks[-max(count, 0) :]
    return [*keys, *(f"{path_of.get(id(block))}.{key}" for block in chosen for key in keys)]


def _check_vocabulary(model: nn.Module, config: StoredConfig, source: Path) -> None:
    """Raise ``AdapterError`` if tokens have other ids than when an adapter was trained."""
    vocabulary = known_vocabulary(model) if config.vocabulary else None
    if vocabulary and vocabulary != config.vocabulary:
        raise AdapterError(
            f"{source} was trained with another tokenizer, which gave other ids to the same tokens:"
            " get the model's tokenizer.json again from where the model is from (to use this one"
            " anyway, remove vocabulary from adapter_config.json)"
        )


def _check_values(source: Path, arrays: Mapping[str, mx.array]) -> None:
    """Raise ``AdapterError`` if an array holds NaN, infinite values or integers."""
    for name, array in arrays.items():
        if not name.endswith(PACKED):
            check_floating(source, name, array)
        if not mx.isfinite(array).all().item():
            raise AdapterError(
                f"{source} is damaged: {name} holds values that are not finite; use an earlier"
                " checkpoint, or train again with a lower learning rate"
            )


def _own_model(folder: Path) -> str:
    """Return a phrase with the model that an adapter's folder names, or an empty string."""
    model = None
    with suppress(AdapterError):
        model = recorded_model(folder)
    return f", {model!r:.200} (commands load that if you leave out --model)" if model else ""


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
        if path not in modules or not find_layer_class(kind, modules[path]):
            problems.append(f"{path[:200]!r} is not a layer of this model that can be adapted")
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
    modules: Mapping[str, nn.Module], paths: Iterable[str], adapters: Mapping[str, Adapter]
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


def _fill(adapter: Adapter, arrays: Mapping[str, mx.array], config: StoredConfig) -> None:
    """Set the arrays of ``adapter`` to the stored arrays, whose shapes have been checked."""
    # Set the base first, because ``update_derived`` computes values from it.
    packing = config.base_quantization
    if packing is not None:
        packed = {name: arrays[f"{adapter.child}.{name}"] for name in packing.names}
        adapter.replace_base(packed_layer(adapter.base, packed, packing.model_dump()))

    own = {name: arrays[name].astype(mx.float32) for name in adapter.groups}
    if isinstance(adapter, LoRA):
        a, b = own.pop("lora_a"), own.pop("lora_b")
        adapter.set_lora_matrices(a, b, start_rank=config.start_rank)
        adapter.update_derived()
    adapter.update(own)
