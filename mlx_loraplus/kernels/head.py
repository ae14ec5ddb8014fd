"""A model as trunk and head, so that the head can be computed only where there is something to learn.

    hidden = trunk(tokens)                      # (batch, seq, hidden)
    logits = cap * tanh(m * (hidden Wᵀ) / cap)  # (batch, seq, vocabulary); no cap, m = 1 in most families

Which module is the trunk, whether the head is tied, and which cap and multiplier apply differ by
family and can't be trusted to a list of names, so the split is found by trying and is checked
numerically on the loaded model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapters.adapter import base_of
from ..adapters.attach import find_groups
from ..adapters.layers import base_shape, can_adapt
from ..adapters.tables import probe_tokens
from .packed_rows import takes_caches


@dataclass(frozen=True)
class Head:
    """The last layer: a linear map without bias onto the vocabulary, then a multiplier and a soft cap.

    ``layer`` is the Linear or Embedding (tied head) that holds W (vocabulary, hidden), quantized or
    not, or an adapter over one of these.
    """

    layer: nn.Module
    multiplier: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: mx.array) -> mx.array:
        """Return the logits: (…, hidden) → (…, vocabulary)."""
        layer: Any = self.layer
        return self.finish(
            layer.as_linear(hidden) if hasattr(layer, "as_linear") else layer(hidden)
        )

    def finish(self, scores: mx.array) -> mx.array:
        """Return cap * tanh(m * scores / cap)."""
        if self.multiplier != 1.0:
            scores = scores * self.multiplier
        return scores if self.cap is None else mx.tanh(scores / self.cap) * self.cap

    def pull_back(self, scores: mx.array, cotangent: mx.array) -> mx.array:
        """Return cotangent * d logits / d scores."""
        return mx.vjp(self.finish, [scores], [cotangent])[1][0]

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return base_shape(base_of(self.layer))[0]

    @property
    def is_frozen(self) -> bool:
        """Whether the head is its weight alone, and nothing of it trains."""
        return can_adapt(self.layer) and not tree_flatten(self.layer.trainable_parameters())


@dataclass(frozen=True)
class TrunkAndHead:
    """A checked split: ``head(trunk(tokens))`` equals ``model(tokens)``.

    ``takes_caches`` tells whether the trunk may be told by ``row_caches`` what each token sees.
    """

    trunk: Callable[..., mx.array]
    head: Head
    takes_caches: bool = False


def split_model(model: nn.Module) -> TrunkAndHead | None:
    """Find the trunk and the head of ``model``, or return None where no candidate gives the model's own logits.

    Candidates are compared with the model on a few tokens: equal to 1e-3 of the largest logit (1e-2
    below float32), and the wrong ones are far off.
    """
    tokens = probe_tokens(model, 5)
    training = model.training
    model.eval()
    try:
        expected = model(tokens).astype(mx.float32)
        tolerance = (1e-3 if model_dtype(model) == mx.float32 else 1e-2) * mx.abs(expected).max()
        for split in _candidates(model):
            try:
                logits = split.head(split.trunk(tokens)).astype(mx.float32)
            # A trunk that can't be called like this, e.g. without a cache, is no candidate.
            except Exception:  # noqa: BLE001, S112
                continue
            if (
                logits.shape == expected.shape
                and (mx.abs(logits - expected).max() <= tolerance).item()
            ):
                return replace(split, takes_caches=takes_caches(model))
    finally:
        model.train(training)
    return None


def model_dtype(model: nn.Module) -> mx.Dtype:
    """Return the type of a model's activations: that of its first floating-point parameter not trained."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    learned = find_groups(model)
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and name not in learned:
            return array.dtype
    return mx.float32


def _candidates(model: nn.Module) -> Iterator[TrunkAndHead]:
    outer: Any = getattr(model, "language_model", model)
    trunk: Any = getattr(outer, "model", None)
    if trunk is None:
        return
    args = getattr(outer, "args", None)
    cap = getattr(args, "final_logit_softcapping", None)
    multipliers = {1.0}
    for name in ("logit_scale", "logits_scaling"):
        if value := getattr(args, name, None):
            multipliers |= {float(value), 1 / float(value)}
    layers = [getattr(outer, "lm_head", None), getattr(trunk, "embed_tokens", None)]
    for layer in layers:
        if isinstance(layer, nn.Module) and "bias" not in layer:
            for multiplier in sorted(multipliers):
                yield TrunkAndHead(trunk, Head(layer, multiplier, cap))
