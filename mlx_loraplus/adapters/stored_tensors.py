"""The tensors in an adapter's file, and how they are compared with those that a model needs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import AdapterError
from .attach import layer_classes
from .base_layers import QUANTIZED, base_shape, fingerprint, quantization, whole_lines
from .damaged_files import how_to_restore
from .lora import Adapter, Projections
from .stored_files import BaseFingerprint, StoredConfig
from .unfreeze import own_arrays

PROJECTIONS = ("projection_a", "projection_b")
"""Names of the projections that all layers share."""


PACKED = (".linear.weight", ".embedding.weight", ".linear.scales", ".embedding.scales")
"""The ends of the names of a base's packed arrays that are stored with its adapter."""


def group_tensors(
    weights: Mapping[str, mx.array], config: StoredConfig, file: Path
) -> tuple[dict[str, dict[str, mx.array]], Projections | None]:
    """Return path → name → array of the adapters, and the shared projections, if any.

    Raises:
        AdapterError: A tensor is unknown, or an A is missing or has a wrong shape.
    """
    kind = config.fine_tune_type
    classes = layer_classes(kind).values()
    projections = None
    if any(layer.make_projections for layer in classes):
        projections = _stored_projections(weights, kind, file)
        weights = {name: array for name, array in weights.items() if name not in PROJECTIONS}

    # A name is the path of a module, followed by a parameter of the kind or an array of the base.
    leaves = {name for layer in classes for name in layer.groups}
    pattern = re.compile(
        rf"(.+)\.({'|'.join(leaves)}|(?:linear|embedding)\.(?:weight|scales|biases))"
    )
    layers: dict[str, dict[str, mx.array]] = {}
    unknown: list[str] = []
    for name, array in weights.items():
        match = pattern.fullmatch(name)
        if match is None:
            unknown.append(name)
        else:
            path, leaf = match.groups()
            layers.setdefault(path, {})[leaf] = array

    if unknown or not layers:
        reason = f"{unknown[0][:200]} is not known" if unknown else "it is empty"
        advice = how_to_restore(file)
        if unknown and unknown[0].startswith("base_model."):
            advice = "it is of PEFT: mlx_loraplus.export --from peft converts its whole folder"
        raise AdapterError(f"{file} holds no {kind} adapter: {reason}; {advice}")

    # Each layer needs an A, which gives its rank.
    if "lora_a" in leaves:
        for path, arrays in layers.items():
            _check_rank(f"{path[:200]}.lora_a", arrays.get("lora_a"), config.start_rank, file)
    matrices = [arrays["lora_a"] for arrays in layers.values() if "lora_a" in arrays]
    _check_stated_rank(config, [*matrices, *(projections or ())[:1]], file)
    return layers, projections


def _stored_projections(weights: Mapping[str, mx.array], kind: str, file: Path) -> Projections:
    """Return the stored projections, in float32.

    Raises:
        AdapterError: They are missing, or their ranks differ.
    """
    a, b = (weights.get(name, mx.zeros(0)) for name in PROJECTIONS)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise AdapterError(
            f"{file} holds no {kind} adapter: {' and '.join(PROJECTIONS)} are missing or do not fit"
        )
    return a.astype(mx.float32), b.astype(mx.float32)


def _check_rank(name: str, a: mx.array | None, start_rank: int | None, file: Path) -> None:
    """Check that an A exists, and has a rank that matches a start of ``start_rank``.

    Raises:
        AdapterError: It does not.
    """
    if a is None:
        raise AdapterError(f"{file} is incomplete: {name} {MISSING}; {how_to_restore(file)}")
    if a.ndim not in (2, 3) or not a.size:
        raise AdapterError(f"{file} is damaged: {name} has shape {a.shape}, which has no rank")
    # With a PiSSA start, the rank of A is twice that of the start.
    if start_rank is not None and a.shape[1] != 2 * start_rank:
        raise AdapterError(
            f"{file} is damaged: {name} has rank {a.shape[1]}, but start_rank {start_rank} in"
            f" adapter_config.json needs {2 * start_rank}"
        )


def _check_stated_rank(config: StoredConfig, matrices: list[mx.array], file: Path) -> None:
    """Check that the rank in the config, if there is one, is the largest of the matrices A.

    Raises:
        AdapterError: It is not; stock mlx-lm can't load such an adapter.
    """
    rank = max(a.shape[1] for a in matrices)
    settings = config.lora_parameters
    if "rank" in settings.model_fields_set and settings.rank != rank:
        raise AdapterError(
            f"{file} holds matrices of rank {rank}, but its adapter_config.json has rank"
            f" {settings.rank}: correct the rank there, or get the adapter again"
        )


def stored_shapes(adapter: Adapter, config: StoredConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the stored arrays of ``adapter`` must have, by name."""
    shapes: dict[str, tuple[int, ...]] = {name: adapter[name].shape for name in adapter.groups}

    packing = config.base_quantization
    if packing is not None:
        rows, columns = base_shape(adapter.base)
        lead = (*adapter.base.weight.shape[:-2], rows)
        for name in packing.names:
            shapes[f"{adapter.child}.{name}"] = (*lead, columns // packing.group_size)
        shapes[f"{adapter.child}.weight"] = (*lead, columns * packing.bits // 32)
    return shapes


MISSING = "is missing from the file"
"""The end of a message of ``find_misfits`` for an array that an adapter lacks."""


def find_misfits(
    prefix: str, found: Mapping[str, mx.array], wanted: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Return a message for each array that is missing, unknown, or has the wrong shape."""
    shapes = {name: array.shape for name, array in found.items()}
    problems: list[str] = []
    for name in sorted(shapes.keys() | wanted.keys()):
        shape, expected = shapes.get(name), wanted.get(name)
        if shape is None:
            problems.append(f"{prefix}{name} {MISSING}")
        elif expected is None:
            problems.append(f"{prefix}{name} has no place in the model")
        elif shape != expected:
            problems.append(f"{prefix}{name} has shape {shape}, the model needs {expected}")
    return problems


def find_too_small(path: str, projections: Projections, shape: tuple[int, int]) -> list[str]:
    """Return a message for each projection that is too small for a layer of this (out, in)."""
    rows, columns = shape
    a, b = projections
    sizes = {"projection_a": (a.shape[0], columns), "projection_b": (b.shape[1], rows)}

    problems: list[str] = []
    for name, (size, least) in sizes.items():
        if size < least:
            problems.append(f"{path}: {name} has size {size}, the model needs at least {least}")
    return problems


def fingerprint_base(layers: Sequence[Any]) -> BaseFingerprint:
    """Return the fingerprint of the weights of the layers below an adapter."""
    arrays = [array for layer in layers for array in own_arrays(layer).values()]
    settings = quantization(layers[0]) if isinstance(layers[0], QUANTIZED) else None
    digest = fingerprint(arrays, whole_lines(layers))
    return BaseFingerprint(fingerprint=digest, quantization=settings)
