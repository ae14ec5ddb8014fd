"""Combine weighted adapters on one base: W + Σ wᵢ (Wᵢ - W), where Wᵢ is W merged with adapter i."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import AdapterError, ConfigError
from .attach import put_adapters
from .base_layers import EMBEDDINGS, WHOLE
from .lora import Adapter
from .storage import load_adapter
from .stored_files import WEIGHTS
from .trainable import find_adapters, find_fully_trained
from .unfreeze import end_training, own_arrays

LARGEST_WEIGHT = 1000.0


class MergedAdapters(Adapter):
    """Several weighted adapters over one base, for inference and fusing.

    The outputs are y + Σ wᵢ (yᵢ - y), where y is the base's output and yᵢ that of adapter i.
    """

    def __init__(self, adapters: Sequence[Adapter], weights: Sequence[float]):
        super().__init__(adapters[0].base, 1.0, 0.0)

        # A tuple, so that MLX does not register the adapters as submodules.
        self._parts = tuple(zip(adapters, weights, strict=True))

    @property
    def parts(self) -> tuple[tuple[Adapter, float], ...]:
        """The adapters and their weights."""
        return self._parts

    def _combined(self, y: mx.array, *others: mx.array) -> mx.array:
        """Return y + Σ wᵢ (yᵢ - y)."""
        weights = [weight for _, weight in self._parts]
        changes = [weight * (other - y) for weight, other in zip(weights, others, strict=True)]
        return y + sum(changes)

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        """Return y, in the shape of the base's output."""
        parts: list[Any] = [adapter for adapter, _ in self._parts]
        y = self.base(x, *args, **options)
        return self._combined(y, *(part(x, *args, **options) for part in parts))

    def merged(self, weight: mx.array, part: slice = WHOLE) -> mx.array:
        """Return W + Σ wᵢ (Wᵢ - W); the arguments are those of ``Adapter.merged``."""
        return self._combined(weight, *(adapter.merged(weight, part) for adapter, _ in self._parts))


class MergedEmbedding(MergedAdapters):
    """Several weighted adapters over an embedding, which may also be the model's head.

    This is a separate class, because a layer over a linear head must not have ``as_linear``.
    """

    child = "embedding"

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the tied head's logits."""
        parts: list[Any] = [adapter for adapter, _ in self._parts]
        return self._combined(self.base.as_linear(x), *(part.as_linear(x) for part in parts))


def parse_adapters(words: Sequence[str]) -> dict[str, float]:
    """Return folder → weight, from words such as ``my_run`` and ``my_run:0.7``.

    Raises:
        ConfigError: A weight is 0 or too large, or a folder is given twice.
    """
    found: dict[str, float] = {}
    places: set[Path] = set()
    for word in words:
        folder, colon, number = word.rpartition(":")
        if not colon or Path(word).exists():
            folder, number = word, "1"

        # A word that does not end with a number is a folder with a colon in its name.
        try:
            weight = float(number)
        except ValueError:
            folder, weight = word, 1.0

        # A folder may also be given as its weights file.
        place = Path(folder).resolve()
        if place.name == WEIGHTS:
            place = place.parent
        if place in places:
            raise ConfigError(f"--adapter-path {word!r}: give each folder once")
        if not 0 < abs(weight) <= LARGEST_WEIGHT:
            raise ConfigError(
                f"--adapter-path {word!r}: give a weight other than 0, of at most"
                f" {LARGEST_WEIGHT:g}, as {folder}:0.7"
            )
        found[folder] = weight
        places.add(place)
    return found


def load_adapters(model: nn.Module, weights: dict[str, float]) -> nn.Module:
    """Put weighted adapters on ``model``, for inference or fusing.

    Args:
        model: The base, without adapters.
        weights: The adapters' folders and weights, from ``parse_adapters``.

    Returns:
        The same model.

    Raises:
        AdapterError: One of several adapters has its own base, or ``load_adapter`` fails.
    """
    # A single adapter with weight 1 needs no merging.
    if list(weights.values()) == [1.0]:
        return load_adapter(model, next(iter(weights)))

    # Load the adapters one by one, and remove each from the model before loading the next.
    base: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    parts: dict[str, list[tuple[Adapter, float]]] = {}
    trained: dict[str, mx.array] = {}
    for folder, weight in weights.items():
        load_adapter(model, folder)
        adapters = find_adapters(model)
        if any(adapter.owns_base for adapter in adapters.values()):
            raise AdapterError(
                f"{folder} brings its own quantized base (--quantize): fuse it alone, without a"
                " weight"
            )
        for path, adapter in adapters.items():
            parts.setdefault(path, []).append((adapter, weight))
        _add_trained(trained, model, base, weight)
        _take_off(model, adapters, base)

    # Modules that were trained in full have no adapter. Write their weighted sum to the base.
    in_base_type = [(name, array.astype(base[name].dtype)) for name, array in trained.items()]
    model.load_weights(in_base_type, strict=False)

    # Every adapted layer gets one adapter that combines all its adapters.
    merged: dict[str, Adapter] = {}
    for path, weighted in parts.items():
        layers = [adapter for adapter, _ in weighted]
        numbers = [weight for _, weight in weighted]
        on_embedding = isinstance(layers[0].base, EMBEDDINGS)
        layer_type = MergedEmbedding if on_embedding else MergedAdapters
        merged[path] = layer_type(layers, numbers)
    put_adapters(model, merged, {})
    return model


def _add_trained(
    trained: dict[str, mx.array], model: nn.Module, base: Mapping[str, mx.array], weight: float
) -> None:
    """Add the weighted changes of the modules that train in full to ``trained``."""
    for path, module in find_fully_trained(model).items():
        for name, learned in own_arrays(module).items():
            full_name = f"{path}.{name}"
            before = base[full_name].astype(mx.float32)
            so_far = trained.get(full_name, before)
            trained[full_name] = so_far + weight * (learned - before)


def _take_off(
    model: nn.Module, adapters: Mapping[str, Adapter], base: Mapping[str, mx.array]
) -> None:
    """Remove the adapters from ``model`` and restore the weights of the base."""
    for module in find_fully_trained(model).values():
        end_training(module)
    bases = [(path, adapter.base) for path, adapter in adapters.items()]
    model.update_modules(tree_unflatten(bases))
    model.load_weights(list(base.items()))
