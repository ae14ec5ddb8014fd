"""Check on a few tokens that a model gives the same results in all the ways that it is run.

Two defects of models affect training but are not visible in the loss. The forward pass with caches,
which generation uses, may differ from the pass without caches, which training uses. Blocks may pass
state to each other by side effects, so that gradient checkpointing computes wrong gradients. Both
questions are decided in float32 if possible, because half precision rounds the ways differently.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..adapters.base_layers import blocks_of
from ..adapters.dropout import train_without_dropout
from ..adapters.full import trains_weights
from ..adapters.tensor_parallel import is_sharded
from ..adapters.token_tables import probe_tokens
from ..adapters.trainable import find_adapters, find_fully_trained
from ..config import TrainConfig
from ..device import kept_random_state
from ..errors import ConfigError, ModelError
from ..failures import failure_of, is_lost
from ..kernels.float32_copy import in_float32
from ..kernels.patch import grad_checkpointing
from ..kernels.trunk_and_head import model_dtype
from ..models.damaged_weights import describe_damage
from ..models.language_model import check_language_model
from ..models.weight_files import one_line

TOKENS = 12  # the number of tokens that a model is tested on

# The largest difference of the logits with and without caches, relative to their norm, in float32
# and in half precision.
CACHE_MARGIN, HALF_MARGIN = 1e-2, 0.25

# The largest difference of the gradients, relative to their norm. Known defects exceed 0.3.
GRADIENT_MARGIN = 0.05


def check_caches(model: nn.Module) -> None:
    """Check that a model's logits are numbers, and that they are the same with caches as without.

    Raises:
        ModelError: mlx-lm can't run the model, a logit is not a number, or the logits differ.
    """
    check_language_model(model)

    # The type of the model may be too small for its numbers.
    tokens, training = probe_tokens(model, TOKENS), model.training
    model.eval()
    try:
        _check_numbers(model, _run(model, tokens))
        off, margin = in_float32(model, lambda exact: _cache_difference(exact, tokens))
    finally:
        model.train(training)

    if not off <= margin:
        kind = getattr(model, "model_type", type(model).__name__)
        raise ModelError(
            f"this {kind} model gives other logits with caches, as in generation, than without"
            f" them, as in training (they differ by {off:.0%}): mlx-lm computes two different"
            " models; use a newer mlx-lm, or another model"
        )


def _run(model: nn.Module, tokens: mx.array) -> mx.array:
    """Return the model's logits; an error of mlx-lm's code becomes a ``ModelError``."""
    try:
        logits = model(tokens)
        mx.eval(logits)
    # mlx-lm's models may raise any kind of error for an unexpected config.
    except Exception as problem:
        if failure_of(problem) is not None or is_lost(problem):
            raise
        kind = getattr(model, "model_type", type(model).__name__)
        raise ModelError(
            f"mlx-lm can't run this {kind} model ({one_line(problem)}): use a newer mlx-lm, or"
            " another model"
        ) from problem
    return logits


def _cache_difference(model: nn.Module, tokens: mx.array) -> tuple[float, float]:
    """Return the difference of the logits with and without caches, and the allowed difference.

    Both are relative to the norm of the logits. The first is 0 if they can't be compared.
    """
    margin = CACHE_MARGIN if model_dtype(model) == mx.float32 else HALF_MARGIN
    model.eval()
    plain = model(tokens).astype(mx.float32)
    try:
        cached = model(tokens, cache=make_prompt_cache(model)).astype(mx.float32)
    except Exception as problem:  # the model needs another kind of cache
        if is_lost(problem):
            raise
        return 0.0, margin

    # Logits that are zero or not finite can't be compared: the model is broken in another way.
    can_judge = mx.any(plain) & mx.isfinite(plain).all()
    if not can_judge.item():  # pyright: ignore[reportAttributeAccessIssue]
        return 0.0, margin
    difference = mx.linalg.norm(cached - plain) / mx.linalg.norm(plain)
    return float(difference.item()), margin  # pyright: ignore[reportArgumentType]


def _check_numbers(model: nn.Module, logits: mx.array) -> None:
    """Raise ``ModelError`` if logits are not numbers, or all are zero; masked ones are infinite.

    All are zero at first where a head of zeros is to be trained.
    """
    kind = getattr(model, "model_type", type(model).__name__)
    if mx.isnan(logits).any().item():
        raise ModelError(
            f"this {kind} model computes NaN instead of logits, so it can't be trained:"
            f" {describe_damage(model)}"
        )
    if not logits.any().item() and not _trains_outside_blocks(model):
        raise ModelError(
            f"this {kind} model gives every token the logit 0, so it can't be trained:"
            f" {describe_damage(model)}"
        )


def _trains_outside_blocks(model: nn.Module) -> bool:
    """Return whether the head, the embeddings or another module outside the blocks is trained."""
    inside = {id(module) for block in blocks_of(model) for module in block.modules()}
    trained = [*find_adapters(model).values(), *find_fully_trained(model).values()]
    return trains_weights(model) or any(id(module) not in inside for module in trained)


def resolve_sound_checkpoint(
    model: nn.Module,
    config: TrainConfig,
    log: Callable[[str], None],
    *,
    wanted: bool,
    sound: bool | None = None,
) -> bool:
    """Return whether to use gradient checkpointing: if wanted, and if its gradients are right.

    Args:
        model: The model with its adapters.
        config: With ``grad_checkpoint`` on, wrong gradients are an error.
        log: Called with a warning if checkpointing is switched off.
        wanted: Whether checkpointing is requested, or planned to save memory.
        sound: Whether the gradients are known to be right; None to test them.

    Raises:
        ConfigError: ``grad_checkpoint`` is on, and gives wrong gradients.
    """
    if not wanted or is_sharded(model):
        return wanted

    if sound is None:
        sound = is_checkpoint_sound(model)
    if sound:
        return True

    if config.grad_checkpoint == "on":
        raise ConfigError(
            "--grad-checkpoint on gives this model wrong gradients, because its blocks share state:"
            " set --grad-checkpoint off"
        )
    log(
        "warning: gradient checkpointing is off: it gives this model wrong gradients, because its"
        " blocks share state"
    )
    return False


def is_checkpoint_sound(model: nn.Module) -> bool:
    """Return whether checkpointed blocks give the same gradients as plain ones."""
    tokens, training = probe_tokens(model, TOKENS), model.training

    def is_sound(exact: nn.Module) -> bool:
        train_without_dropout(exact)
        plain = _gradients(exact, tokens)
        with grad_checkpointing(exact):
            checkpointed = _gradients(exact, tokens)
        difference = mx.linalg.norm(plain - checkpointed)
        is_close = difference <= GRADIENT_MARGIN * mx.linalg.norm(plain)
        return bool(is_close.item())

    # In training mode, checkpointed blocks draw random numbers.
    try:
        with kept_random_state():
            return in_float32(model, is_sound)
    finally:
        model.train(training)


def _gradients(model: nn.Module, tokens: mx.array) -> mx.array:
    """Return the gradients of all trainable parameters as one vector."""

    def mean_square(model: nn.Module) -> mx.array:
        return mx.square(model(tokens).astype(mx.float32)).mean()

    _, gradients = nn.value_and_grad(model, mean_square)(model)
    leaves: Any = tree_flatten(gradients)
    return mx.concatenate([array.astype(mx.float32).reshape(-1) for _, array in leaves])
