"""An adapter folded into its base, W ← W + s B A for LoRA, and a folder that stock mlx-lm loads."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_reduce, tree_unflatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import save_config, save_model

from ..adapters.adapter import Adapter
from ..adapters.attach import find_adapters, find_fully_trained
from ..adapters.layers import (
    QUANTIZED,
    base_shape,
    full_weight,
    packed_layer,
    plain_layer,
    quantization,
)
from ..adapters.selection import READ, find_unusable
from ..adapters.tables import probe_tokens
from ..adapters.unfreeze import end_training
from ..errors import AdapterError, ModelError, OutputError
from ..files import replacing_folder, write_atomically
from ..kernels.head import model_dtype
from ..models.loading import shared_copy, stored_dtypes
from ..models.prompt_format import PROMPT_FORMAT, format_of
from ..models.registry import missing_file
from ..runs.history import FUSED, Run
from ..runs.ownership import is_run
from ..runs.progress import Log
from ..runs.report import write_report
from .fuse_quality import LayerChange
from .gptq import inverse_factors, quantize
from .written import MODEL, PROCESSOR_FILES, is_one_of

WIDTHS = (2, 3, 4, 5, 6, 8)
PART = 2**19  # weights that are in full precision at a time
COLUMN_PART = (
    2**22
)  # the same where columns are worked off one by one, which takes many rows to be quick


def fuse_adapter(
    model: nn.Module,
    *,
    bits: int | Literal["auto"] = "auto",
    dequantize: bool = False,
    inputs: Mapping[str, Sequence[mx.array]] | None = None,
    dtypes: Mapping[str, mx.Dtype] | None = None,
) -> list[LayerChange]:
    """Fold every adapter of ``model`` into its base, in place, summed in float32: W ← W + s B A for LoRA.

    A quantized layer is quantized again after the sum, which rounds a small change away: at 4 bits
    1% of the weight's norm is lost. By ``auto`` a layer whose change does not survive gets the next
    width that keeps it, or all. One layer after the other is replaced, and of each only a part is
    in full precision at a time.

    Args:
        model: A model with adapters; none are left.
        bits: Quantize to this many bits: the fused layers of a quantized model, every layer of a
            plain one; auto: as above, and a plain model stays plain.
        dequantize: Leave every layer of a quantized model in full precision.
        inputs: Path of a layer → what it is given, (tokens, columns) each, from ``gather_inputs``.
            Its weight is then rounded so that its outputs change as meant, and judged by that on
            inputs that the rounding has not seen.
        dtypes: What the base's folder stores its parameters in, from ``stored_dtypes``, where the
            model in memory is of another type: what is fused is rounded to these, so that
            ``save_fused`` stores what was measured.

    Returns: What became of each layer's change.

    Raises: AdapterError where the model has no adapters, or one of them is not finite.
    """
    adapters = find_adapters(model)
    if not adapters:
        raise AdapterError("the model has no adapters to fuse: load or train some first")
    was_quantized = any(_is_quantized(module) for _, module in model.named_modules())
    dtype = model_dtype(model)
    changes = []
    for path in list(adapters):
        adapter = adapters.pop(path)  # so that its base goes when it is replaced
        choices = _choices(adapter.base, bits, dequantize=dequantize)
        known = list((inputs or {}).get(path, ()))
        seen, unseen = [x for n, x in enumerate(known) if n % 4 != 3], known[3::4] or known
        factors = inverse_factors(seen) if seen and choices[0] else []
        for settings in choices:
            stored = stored_dtype(f"{path}.weight", dtypes) if dtypes else dtype
            layer, change = _fused_layer(path, adapter, settings, stored, factors, unseen)
            if not math.isfinite(change.ratio):
                raise AdapterError(
                    f"{path}'s change is not finite: the run went wrong there; train again"
                )
            if change.preserved or settings is choices[-1]:
                _replace(model, path, layer)
                changes.append(change)
                break
    for module in find_fully_trained(model).values():
        end_training(module)
    if dequantize:
        for path, module in list(model.named_modules()):
            if _is_quantized(module):
                _replace(model, path, _dequantized(path, module, dtype, dtypes))
    elif bits != "auto" and not was_quantized:
        try:
            read = {
                path for path, why in find_unusable(model).items() if why == READ
            }  # as numbers, past the layer
            nn.quantize(
                model,
                group_size=64,
                bits=bits,
                class_predicate=lambda path, module: (
                    path not in read and _can_quantize(path, module)
                ),
            )
            if type(model).__module__.startswith("mlx_lm."):
                mx.eval(model(probe_tokens(model, 3)))
        except (
            TypeError,
            ValueError,
        ) as problem:  # a layer of a family's own that can't be, or whose weight is read
            raise ModelError(
                f"mlx-lm can't quantize this model ({problem}): leave --bits out"
            ) from None
    return changes


def _choices(
    base: Any, bits: int | Literal["auto"], *, dequantize: bool
) -> list[dict[str, Any] | None]:
    """Return how the fused layer may be stored, None being in full: the first that keeps the change is taken."""
    own = quantization(base) if isinstance(base, QUANTIZED) else None
    if dequantize or (own is None and bits == "auto"):
        return [None]
    if own and bits == own["bits"]:
        return [own]
    sizes = [own["group_size"]] if own and own["mode"] == "affine" else []
    size = next((size for size in (*sizes, 64, 32) if base_shape(base)[1] % size == 0), None)
    widths = (
        [width for width in WIDTHS if width > own["bits"]] if own and bits == "auto" else [bits]
    )
    affine = [{"group_size": size, "bits": width, "mode": "affine"} for width in widths if size]
    return [own, *affine, None] if bits == "auto" else [*affine] or [None]


def _fused_layer(
    path: str,
    adapter: Adapter,
    settings: dict[str, Any] | None,
    dtype: mx.Dtype,
    factors: Sequence[mx.array],
    inputs: Sequence[mx.array],
) -> tuple[nn.Module, LayerChange]:
    """Return the layer that does alone what ``adapter`` and its base do together, and how well by these ``inputs``.

    It is quantized as ``settings`` say, None for not at all; ``dtype`` is that of its weights, or
    of their scales.
    """
    base: Any = adapter.base
    was = quantization(base) if isinstance(base, QUANTIZED) else None
    change = LayerChange(path, _stored_as(was, base.weight.dtype), _stored_as(settings, dtype))
    found: dict[str, list[mx.array]] = {}
    held = base.weight.dtype if was is None else (base.get("biases", base.scales)).dtype
    for part in _parts(base, COLUMN_PART if factors else PART):
        weight = full_weight(base, mx.float32, part)
        merged = adapter.merged(weight, part)
        if settings is None:
            arrays = {"weight": merged.astype(dtype)}
        else:
            same = settings == was and base.mode == "affine"
            grid = (base["scales"][part], base["biases"][part]) if same else None
            arrays = quantize(merged, settings, dtype, grid, factors)
        if (
            held == mx.float32
        ):  # exactly the numbers that will be stored, in the type that a CPU is quick in
            arrays = {
                name: array.astype(held) if _is_floating(array) else array
                for name, array in arrays.items()
            }
        change.add(weight, merged, full_weight(_layer(base, arrays, settings), mx.float32), inputs)
        for name, array in arrays.items():
            found.setdefault(name, []).append(array)
        mx.eval(arrays)
    return (
        _layer(base, {name: mx.concatenate(pieces) for name, pieces in found.items()}, settings),
        change,
    )


def stored_dtype(name: str, dtypes: Mapping[str, mx.Dtype]) -> mx.Dtype:
    """Return what a parameter is stored in: as in the base, or as its layer or else most of the base is."""
    layer = name.rpartition(".")[0]
    for known in (name, f"{layer}.weight", f"{layer}.scales"):
        if known in dtypes:
            return dtypes[known]
    return mode(dtypes.values()) if dtypes else mx.bfloat16


def _is_floating(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def as_stored(model: nn.Module, dtypes: Mapping[str, mx.Dtype]) -> nn.Module:
    """Return a copy of a model whose floating parameters are of the types that its base's folder has them in."""
    copy = shared_copy(model)
    arrays: Any = tree_flatten(model.parameters())
    copy.update(
        tree_unflatten(
            [(n, a.astype(stored_dtype(n, dtypes)) if _is_floating(a) else a) for n, a in arrays]
        )
    )
    return copy


def _layer(base: Any, arrays: dict[str, mx.array], settings: dict[str, Any] | None) -> nn.Module:
    return (
        plain_layer(base, arrays["weight"])
        if settings is None
        else packed_layer(base, arrays, settings)
    )


def _parts(base: Any, size: int) -> Iterator[slice]:
    """Cut a base's rows, or its experts, into parts of about ``size`` weights."""
    rows, columns = base_shape(base)
    step = max(1, size // (columns if base.weight.ndim == 2 else rows * columns))
    for start in range(0, base.weight.shape[0], step):
        yield slice(start, start + step)


def _stored_as(settings: dict[str, Any] | None, dtype: mx.Dtype) -> str:
    """Say how a layer is stored."""
    if settings is None:
        return str(dtype).rpartition(".")[2]
    return f"{settings['bits']} bits" if settings["mode"] == "affine" else settings["mode"]


def _is_quantized(module: nn.Module) -> bool:
    """Tell whether a layer's weight is quantized, whatever its class, e.g. those of multi-head latent attention."""
    return "weight" in module and "scales" in module and hasattr(module, "bits")


def _dequantized(
    path: str, module: Any, dtype: mx.Dtype, dtypes: Mapping[str, mx.Dtype] | None = None
) -> nn.Module:
    """Return a quantized layer in full precision, its weight rounded to what it will be stored in.

    Raises: ModelError where its plain kind is not known.
    """
    if isinstance(module, QUANTIZED):
        weight = full_weight(module, mx.float32)
        if dtypes:
            weight = weight.astype(stored_dtype(f"{path}.weight", dtypes))
        return plain_layer(module, weight.astype(dtype))
    if type(module).__name__ != "QuantizedMultiLinear":
        raise ModelError(
            f"{path} ({type(module).__name__}) can't be dequantized: leave --dequantize out"
        )

    scales, biases = module.scales, module.get("biases")
    if biases is not None:  # as in full_weight
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    layer = MultiLinear(1, 1, 1)
    layer.weight = mx.dequantize(module.weight, scales, biases, **quantization(module), dtype=dtype)
    return layer


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put ``layer`` at ``path``, computed now: one layer at a time is in full precision."""
    mx.eval(layer.parameters())
    model.update_modules(tree_unflatten([(path, layer)]))


def _can_quantize(_: str, module: Any) -> bool:
    return (
        hasattr(module, "to_quantized") and "weight" in module and module.weight.shape[-1] % 64 == 0
    )


def _check_loads_unchanged(model: Any) -> None:
    """Raise ModelError where mlx-lm would change the weights when it loads them, as Baichuan's plain head."""
    if not hasattr(model, "sanitize"):
        return
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    copied: Any = shared_copy(model)
    try:
        read: dict[str, mx.array] = copied.sanitize(
            dict(weights)
        )  # a copy: some take their own parts off
    except (KeyError, ValueError):  # what is taken off already
        return
    for name, array in read.items():
        own = weights.get(name)
        if own is None or array is own:
            continue
        if (
            array.shape != own.shape
            or (mx.abs(array - own).max() > 1e-3 * mx.abs(own).max()).item()
        ):
            raise ModelError(
                f"mlx-lm would change {name} when it loads this model: leave --dequantize and"
                " --bits out"
            )


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
    """Write a fused model as a folder that stock ``mlx_lm.load`` opens, whole or not at all; return its size in bytes.

    Each parameter is stored in the type that ``source`` has it in. ``base_config`` is the base's
    config.json and ``source`` its folder, for the other files. ``vision``, from ``find_vision``, is
    written too, and ``report`` as fuse.json. A model in ``save_path`` is replaced; other files
    stay.

    Raises: OutputError where the place can't be written; what it held is left as it was.
    """
    written = {
        name: value for name, value in base_config.items() if not name.startswith("quantization")
    }
    if settings := quantization_of(model):
        written["quantization"] = settings
    written[PROMPT_FORMAT] = format_of(model).stored()
    beside: Any = tree_unflatten(list(vision.items())) if vision else {}
    if missing_file(source) is None:
        model = as_stored(model, stored_dtypes(source))
    _check_loads_unchanged(model)
    size = size_of(model, vision)
    with replacing_folder(save_path, is_ours=is_one_of(MODEL)) as folder:
        try:
            for name, tree in beside.items():
                model[name] = tree  # so that it is saved with the rest
            save_model(folder, model)
        except RuntimeError as problem:  # mlx tells a full disk so
            raise OutputError(f"can't write {save_path}: {problem}; free some space") from None
        finally:
            for name in beside:
                model.pop(name, None)
        save_config(written, folder / "config.json", keep_vision_config=bool(beside))
        tokenizer.save_pretrained(str(folder))
        for name in ("generation_config.json", *(PROCESSOR_FILES if beside else ())):
            if (source / name).is_file():
                shutil.copy(source / name, folder)
        if report is not None:
            (folder / FUSED).write_text(json.dumps(report | {"bytes_after": size}, indent=1) + "\n")
    return size


def leave_report(fused: Path, folders: Iterable[Path], log: Log) -> None:
    """Copy a fused model's fuse.json into those of the adapters' folders that are a run's, and renew its page."""
    for folder in folders:
        if is_run(folder):
            try:
                write_atomically(folder / FUSED, (fused / FUSED).read_bytes())
                write_report(Run.load(folder))
            except (
                OutputError
            ) as problem:  # the model is written: that a run can't be written to is no failure
                log(f"the run's page does not show {FUSED}: {problem}")


def size_of(model: nn.Module, vision: Mapping[str, mx.array] | None = None) -> int:
    """Return the size of a model's weights in bytes, with those beside it."""
    size: Any = tree_reduce(
        lambda size, array: size + array.nbytes, [model.parameters(), vision or {}], 0
    )
    return size


def find_vision(model: nn.Module, source: Path, *, keep: bool, log: Log) -> dict[str, mx.array]:
    """Return the tensors in a multimodal model's folder that mlx-lm leaves out, unread until they are used.

    Without ``keep`` return none, and tell that they are there.

    Raises: ModelError where there are none to keep, or what is not text can't be told by its name.
    """
    tensors: dict[str, mx.array] = {}
    for file in sorted(source.glob("model*.safetensors")):
        tensors |= mx.load(str(file))  # pyright: ignore[reportArgumentType, reportCallIssue, reportOperatorIssue]
    beside = {
        name: array for name, array in tensors.items() if not name.startswith("language_model.")
    }
    if keep and ("language_model" not in model or len(beside) in (0, len(tensors))):
        raise ModelError(
            f"{source} has no vision tower beside tensors named language_model: leave"
            " --keep-vision out"
        )
    if "language_model" in model and beside and not keep:
        log(
            f"{len(beside)} tensors of {source} that are not text are left out; --keep-vision keeps"
            " them"
        )
    return beside if keep else {}


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """Return config.json's ``quantization`` entry: the commonest setting, and the layers that differ from it."""
    settings = {
        path: quantization(module)
        for path, module in model.named_modules()
        if _is_quantized(module)
    }
    if not settings:
        return None
    common = json.loads(mode(map(json.dumps, settings.values())))
    return common | {path: setting for path, setting in settings.items() if setting != common}
