"""The adapter's folder, in mlx-lm's own format: ``adapters.safetensors`` and ``adapter_config.json``.

What is saved here, stock ``mlx_lm.load(adapter_path=…)`` loads, and what mlx-lm saves is loaded here. The tensors'
names say which modules are adapted and their shapes say the rank; only scale and dropout come from the config.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError, join_problems
from ..places import read_bounded, replacing, write_atomically
from .attach import blocks_of, find_adapters, put_adapters
from .lora import Adapter, adapt, can_adapt

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def save_adapter(model: nn.Module, adapter_path: str | Path) -> Path:
    """Write the adapters of ``model`` to a folder that stock mlx-lm loads, each file atomically.

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
    parameters = {"rank": first.rank, "scale": first.scale, "dropout": first.dropout.p, "keys": list(adapters)}
    config = {"fine_tune_type": "lora", "num_layers": len(blocks_of(model)), "lora_parameters": parameters}
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    weights = {f"{path}.{name}": adapter[name] for path, adapter in adapters.items() for name in adapter.groups}
    with replacing(folder / WEIGHTS) as file:
        mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    return folder


def load_adapter(model: nn.Module, adapter_path: str | Path) -> nn.Module:
    """Put a saved adapter on ``model``; it can be used, trained on or fused.

    Args:
        model: The base that the adapter was trained on, without adapters.
        adapter_path: A folder written by ``save_adapter`` or by mlx-lm.

    Returns:
        The same model.

    Raises:
        AdapterError: The folder is no adapter's, or the adapter does not fit the model; every tensor that does not is
            told, with both shapes. The model is left as it was.
    """
    folder = Path(adapter_path)
    if find_adapters(model):
        raise AdapterError("the model has adapters already: fuse them or load the model again before loading others")
    scale, dropout = _read_config(folder / CONFIG)
    pairs = _pair_up(read_weights(folder / WEIGHTS), folder)
    modules = dict(model.named_modules())
    adapters: dict[str, Adapter] = {}
    problems: list[str] = []
    for path, pair in pairs.items():
        if path not in modules or not can_adapt(modules[path]):
            problems.append(f"{path[:200]!r} is no layer of this model that can be adapted")
            continue
        rank = pair["lora_a"].shape[1 if pair["lora_a"].ndim == 3 else -1]
        adapter = adapt(modules[path], rank, scale, dropout)
        for name, array in pair.items():
            if array.shape != adapter[name].shape:
                problems.append(f"{path}.{name} has shape {array.shape}, the model wants {adapter[name].shape}")
        adapter.update({name: array.astype(mx.float32) for name, array in pair.items()})
        adapters[path] = adapter
    if problems:
        raise AdapterError(f"{folder} belongs to another model: {join_problems(problems, most=3)}")
    put_adapters(model, adapters)
    return model


def _read_config(path: Path) -> tuple[float, float]:
    """Return (scale, dropout) from mlx-lm's adapter config."""
    try:
        config: Any = json.loads(read_bounded(path).decode("utf-8"))
    except OSError as error:
        raise AdapterError(f"{path.parent} holds no adapter: can't read {path.name} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from None
    kind = config.get("fine_tune_type", "lora") if isinstance(config, dict) else None
    if kind != "lora":
        raise AdapterError(f"{path} has fine_tune_type {kind!r:.60}: only 'lora' is read")
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale: Any = parameters.get("scale")
    dropout: Any = parameters.get("dropout", 0.0)
    if not _is_number(scale) or not _is_number(dropout) or not 0 <= dropout < 1:
        raise AdapterError(f"{path} needs lora_parameters with a number as scale and a dropout in [0, 1)")
    return float(scale), float(dropout)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def read_weights(path: Path) -> dict[str, mx.array]:
    """Read a safetensors file, trusting nothing in it.

    Raises:
        AdapterError: It is not there, or its header does not describe exactly its bytes.
    """
    if not path.is_file():
        raise AdapterError(f"{path.parent} holds no adapter: there is no {path.name}")
    try:
        with safe_open(path, "numpy"):  # checks the header's every shape, type and offset against the file
            pass
        weights: Any = mx.load(str(path))
        mx.eval(weights)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{path} is broken or cut off: {' '.join(str(error).split())[:200]}") from None
    return weights


def _pair_up(weights: dict[str, mx.array], folder: Path) -> dict[str, dict[str, mx.array]]:
    """Group tensors as path → {"lora_a", "lora_b"}."""
    pairs: dict[str, dict[str, mx.array]] = {}
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        pairs.setdefault(path, {})[leaf] = array
    odd = [
        path
        for path, pair in pairs.items()
        if pair.keys() != {"lora_a", "lora_b"} or {a.ndim for a in pair.values()} - {2, 3}
    ]
    if odd or not pairs:
        what = f"{odd[0][:200]!r} is no lora_a and lora_b pair" if odd else "it is empty"
        raise AdapterError(f"{folder / WEIGHTS} is no LoRA adapter: {what}")
    return pairs
