"""Whether a model computes the same in every way that it is run: tried on a few tokens before a run begins.

Two defects of models change what is trained, and neither shows in the loss. A forward pass through
caches, as generation runs it, may differ from the one without them, as training runs it. And blocks
may hand on a state by side effects, of which gradient checkpointing computes other gradients.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..adapters.tables import probe_tokens
from ..adapters.tensor_parallel import is_sharded
from ..config import RunConfig
from ..errors import ConfigError, ModelError
from ..kernels.head import model_dtype
from ..kernels.patch import grad_checkpointing

TOKENS = 12  # that a model is tried on
CACHE_MARGIN, HALF_MARGIN = 1e-2, 0.25
"""Largest difference of logits through caches and without, as a share of their norm, in float32 and below it."""
GRADIENT_MARGIN = 0.05  # of the gradients' norm; the defects that are known are above 0.3


def check_caches(model: nn.Module) -> None:
    """Raise ModelError where the model answers otherwise through its caches than it is trained without them."""
    tokens, training = probe_tokens(model, TOKENS), model.training
    model.eval()
    try:
        plain = model(tokens).astype(mx.float32)
        try:
            cached = model(tokens, cache=make_prompt_cache(model)).astype(mx.float32)
        except Exception:  # a cache of its own kind: generating will tell  # noqa: BLE001
            return
        off = float((mx.linalg.norm(cached - plain) / mx.linalg.norm(plain)).item())  # pyright: ignore[reportArgumentType]
    finally:
        model.train(training)
    # Zeros give 0 / 0, and a model that is broken in both ways differs in none.
    tells = (mx.any(plain) & mx.isfinite(plain).all()).item()  # pyright: ignore[reportAttributeAccessIssue]
    if tells and not off <= (CACHE_MARGIN if model_dtype(model) == mx.float32 else HALF_MARGIN):
        kind = getattr(model, "model_type", type(model).__name__)
        raise ModelError(
            f"this {kind} model gives other logits with caches, as in generation, than without"
            f" them, as in training (they differ by {off:.0%}): mlx-lm computes two different"
            " models; use a newer mlx-lm, or another model"
        )


def resolve_sound_checkpoint(
    model: nn.Module, config: RunConfig, log: Callable[[str], None], *, wanted: bool
) -> bool:
    """Return whether to checkpoint, which is ``wanted`` unless the model's gradients do not stand it.

    Raises: ConfigError where ``grad_checkpoint`` is on and they do not.
    """
    if not wanted or is_sharded(model) or is_checkpoint_sound(model):
        return wanted
    if config.grad_checkpoint == "on":
        raise ConfigError(
            "grad_checkpoint on gives this model wrong gradients, since its blocks share a state:"
            " leave it out"
        )
    log(
        "warning: gradient checkpointing is off: it gives this model wrong gradients, since its"
        " blocks share a state"
    )
    return False


def is_checkpoint_sound(model: nn.Module) -> bool:
    """Tell whether checkpointed blocks give the gradients of plain ones."""
    tokens, training = probe_tokens(model, TOKENS), model.training
    model.eval()
    try:
        plain = _gradients(model, tokens)
        with grad_checkpointing(model):
            checkpointed = _gradients(model, tokens)
        off = mx.linalg.norm(plain - checkpointed) <= GRADIENT_MARGIN * mx.linalg.norm(plain)
        return bool(off.item())
    finally:
        model.train(training)


def _gradients(model: nn.Module, tokens: mx.array) -> mx.array:
    """Return the gradients of everything that trains, in one row."""

    def size(model: nn.Module) -> mx.array:
        return mx.square(model(tokens).astype(mx.float32)).mean()

    _, gradients = nn.value_and_grad(model, size)(model)
    arrays: Any = [array for _, array in tree_flatten(gradients)]
    return mx.concatenate([array.astype(mx.float32).reshape(-1) for array in arrays])
