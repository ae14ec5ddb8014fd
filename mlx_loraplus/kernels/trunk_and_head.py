"""Find a model's trunk and head, so that logits are computed at supervised positions only.

    hidden = trunk(tokens)                      # (batch, seq, hidden)
    logits = cap * tanh(m * (hidden Wᵀ) / cap)  # (batch, seq, vocabulary)

Most families have no cap and m = 1.

The trunk, the head, the cap and the multiplier differ between model families, and a list of names
would not be reliable. Therefore several candidates are tried, and each is checked numerically on
the loaded model.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapters.base_layers import EMBEDDINGS, LINEARS, base_shape, blocks_of, can_adapt
from ..adapters.lora import base_of
from ..adapters.token_tables import probe_tokens
from ..adapters.trainable import find_groups
from ..failures import is_lost
from .float32_copy import in_float32
from .row_masks import takes_caches

_TRUNKS = ("model", "transformer", "backbone")
"""Attribute names of the trunk, the part before the head, in mlx-lm's models."""


@dataclass(frozen=True)
class Head:
    """The last layer: a linear map onto the vocabulary, then a multiplier and a soft cap.

    ``layer`` is the Linear or Embedding (tied head) that holds W (vocabulary, hidden), quantized or
    not, or an adapter over one of these.
    """

    layer: nn.Module
    multiplier: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: mx.array) -> mx.array:
        """Return the logits: (…, hidden) → (…, vocabulary)."""
        layer: Any = self.layer
        scores = layer.as_linear(hidden) if hasattr(layer, "as_linear") else layer(hidden)
        return self.finish(scores)

    def finish(self, scores: mx.array) -> mx.array:
        """Return cap * tanh(m * scores / cap)."""
        if self.multiplier != 1.0:
            scores = scores * self.multiplier
        return scores if self.cap is None else mx.tanh(scores / self.cap) * self.cap

    def pull_back(self, scores: mx.array, cotangent: mx.array) -> mx.array:
        """Return cotangent * d logits / d scores."""
        return mx.vjp(self.finish, [scores], [cotangent])[1][0]

    @property
    def is_plain(self) -> bool:
        """Whether the scores are the logits."""
        return self.multiplier == 1.0 and self.cap is None

    @property
    def vocabulary(self) -> int:
        """The number of logits."""
        return base_shape(base_of(self.layer))[0]

    @property
    def is_frozen(self) -> bool:
        """Whether the head has no adapter and no trainable parameters."""
        # A layer that can still get an adapter has none.
        return can_adapt(self.layer) and not tree_flatten(self.layer.trainable_parameters())


@dataclass(frozen=True)
class TrunkAndHead:
    """A model as trunk and head, checked: ``head(trunk(tokens))`` equals ``model(tokens)``.

    ``takes_caches`` is true if the trunk can be called with ``row_caches``, which determine the
    tokens that each token sees.
    """

    trunk: Callable[..., mx.array]
    head: Head
    takes_caches: bool = False
    candidate: int = 0  # index in ``head_candidates``


def find_trunk_and_head(model: nn.Module) -> TrunkAndHead | None:
    """Return the trunk and head of a model, or None if no candidate gives the model's logits.

    Each candidate's logits are compared with the model's on a few tokens, in float32 if possible.
    The tolerance is 1e-3 of the largest logit (1e-2 for types smaller than float32). Wrong
    candidates differ by much more.
    """
    number = in_float32(model, _matching_candidate)
    if number is None:
        return None
    trunk_and_head = list(head_candidates(model))[number]
    return replace(trunk_and_head, takes_caches=takes_caches(model), candidate=number)


def _matching_candidate(model: nn.Module) -> int | None:
    """Return the number of the first candidate that gives the model's logits, or None."""
    tokens = probe_tokens(model, 5)
    training = model.training
    model.eval()
    try:
        expected = model(tokens).astype(mx.float32)
        relative = 1e-3 if model_dtype(model) == mx.float32 else 1e-2
        tolerance = relative * mx.abs(expected).max()
        for number, trunk_and_head in enumerate(head_candidates(model)):
            try:
                logits = trunk_and_head.head(trunk_and_head.trunk(tokens)).astype(mx.float32)
            # Skip a trunk that can't be called like this, for example one that requires a cache.
            except Exception as problem:
                if is_lost(problem):
                    raise
                continue
            if logits.shape != expected.shape:
                continue
            if (mx.abs(logits - expected).max() <= tolerance).item():
                return number
    finally:
        model.train(training)
    return None


def model_dtype(model: nn.Module) -> mx.Dtype:
    """Return the type of a model's activations, which is the type of its frozen parameters."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    learned = find_groups(model)
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and name not in learned:
            return array.dtype
    return mx.float32


def head_candidates(model: nn.Module) -> Iterator[TrunkAndHead]:
    """Yield possible pairs of trunk and head, because mlx-lm's models name these differently."""
    outer: Any = getattr(model, "language_model", model)
    args = getattr(outer, "args", None)
    cap = getattr(args, "final_logit_softcapping", None)

    # Some families multiply or divide the logits, or the last hidden states, by a setting.
    multipliers = {1.0}
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        value = getattr(args, name, None)
        # The kernels need logits that increase with the scores.
        if value is not None and value > 0:
            multipliers |= {float(value), 1 / float(value)}

    for name in _TRUNKS:
        trunk: Any = outer.get(name)
        if not isinstance(trunk, nn.Module):
            continue
        for layer in _possible_heads(outer, trunk):
            for multiplier in sorted(multipliers):
                yield TrunkAndHead(_with_default_cache(trunk), Head(layer, multiplier, cap))


def _possible_heads(outer: nn.Module, trunk: nn.Module) -> list[nn.Module]:
    """Return the layers that may compute the logits: separate heads first, then embeddings."""
    named = [*outer.items(), *trunk.items()]
    heads = [layer for _, layer in named if isinstance(base_of(layer), LINEARS)]
    embeddings = [layer for _, layer in named if isinstance(base_of(layer), EMBEDDINGS)]
    return [layer for layer in (*heads, *embeddings) if "bias" not in base_of(layer)]


def _with_default_cache(trunk: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return a trunk that can be called without caches, even if the original requires a list."""
    parameters = inspect.signature(type(trunk).__call__).parameters
    if "cache" not in parameters or parameters["cache"].default is not inspect.Parameter.empty:
        return trunk
    blocks = len(blocks_of(trunk))  # pyright: ignore[reportArgumentType]

    def call(tokens: mx.array, cache: Any = None) -> mx.array:
        return trunk(tokens, cache=[None] * blocks if cache is None else cache)

    return call
