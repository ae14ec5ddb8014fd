"""Several adapters on one base, each with a weight: W + Σ wᵢ (Wᵢ - W), Wᵢ what adapter i alone makes of W."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import AdapterError, ConfigError
from .adapter import Adapter
from .attach import find_adapters, find_fully_trained, put_adapters
from .layers import EMBEDDINGS, WHOLE
from .storage import load_adapter
from .unfreeze import end_training, own_arrays


class MergedAdapters(Adapter):
    """y + Σ wᵢ (yᵢ - y) over one base, for outputs as for weights: for using and fusing, not for training."""

    def __init__(self, adapters: Sequence[Adapter], weights: Sequence[float]):
        super().__init__(adapters[0].base, 1.0, 0.0)
        self._parts = tuple(
            zip(adapters, weights, strict=True)
        )  # a tuple's modules are not found as this one's

    def _mixed(self, y: mx.array, *others: mx.array) -> mx.array:
        return y + sum(
            weight * (other - y) for (_, weight), other in zip(self._parts, others, strict=True)
        )

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        """Return y, of the shape that the base gives it."""
        y = self.base(x, *args, **options)
        return self._mixed(y, *(adapter(x, *args, **options) for adapter, _ in self._parts))  # pyright: ignore[reportCallIssue]

    def merged(self, weight: mx.array, part: slice = WHOLE) -> mx.array:
        """Return W + Σ wᵢ (Wᵢ - W), as ``Adapter.merged``."""
        return self._mixed(weight, *(adapter.merged(weight, part) for adapter, _ in self._parts))


class MixedEmbedding(MergedAdapters):
    """The same over an embedding, which may be the model's head too. A linear head must not seem to be one."""

    child = "embedding"

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the tied head's logits."""
        parts: list[Any] = [adapter for adapter, _ in self._parts]
        return self._mixed(self.base.as_linear(x), *(part.as_linear(x) for part in parts))


def parse_adapters(words: Sequence[str]) -> dict[str, float]:
    """Return folder → weight of words such as ``my_run`` and ``my_run:0.7``, or raise ConfigError."""
    found: dict[str, float] = {}
    for word in words:
        folder, colon, number = word.rpartition(":")
        if not colon or Path(word).exists():
            folder, number = word, "1"
        try:
            weight = float(number)
        except ValueError:
            folder, weight = word, 1.0  # a colon in its name
        if not math.isfinite(weight) or weight == 0 or folder in found:
            raise ConfigError(
                f"adapter_path {word!r}: give each folder once, with a weight other than 0, as"
                f" {folder}:0.7"
            )
        found[folder] = weight
    return found


def load_adapters(model: nn.Module, weights: dict[str, float]) -> nn.Module:
    """Put the adapters of these folders on ``model``, each with its weight; it can be used or fused.

    Raises: AdapterError as ``load_adapter``, and where one of several adapters has a base of its
    own.
    """
    if list(weights.values()) == [1.0]:
        return load_adapter(model, next(iter(weights)))
    base: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    parts: dict[str, list[tuple[Adapter, float]]] = {}
    trained: dict[str, mx.array] = {}  # what modules trained in full become
    for folder, weight in weights.items():
        load_adapter(model, folder)
        adapters = find_adapters(model)
        if any(adapter.owns_base for adapter in adapters.values()):
            raise AdapterError(
                f"{folder} brings a quantized base of its own (LoftQ): fuse it alone and unweighted"
            )
        for path, adapter in adapters.items():
            parts.setdefault(path, []).append((adapter, weight))
        for path, module in find_fully_trained(model).items():
            for name, learned in own_arrays(module).items():
                before = base[f"{path}.{name}"].astype(mx.float32)
                so_far = trained.get(f"{path}.{name}", before)
                trained[f"{path}.{name}"] = so_far + weight * (learned - before)
            end_training(module)
        model.update_modules(
            tree_unflatten([(path, adapter.base) for path, adapter in adapters.items()])
        )
        model.load_weights(list(base.items()))
    model.load_weights(
        [(name, array.astype(base[name].dtype)) for name, array in trained.items()], strict=False
    )
    mixtures: dict[str, Adapter] = {}
    for path, mixed in parts.items():
        adapters, numbers = zip(*mixed, strict=True)
        layer = MixedEmbedding if isinstance(adapters[0].base, EMBEDDINGS) else MergedAdapters
        mixtures[path] = layer(adapters, numbers)
    put_adapters(model, mixtures, {})
    return model
