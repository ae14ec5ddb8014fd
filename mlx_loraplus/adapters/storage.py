"""The adapter's folder, in mlx-lm's own format: ``adapters.safetensors`` and ``adapter_config.json``.

What is saved here, stock ``mlx_lm.load(adapter_path=…)`` loads if it knows the layers, and what
mlx-lm saves is loaded here. The tensors' names say which modules are adapted and their shapes say
the rank; the rest comes from the config.

- A PiSSA adapter is stored as ``lora_matrices`` gives it, a LoRA of rank 2 r on the model as it
  was; ``start_rank`` says that its second half is the start.
- A quantized base that the adapter brought along (LoftQ) is stored with it, as
  ``<path>.linear.weight`` and so on. Stock mlx-lm refuses these tensors, as it must: A and B are
  nothing without that base.
- VeRA's ``vera_d`` and ``vera_b`` are stored with the projections that all layers share; stock
  mlx-lm refuses them too.
- Modules that train in full are in ``modules.safetensors``, so that stock mlx-lm can load the rest.
- ``base`` tells which weights the adapter was trained over. Another width of the same model is let
  pass, since only the same width can be compared; stock mlx-lm does not look at it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import mlx.core as mx
import mlx.nn as nn
import pydantic
from pydantic import Field
from safetensors import SafetensorError, safe_open

from ..config import AdapterKind
from ..errors import AdapterError, ConfigError, join_problems
from ..files import read_bounded, replacing, write_atomically
from ..models.prompt_format import PROMPT_FORMAT, PromptFormat, format_of
from ..settings import read_settings
from ..userpaths import user_path
from .adapter import Adapter, Projections
from .attach import adapt, find_adapters, find_fully_trained, layer_for, layers_of, put_adapters
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
from .tensor_parallel import is_sharded
from .unfreeze import own_arrays

WEIGHTS, CONFIG, MODULES = "adapters.safetensors", "adapter_config.json", "modules.safetensors"

_Config = TypeVar("_Config", bound=pydantic.BaseModel)
_PROJECTIONS = ("projection_a", "projection_b")


class _Parameters(pydantic.BaseModel):
    """``lora_parameters`` of ``adapter_config.json``; mlx-lm's other keys follow from the tensors."""

    rank: Annotated[int, Field(ge=1)] = 1
    scale: Annotated[float, Field(allow_inf_nan=False)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class _Quantization(pydantic.BaseModel):
    """How a base that is stored with the adapter is quantized."""

    group_size: Literal[16, 32, 64, 128]
    bits: Literal[2, 3, 4, 5, 6, 8]
    mode: Literal["affine", "mxfp4", "nvfp4", "mxfp8"]

    @property
    def names(self) -> list[str]:
        """The base's arrays."""
        return ["weight", "scales", *(["biases"] if self.mode == "affine" else [])]


class _Base(pydantic.BaseModel):
    """What the adapted layers were: a digest of their arrays, and how the first of them was quantized."""

    fingerprint: str
    quantization: dict[str, Any] | None = None


class StoredConfig(pydantic.BaseModel):
    """``adapter_config.json``, as far as it is read."""

    fine_tune_type: AdapterKind = "lora"
    lora_parameters: _Parameters
    start_rank: Annotated[int, Field(ge=1)] | None = None
    base_quantization: _Quantization | None = None
    base: _Base | None = None
    train_modules: list[str] = []
    prompt_format: dict[str, Any] = {}


def save_adapter(model: nn.Module, adapter_path: str | Path) -> Path:
    """Write the adapters of ``model`` to a folder, each file atomically.

    Args:
        model: A model with adapters.
        adapter_path: The folder; made if it is not there. Other files in it are left alone.

    Returns:
        The folder.

    Raises:
        AdapterError: The model has no adapters.
        OutputError: The folder can't be written; files that were there are left as they were.
    """
    adapters = find_adapters(model)
    if not adapters:
        raise AdapterError("the model has no adapters to save: attach or train some first")
    folder = Path(adapter_path)
    first = next(iter(adapters.values()))
    trained = find_fully_trained(model)
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
        config["train_modules"] = list(trained)
        _write(folder / MODULES, _named(trained))
    config[PROMPT_FORMAT] = format_of(model).stored()
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    weights = {
        f"{path}.{name}": array
        for path, adapter in adapters.items()
        for name, array in _stored(adapter).items()
    }
    if first.projections is not None:
        weights |= dict(zip(_PROJECTIONS, first.projections, strict=True))
    _write(folder / WEIGHTS, weights)
    return folder


def load_adapter(model: nn.Module, adapter_path: str | Path) -> nn.Module:
    """Put a saved adapter on ``model``; it can be used, trained on or fused.

    Args:
        model: The base that the adapter was trained on, without adapters.
        adapter_path: A folder written by ``save_adapter`` or by mlx-lm, or a file of mlx-lm's in
            one, such as ``0000100_adapters.safetensors``.

    Returns:
        The same model.

    Raises:
        AdapterError: The folder is no adapter's, or the adapter does not fit the model; every
            tensor that does not is told, with both shapes; or the model's weights are others. The
            model is left as it was.
    """
    # ~ is the home folder, as in the commands.
    try:
        path = Path(user_path(adapter_path))
    except ValueError as error:
        raise AdapterError(f"adapter_path {str(adapter_path)!r:.80} {error}") from None

    folder, weights = adapter_files(path)
    config = read_adapter_config(folder / CONFIG, StoredConfig, "; export --from peft reads PEFT's")
    learned = read_weights(folder / MODULES) if config.train_modules else {}
    return attach_saved(model, config, read_weights(folder / weights), learned, folder)


def adapter_files(path: Path) -> tuple[Path, str]:
    """Return an adapter's folder and its weights' name, of a folder or of mlx-lm's file in one.

    mlx-lm names adapters by their file: ``adapters.safetensors``, or
    ``0000100_adapters.safetensors`` for a checkpoint.

    Raises: AdapterError where it is a file with another name.
    """
    if path.is_dir() or path.suffix != ".safetensors":
        if path.is_file():
            raise AdapterError(f"{path} is a file, and no {WEIGHTS}: give the adapter's folder")
        return path, WEIGHTS
    if path.name != WEIGHTS and not re.fullmatch(rf"[0-9]+_{re.escape(WEIGHTS)}", path.name):
        raise AdapterError(
            f"{path} is no adapter of mlx-lm's by its name, {WEIGHTS} or 0000100_{WEIGHTS}: give"
            " the adapter's folder"
        )
    return path.parent, path.name


def adapter_folder(path: str | Path) -> Path:
    """Return the folder of an adapter that is given as a folder or as mlx-lm's file in one, as ``adapter_files``."""
    return adapter_files(Path(path))[0]


def attach_saved(
    model: nn.Module,
    config: StoredConfig,
    weights: Mapping[str, mx.array],
    learned: Mapping[str, mx.array],
    source: Path,
) -> nn.Module:
    """Put an adapter from ``source`` on ``model`` that is in the form in which ours are stored.

    ``learned`` holds the arrays of ``config.train_modules``.

    Raises: AdapterError where it does not fit the model, which is left as it was.
    """
    if find_adapters(model):
        raise AdapterError(
            "the model has adapters already: fuse them or load the model again before loading"
            " others"
        )
    if is_sharded(model) and (
        config.fine_tune_type != "lora" or config.base_quantization or config.train_modules
    ):
        raise AdapterError(
            f"{source} is no plain LoRA, and parallel tensor works with no other: use parallel data"
        )
    layers, projections = _sort(weights, config, source)
    modules = dict(model.named_modules())
    adapters: dict[str, Adapter] = {}
    problems: list[str] = []
    for path, arrays in layers.items():
        kind, settings = config.fine_tune_type, config.lora_parameters
        if path not in modules or not layer_for(kind, modules[path]):
            problems.append(f"{path[:200]!r} is no layer of this model that can be adapted")
            continue
        rank = arrays["lora_a"].shape[1] if "lora_a" in arrays else settings.rank
        adapters[path] = adapt(
            kind, modules[path], rank, settings.scale, settings.dropout, projections
        )
        misfits = _misfits(f"{path}.", arrays, _shapes(adapters[path], config))
        if projections is not None:
            misfits += _too_small(path, projections, base_shape(modules[path]))
        if not misfits:
            _fill(adapters[path], arrays, config)
        problems += misfits
    trained = {
        path: modules[path]
        for path in config.train_modules
        if path in modules.keys() - adapters.keys()
        if not modules[path].children() and not isinstance(modules[path], QUANTIZED)
    }
    problems += _misfits(
        "", learned, {name: array.shape for name, array in _named(trained).items()}
    )
    if problems:
        raise AdapterError(
            f"{source} belongs to another model{_own_model(source)}:"
            f" {join_problems(problems, most=3)}"
        )
    here = _describe(modules[path] for path in adapters)
    if config.base and config.base.quantization == here.quantization and config.base != here:
        raise AdapterError(
            f"{source} belongs to another model{_own_model(source)}: it fits in shape, but the"
            " weights it was trained over are not these; give its own base (to use it on this one"
            " nevertheless, remove base from adapter_config.json)"
        )
    put_adapters(model, adapters, trained)
    model.load_weights(
        [(name, array.astype(mx.float32)) for name, array in learned.items()], strict=False
    )
    model.prompt_format = PromptFormat.read(config.prompt_format)
    return model


def _own_model(folder: Path) -> str:
    """Return, in brackets, the model that a run trained in this folder, if it did."""
    with suppress(ConfigError):
        return f" (its run.yaml has model: {read_settings(folder / 'run.yaml').get('model')!r:.80})"
    return ""


def _describe(bases: Iterable[Any]) -> _Base:
    """Return what tells these layers from others."""
    layers = list(bases)
    arrays = [array for layer in layers for array in own_arrays(layer).values()]
    settings = quantization(layers[0]) if isinstance(layers[0], QUANTIZED) else None
    return _Base(fingerprint=fingerprint(arrays, whole_lines(layers)), quantization=settings)


def _named(trained: Mapping[str, nn.Module]) -> dict[str, mx.array]:
    """Return the arrays of modules by their full names."""
    return {
        f"{path}.{name}": array
        for path, module in trained.items()
        for name, array in own_arrays(module).items()
    }


def _stored(adapter: Adapter) -> dict[str, mx.array]:
    """Return what is stored of one adapter."""
    arrays = {name: adapter[name] for name in adapter.groups}
    if isinstance(adapter, LoRA):
        arrays["lora_a"], arrays["lora_b"] = adapter.lora_matrices()
    if adapter.owns_base:
        packed = {name: adapter.base.get(name) for name in ("weight", "scales", "biases")}
        arrays |= {
            f"{adapter.child}.{name}": array for name, array in packed.items() if array is not None
        }
    return arrays


def _write(path: Path, arrays: Mapping[str, mx.array]) -> None:
    with replacing(path) as file:
        mx.save_safetensors(file, dict(arrays), metadata={"format": "mlx"})


def read_adapter_config(path: Path, kind: type[_Config], hint: str = "") -> _Config:
    """Read an adapter's config, trusting nothing in it; ``hint`` goes with the error that it is of another kind.

    Raises:
        AdapterError: It is not there, or not of this kind.
    """
    try:
        return kind.model_validate(json.loads(read_bounded(path)))
    except OSError as error:
        raise AdapterError(
            f"{path.parent} holds no adapter: can't read {path.name} ({error.strerror})"
        ) from None
    except pydantic.ValidationError as error:
        problems = [
            f"{'.'.join(map(str, detail['loc']))} {detail['msg']}".strip()
            for detail in error.errors()
        ]
        raise AdapterError(
            f"{path} is no adapter's config: {join_problems(problems)}{hint}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from None


def read_weights(path: Path) -> dict[str, mx.array]:
    """Read a safetensors file, trusting nothing in it.

    Raises: AdapterError where it is not there, or its header does not describe exactly its bytes.
    """
    if not path.is_file():
        raise AdapterError(f"{path.parent} holds no adapter: there is no {path.name}")
    try:
        with safe_open(
            path, "numpy"
        ):  # checks the header's every shape, type and offset against the file
            pass
        weights: Any = mx.load(str(path))
        mx.eval(weights)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(
            f"{path} is broken or cut off: {' '.join(str(error).split())[:200]}"
        ) from None
    return weights


def _sort(
    weights: Mapping[str, mx.array], config: StoredConfig, file: Path
) -> tuple[dict[str, dict[str, mx.array]], Projections | None]:
    """Group tensors as path → name → array, and return projections apart, or raise AdapterError."""
    kind, projections = config.fine_tune_type, None
    kinds_layers = layers_of(kind).values()
    leaves = {name for layer in kinds_layers for name in layer.groups}
    of_an_adapter = re.compile(
        rf"(.+)\.({'|'.join(leaves)}|(?:linear|embedding)\.(?:weight|scales|biases))"
    )
    if any(layer.draw for layer in kinds_layers):
        a, b = (weights.get(name, mx.zeros(0)) for name in _PROJECTIONS)
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise AdapterError(
                f"{file} is no {kind} adapter: {' and '.join(_PROJECTIONS)} are missing or do"
                " not fit"
            )
        projections = a.astype(mx.float32), b.astype(mx.float32)
        weights = {name: array for name, array in weights.items() if name not in _PROJECTIONS}
    layers: dict[str, dict[str, mx.array]] = {}
    odd: list[str] = []
    for name, array in weights.items():
        if match := of_an_adapter.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = array
        else:
            odd.append(name)
    for path, arrays in layers.items() if "lora_a" in leaves else ():
        a = arrays.get("lora_a", mx.zeros(0))
        if a.ndim not in (2, 3) or (config.start_rank or 0) * 2 not in (0, a.shape[1]):
            odd.append(f"{path}.lora_a")
    if odd or not layers:
        raise AdapterError(
            f"{file} is no {kind} adapter:"
            f" {f'{odd[0]} does not belong there' if odd else 'it is empty'}"
        )
    return layers, projections


def _shapes(adapter: Adapter, config: StoredConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the arrays stored of ``adapter`` must have."""
    shapes = {name: adapter[name].shape for name in adapter.groups}
    if (packing := config.base_quantization) is not None:
        rows, columns = base_shape(adapter.base)
        lead = (*adapter.base.weight.shape[:-2], rows)
        shapes |= {
            f"{adapter.child}.{name}": (*lead, columns // packing.group_size)
            for name in packing.names
        }
        shapes[f"{adapter.child}.weight"] = (*lead, columns * packing.bits // 32)
    return shapes


def _misfits(
    prefix: str, found: Mapping[str, mx.array], wanted: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Say which arrays do not have the shapes that are wanted, are missing or have no place."""
    shapes = {name: array.shape for name, array in found.items()}
    return [
        f"{prefix}{name} has shape {shapes.get(name)}, the model wants {wanted.get(name)}"
        for name in sorted(shapes.keys() | wanted.keys())
        if shapes.get(name) != wanted.get(name)
    ]


def _too_small(path: str, projections: Projections, shape: tuple[int, int]) -> list[str]:
    """Say which of the projections do not reach over a layer of this (out, in)."""
    sides = zip(
        _PROJECTIONS,
        (projections[0].shape[0], projections[1].shape[1]),
        reversed(shape),
        strict=True,
    )
    return [
        f"{path}: {name} reaches over {has}, the model wants {wants}"
        for name, has, wants in sides
        if has < wants
    ]


def _fill(adapter: Adapter, arrays: Mapping[str, mx.array], config: StoredConfig) -> None:
    """Give ``adapter`` its stored arrays, which fit."""
    own = {name: arrays[name].astype(mx.float32) for name in adapter.groups}
    if (packing := config.base_quantization) is not None:
        packed = {name: arrays[f"{adapter.child}.{name}"] for name in packing.names}
        adapter.replace_base(packed_layer(adapter.base, packed, packing.model_dump()))
    if isinstance(adapter, LoRA):
        adapter.set_lora_matrices(
            own.pop("lora_a"), own.pop("lora_b"), start_rank=config.start_rank
        )
        adapter.settle()
    adapter.update(own)
