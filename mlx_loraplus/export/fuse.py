"""Fold an adapter into its base, W ← W + s B A for LoRA, and write a folder for stock mlx-lm."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_reduce, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import get_total_parameters, make_shards, save_config

from ..adapters.base_layers import quantization
from ..adapters.excluded_layers import READ, find_unusable
from ..adapters.token_tables import probe_tokens
from ..adapters.trainable import find_adapters, find_fully_trained
from ..adapters.unfreeze import end_training
from ..command_config import FuseConfig
from ..errors import AdapterError, ModelError, OutputError, counted
from ..failures import failure_of
from ..files import replacing_folder, write_atomically
from ..kernels.trunk_and_head import model_dtype
from ..models.find_model import missing_file
from ..models.loading import shared_copy, stored_dtypes
from ..models.prompt_format import PROMPT_FORMAT, format_of
from ..rich_display import Tracker, untracked
from ..runs.history import FUSED, Run
from ..runs.progress import Log
from ..runs.report import write_report
from ..runs.run_folder import is_run
from ..settings import configure
from .base_tensor_names import has_base_form, in_base_form, stored_tensors, weights_of
from .fuse_quality import LayerChange
from .fused_layer import (
    candidate_forms,
    dequantize_layer,
    fuse_layer,
    is_floating,
    is_quantized,
    replace_layer,
    stored_dtype,
)
from .stock_check import check_loads_unchanged, check_runs_in_mlx_lm
from .written_files import MODEL, PROCESSOR_FILES, is_one_of

_GROUP_SIZE = 64  # used when a plain model is quantized


def fuse_adapter(
    model: nn.Module,
    *,
    bits: int | Literal["auto"] = "auto",
    dequantize: bool = False,
    inputs: Mapping[str, Sequence[mx.array]] | None = None,
    dtypes: Mapping[str, mx.Dtype] | None = None,
    track: Tracker = untracked,
) -> list[LayerChange]:
    """Fold every adapter of ``model`` into its base, in place: W ← W + s B A for LoRA, in float32.

    A quantized layer is quantized again after the sum, and the rounding can erase a small change:
    at 4 bits, a change of 1% of the weight's norm is lost. With ``auto``, a layer that would lose
    its change gets the narrowest width that preserves the change, or full precision. Layers are
    replaced one at a time, and only a part of a layer is in full precision at any time.

    Args:
        model: A model with adapters. The adapters are removed.
        bits: The width of the fused layers of a quantized model, or of every layer of a plain one.
            auto: choose a width for each layer, as described above; a plain model stays plain.
        dequantize: Convert every layer of a quantized model to full precision.
        inputs: Path → the layer's inputs, (tokens, columns) each, from ``gather_inputs``. The
            weight is then rounded so that the layer's outputs change as intended. The result is
            measured on inputs that the rounding has not seen.
        dtypes: Name → type of the parameters in the base's folder, from ``stored_dtypes``. Needed
            if the model in memory has other types. Fused weights are rounded to these types, so
            that ``save_fused`` stores exactly the weights that were measured.
        track: Shows the progress.

    Returns:
        How well each layer preserves its change.

    Raises:
        ConfigError: ``bits`` is not allowed, or excluded by ``dequantize``.
        AdapterError: The model has no adapters, or an adapter's change is not finite.
        ModelError: A layer can't be quantized or dequantized.
    """
    configure(FuseConfig, {"bits": bits, "dequantize": dequantize})
    adapters = find_adapters(model)
    if not adapters:
        raise AdapterError("the model has no adapters to fuse: load or train some first")

    was_quantized = any(is_quantized(module) for _, module in model.named_modules())
    dtype = model_dtype(model)

    # Fuse the layers that have an adapter. Each adapter is removed from the mapping, so that its
    # base is freed once the layer is replaced.
    changes: list[LayerChange] = []
    for path in track(list(adapters), "fusing layers"):
        adapter = adapters.pop(path)
        forms = candidate_forms(adapter.base, bits, dequantize=dequantize)
        stored = stored_dtype(f"{path}.weight", dtypes) if dtypes else dtype
        known = (inputs or {}).get(path, ())
        layer, change = fuse_layer(path, adapter, forms, stored, known)
        replace_layer(model, path, layer)
        changes.append(change)

    for module in find_fully_trained(model).values():
        end_training(module)

    # Convert the layers without an adapter.
    if dequantize:
        _dequantize_all(model, dtype, dtypes)
    elif bits != "auto" and not was_quantized:
        quantize_plain(model, bits)

    # A run on the fused model must not name the model that was loaded, whose weights differ.
    for name in ("loaded_as", "exact_name"):
        if hasattr(model, name):
            delattr(model, name)
    return changes


def _dequantize_all(
    model: nn.Module, dtype: mx.Dtype, dtypes: Mapping[str, mx.Dtype] | None
) -> None:
    """Convert every layer that is still quantized to full precision."""
    for path, module in list(model.named_modules()):
        if is_quantized(module):
            replace_layer(model, path, dequantize_layer(path, module, dtype, dtypes))


def quantize_plain(model: nn.Module, bits: int) -> None:
    """Quantize every layer of a plain model that can be quantized, in place.

    As in ``mlx_lm.convert``, the model's ``quant_predicate`` may keep a layer as it is or give it
    another width. Routers of experts often get 8 bits.

    Raises:
        ModelError: mlx-lm has no quantized counterpart for a layer.
    """
    own_choice: Any = getattr(model, "quant_predicate", None)
    try:
        paths = _quantizable_layers(model)

        def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
            if path not in paths:
                return False
            return own_choice(path, module) if own_choice else True

        nn.quantize(model, group_size=_GROUP_SIZE, bits=bits, class_predicate=choose)

        # A layer type that only this family uses may fail when it is called.
        if type(model).__module__.startswith("mlx_lm."):
            mx.eval(model(probe_tokens(model, 3)))
    except (TypeError, ValueError) as problem:
        raise ModelError(
            f"mlx-lm can't quantize this model ({problem}): leave --bits out"
        ) from None


def _quantizable_layers(model: nn.Module) -> set[str]:
    """Return the paths of the layers that can be quantized."""
    # Some models use a layer's weight directly, without calling the layer.
    unusable = find_unusable(model)
    read_directly = {path for path, reason in unusable.items() if reason == READ}

    found: set[str] = set()
    for path, module in model.named_modules():
        if path in read_directly or not hasattr(module, "to_quantized"):
            continue
        if "weight" in module and module.weight.shape[-1] % _GROUP_SIZE == 0:
            found.add(path)
    return found


def as_stored(model: nn.Module, dtypes: Mapping[str, mx.Dtype]) -> nn.Module:
    """Return a copy of a model with its floating-point parameters in the base's stored types."""
    parameters: Any = tree_flatten(model.parameters())
    stored: list[tuple[str, mx.array]] = []
    for name, array in parameters:
        dtype = stored_dtype(name, dtypes) if is_floating(array) else array.dtype
        stored.append((name, array.astype(dtype)))

    copy = shared_copy(model)
    copy.update(tree_unflatten(stored))
    return copy


def save_fused(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    base_config: dict[str, Any],
    source: Path,
    save_path: Path,
    *,
    vision: Mapping[str, mx.array] | None = None,
    report: dict[str, Any] | None = None,
) -> int:
    """Write a fused model as a folder that stock ``mlx_lm.load`` opens.

    If anything fails, nothing is written.

    Args:
        model: The fused model.
        tokenizer: The base's tokenizer.
        base_config: The base's config.json.
        source: The base's folder. Parameters are stored in the types that it uses, and its other
            files are copied.
        save_path: The folder to write. A model in it is replaced; other files are kept.
        vision: Additional tensors to write, from ``find_vision``.
        report: The contents of fuse.json.

    Returns:
        The size of the weights in bytes.

    Raises:
        ModelError: mlx-lm would change the weights when it loads them, or can't run the model.
        OutputError: ``save_path`` can't be written; its contents are unchanged.
    """
    config = _fused_config(model, base_config)

    # Use the names and types of the base's files if they can express the weights.
    stored, is_as_base = model, False
    if missing_file(source) is None:
        stored = as_stored(model, stored_dtypes(source))
        is_as_base = has_base_form(stored, source)
    if not is_as_base:
        check_loads_unchanged(stored)
    size = size_of(stored, vision)

    with replacing_folder(save_path, is_ours=is_one_of(MODEL)) as folder:
        tensors = in_base_form(stored, source) if is_as_base else weights_of(stored)
        tensors |= vision or {}
        _save_weights(tensors, get_total_parameters(model), folder, save_path)
        save_config(config, folder / "config.json", keep_vision_config=bool(vision))
        tokenizer.save_pretrained(str(folder))

        processor_files = PROCESSOR_FILES if vision else ()
        for name in ("generation_config.json", *processor_files):
            if (source / name).is_file():
                shutil.copy(source / name, folder)

        # Compare with the model in memory, because this device is fast with its type.
        check_runs_in_mlx_lm(model, folder)
        if report is not None:
            text = json.dumps(report | {"bytes_after": size}, indent=1) + "\n"
            (folder / FUSED).write_text(text)
    return size


def _fused_config(model: nn.Module, base_config: dict[str, Any]) -> dict[str, Any]:
    """Return the base's config.json with the fused model's quantization and prompt format."""
    config = {
        name: value for name, value in base_config.items() if not name.startswith("quantization")
    }
    settings = quantization_of(model)
    if settings:
        config["quantization"] = settings
    config[PROMPT_FORMAT] = format_of(model).stored()
    return config


def _save_weights(
    tensors: dict[str, mx.array], parameters: int, folder: Path, save_path: Path
) -> None:
    """Write a model's tensors, in files of 5 GB, and their index.

    ``tensors`` is emptied, so that the tensors of a file are released once it is written.
    """
    shards = make_shards(tensors)
    total_size = sum(array.nbytes for array in tensors.values())
    tensors.clear()

    weight_map: dict[str, str] = {}
    count = len(shards)
    try:
        for number in range(1, count + 1):
            shard = shards.pop(0)
            name = (
                f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
            )
            mx.save_safetensors(str(folder / name), shard, metadata={"format": "mlx"})
            weight_map |= dict.fromkeys(shard, name)
    except RuntimeError as problem:
        # MLX raises this error if the disk is full, or if the device fails.
        if failure_of(problem) is not None:
            raise
        raise OutputError(f"can't write {save_path}: {problem}; free some space") from None

    metadata = {"total_size": total_size, "total_parameters": parameters}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))


def copy_report(fused: Path, folders: Iterable[Path], log: Log) -> None:
    """Copy a fused model's fuse.json to each run folder, and update the run's report."""
    for folder in folders:
        if not is_run(folder):
            continue

        # The model is already written, so the fuse does not fail if a run can't be updated.
        try:
            write_atomically(folder / FUSED, (fused / FUSED).read_bytes())
            write_report(Run.load(folder))
        except OutputError as problem:
            log(f"the run's report does not show {FUSED}: {problem}")


def size_of(model: nn.Module, vision: Mapping[str, mx.array] | None = None) -> int:
    """Return the size in bytes of a model's weights in memory plus the vision tensors."""

    def add(size: int, array: mx.array) -> int:
        return size + array.nbytes

    size: Any = tree_reduce(add, [model.parameters(), vision or {}], 0)
    return size


def size_on_disk(folder: Path) -> int:
    """Return the size in bytes of the tensors in a model's folder, without reading them."""
    return sum(array.nbytes for array in stored_tensors(folder).values())


def find_vision(model: nn.Module, source: Path, *, keep: bool, log: Log) -> dict[str, mx.array]:
    """Return the tensors of a multimodal model that mlx-lm leaves out.

    The tensors are read from disk when they are used.

    Args:
        model: The model as mlx-lm loads it.
        source: The model's folder.
        keep: If false, only report that such tensors exist, and return an empty dictionary.
        log: Called with the report.

    Raises:
        ModelError: With ``keep``, the folder has no such tensors, or their names do not distinguish
            them from the tensors of the text model.
    """
    tensors = stored_tensors(source)
    others = {
        name: array for name, array in tensors.items() if not name.startswith("language_model.")
    }
    is_multimodal = "language_model" in model

    if keep and (not is_multimodal or len(others) in (0, len(tensors))):
        raise ModelError(
            f"{source} has no vision tower beside tensors named language_model: leave"
            " --keep-vision out"
        )
    if is_multimodal and others and not keep:
        log(
            f"left out: {counted(len(others), 'tensor')} of {source}, not part of the text model;"
            " --keep-vision keeps them"
        )
    return others if keep else {}


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """Return config.json's ``quantization``: the most common setting, and the exceptions."""
    settings: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if is_quantized(module):
            settings[path] = quantization(module)
    if not settings:
        return None

    common = json.loads(mode(map(json.dumps, settings.values())))
    different = {path: setting for path, setting in settings.items() if setting != common}
    return common | different
