"""The gated delta rule of Qwen 3.5 and Qwen 3 Next, computed by MLX's own function.

    S_t = g_t S_{t-1} + beta_t (v_t - g_t S_{t-1} k_t) k_tᵀ,   y_t = S_t q_t

mlx-lm trains these layers by a loop over the tokens, with about ten operations for each token. On a
GPU, MLX's function computes many tokens at a time, in both passes; on a CPU it runs the same loop.
It is used only where a trial in the model's type gives the results and the gradients of mlx-lm's
loop.

The loop keeps about three states for each token. A state has heads · value dim · key dim elements,
far more than the token's activations. ``loop_in_pieces`` therefore keeps one state for each 64
tokens, and computes the others again in the backward pass.
"""

import sys
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta

from .choices import StepChoices, default_choices

# Tolerance relative to the largest number. A GPU may round the factors of a product to 10 bits.
# Another formula differs by much more.
TOLERANCE = 1e-2
# In half precision, MLX's function may have this many times the rounding error of the loop.
ROUNDING = 3
_TOKENS = 70  # more than a chunk of MLX's kernels
PIECE = 64  # tokens between two states that the loop keeps

_loop = gated_delta.gated_delta_ops


def has_delta_rule(model: nn.Module) -> bool:
    """Return whether a model has layers with a gated delta rule that MLX's function computes.

    It computes one decay for each head. Layers with a decay for each key, such as those of Kimi
    Linear, always take the loop.
    """
    update = gated_delta.gated_delta_update
    for module in model.modules():
        # The module of a class that was loaded from a file may not be in ``sys.modules``.
        code = sys.modules.get(type(module).__module__)
        is_rule = getattr(code, "gated_delta_update", None) is update and "dt_bias" in module
        if is_rule and module.dt_bias.size == module.A_log.size:
            return True
    return False


def choices_for(model: nn.Module) -> StepChoices:
    """Return the device's choices; without a gated delta rule in the model, none for it."""
    choices = default_choices()
    return choices if has_delta_rule(model) else replace(choices, delta_rule="loop")


def delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return (y, the last state), as mlx-lm's ``gated_delta_ops`` does.

    Args:
        q: (rows, length, key heads, key dim).
        k: The same shape as q.
        v: (rows, length, value heads, value dim).
        g: The decay, (rows, length, value heads). With one more axis, the loop is used.
        beta: The rates, (rows, length, value heads).
        state: (rows, value heads, value dim, key dim), or None for zeros.
        mask: Which tokens change the state, or None for all. With a mask, the loop is used.
    """
    is_plain = mask is None and g.ndim == 3
    if is_plain and equals_loop(k.shape[2], v.shape[2], k.shape[3], v.shape[3], q.dtype):
        y, state = mx.fast.gated_delta_update(q, k, v, g, beta, state)
        return y, state
    return loop_in_pieces(q, k, v, g, beta, state, mask)


def loop_in_pieces(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return what mlx-lm's loop returns, and keep one state for each 64 tokens.

    The arguments are those of ``delta_rule``.
    """
    # ``mx.split`` has a cheaper gradient than slices, which are padded to the whole length.
    inputs = [q, k, v, g, beta] if mask is None else [q, k, v, g, beta, mask]
    ends = list(range(PIECE, q.shape[1], PIECE))
    pieces = zip(*(mx.split(array, ends, axis=1) for array in inputs), strict=True)

    if state is None:
        state = mx.zeros((v.shape[0], *v.shape[2:], k.shape[3]), dtype=mx.float32)
    outs: list[mx.array] = []
    for piece in pieces:
        ordered: Any = _state_last(state, *piece)
        out, state = _checkpointed_piece(*ordered)
        outs.append(out)
    return mx.concatenate(outs, axis=1), state


@mx.custom_function
def _state_last(state: mx.array, *inputs: mx.array) -> tuple[mx.array, ...]:
    """Return the arrays unchanged. The backward pass computes the gradient of the state last.

    Without this order, MLX follows the gradient of the state through all pieces, and keeps the
    states of each until the gradients of its inputs are needed.
    """
    return state, *inputs


@_state_last.vjp
def _(_primals: Any, cotangents: Any, _outputs: Any) -> Any:
    of_state, *of_inputs = cotangents
    return *mx.depends([of_state], of_inputs), *of_inputs


@mx.checkpoint
def _checkpointed_piece(
    state: mx.array, q: mx.array, k: mx.array, v: mx.array, g: mx.array, *rest: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the loop's results for some tokens; ``rest`` is beta and perhaps the mask."""
    beta, *mask = rest
    return _loop(q, k, v, g, beta, state, *mask)


@cache
def equals_loop(
    key_heads: int, value_heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
) -> bool:
    """Return whether MLX's function gives the loop's results and gradients.

    Both are compared with the loop in float32, on the same inputs.

    Args:
        key_heads: Heads of q and k.
        value_heads: Heads of v.
        key_dim: Width of a head of q and k.
        value_dim: Width of a head of v.
        dtype: The type of q, k, v and the rates. mlx-lm computes the decay in float32.
    """
    keys = mx.random.split(mx.random.key(0), 6)
    shape = (1, _TOKENS, key_heads, key_dim)
    scale = key_dim**-0.5
    q, k = (scale * mx.random.normal(shape, key=key) for key in keys[:2])
    v = mx.random.normal((1, _TOKENS, value_heads, value_dim), key=keys[2])
    g = mx.random.uniform(0.5, 1.0, (1, _TOKENS, value_heads), key=keys[3])
    beta = mx.random.uniform(0.0, 1.0, (1, _TOKENS, value_heads), key=keys[4])
    cotangent = mx.random.normal(v.shape, key=keys[5]).astype(dtype)
    q, k, v, beta = (array.astype(dtype) for array in (q, k, v, beta))

    def both(rule: Any, dtype: mx.Dtype) -> list[mx.array]:
        inputs = [q.astype(dtype), k.astype(dtype), v.astype(dtype), g, beta.astype(dtype)]
        results, gradients = mx.vjp(lambda *x: rule(*x)[0], inputs, [cotangent.astype(dtype)])
        found = [array.astype(mx.float32) for array in (*results, *gradients)]
        mx.eval(found)
        return found

    exact = both(_loop, mx.float32)
    loop, ours = both(_loop, dtype), both(mx.fast.gated_delta_update, dtype)
    for right, stock, found in zip(exact, loop, ours, strict=True):
        rounding = ROUNDING * mx.abs(stock - right).max()
        allowed = mx.maximum(TOLERANCE * mx.abs(right).max(), rounding)
        close: Any = mx.abs(found - right).max() <= allowed
        if not close.item():
            return False
    return True
