"""Cross-entropy at supervised positions only, the head computed in chunks of rows and never as full logits.

    loss = - sum over supervised i of log softmax(head(hidden_i))[target_i]

The trunk gives the hidden states; those that predict a target are gathered; the head turns them into logits a chunk at
a time. With a frozen head the gradient for the hidden states is known in the forward pass already,

    d loss / d hidden = (e W) / sum(e) - W[target],   e = exp(logits - max)

with one exponential for each logit, and the backward pass only multiplies it by the cotangent. Memory is that of a few
chunks instead of (batch, seq, vocabulary).
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import checkpoint

from .packing import packed_caches
from .split import Head, Split

# Bytes of float32 logits in a chunk. MLX schedules ahead, so about seven chunks are alive at once.
CHUNK_BYTES = 32 * 2**20

Loss = Callable[..., mx.array]


def make_loss(split: Split | None) -> Loss:
    """Return ``loss(model, tokens, positions, targets, weights, segments=None)``: a batch's summed loss, float32.

    Args:
        split: The model's trunk and head, or None to compute full logits with the whole model.

    The arguments are those of ``Batch``: tokens (rows, length), and (targets,) each of flat positions, targets and
    weights; and, where rows are packed, segments (rows, length).
    """

    def loss(
        model: Any,
        tokens: mx.array,
        positions: mx.array,
        targets: mx.array,
        weights: mx.array,
        segments: mx.array | None = None,
    ) -> mx.array:
        packed = {} if segments is None else {"cache": packed_caches(model, segments)}
        if split is None:
            logits = model(tokens, **packed).flatten(0, 1)[positions].astype(mx.float32)  # (targets, vocabulary)
            return (nn.losses.cross_entropy(logits, targets) * weights).sum()
        hidden = split.trunk(tokens, **packed)  # (rows, length, hidden)
        return head_loss(split.head, hidden.flatten(0, 1)[positions], targets, weights)

    return loss


def make_score(split: Split | None) -> Loss:
    """Return ``score(model, tokens, positions, targets, weights)``: (summed loss, how many targets are likeliest).

    Its arguments are those of ``make_loss``; it has no gradient.
    """

    def score(model: Any, tokens: mx.array, positions: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        if split is None:
            return _score(model(tokens).flatten(0, 1)[positions], targets, weights)
        head, hidden = split.head, split.trunk(tokens).flatten(0, 1)[positions]  # (targets, hidden)
        return _in_chunks(head, lambda h, t, w: _score(head(h), t, w), hidden, targets, weights)

    return score


def head_loss(head: Head, hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return the summed, weighted cross-entropy of ``head(hidden)`` against ``targets``, a float32 scalar.

    Args:
        head: The model's head.
        hidden: (targets, hidden).
        targets: Token ids, (targets,).
        weights: 1, or 0 to leave a row out, (targets,).
    """
    chunk = _frozen_chunk(head) if head.is_frozen else _trained_chunk(head)
    return _in_chunks(head, chunk, hidden, targets, weights)


def _in_chunks(head: Head, chunk: Loss, hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return the sum of ``chunk`` over rows that are few enough for their logits."""
    rows = max(8, CHUNK_BYTES // (4 * head.vocabulary))
    total = mx.array(0.0)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        total = total + chunk(hidden[part], targets[part], weights[part])
    return total


def _score(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return (summed loss, how many targets are likeliest), the loss differentiable."""
    logits = logits.astype(mx.float32)  # (targets, vocabulary)
    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    total = exp_above(logits, top).sum(axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)
    loss = ((top + mx.log(total) - chosen).squeeze(-1) * weights).sum()
    return mx.stack([loss, ((chosen >= top).squeeze(-1) * weights).sum()])


def _trained_chunk(head: Head) -> Loss:
    """Return a chunk's loss that is computed again on the way back: its gradient reaches the head's adapter too."""

    def chunk(hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        return checkpoint(head.layer, lambda hidden: _score(head(hidden), targets, weights)[0])(hidden)

    return chunk


def _frozen_chunk(head: Head) -> Loss:
    """Return a chunk's loss whose gradient for ``hidden`` is made on the way forward, with the same exponentials."""

    @mx.custom_function
    def loss_and_gradient(hidden: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        scores = head.project(hidden)
        logits = head.finish(scores).astype(mx.float32)  # (targets, vocabulary)
        top = logits.max(axis=-1, keepdims=True)
        exps = exp_above(logits, top)
        total = exps.sum(axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)
        loss = ((top + mx.log(total) - chosen).squeeze(-1) * weights).sum()
        chosen_slope: mx.array | float = 1.0
        if head.has_slope:
            slope = head.slope(scores).astype(mx.float32)  # d logits / d scores
            exps, chosen_slope = exps * slope, mx.take_along_axis(slope, targets[:, None], axis=-1)
        expected = head.project_back(exps.astype(hidden.dtype)).astype(mx.float32) / total
        gradient = (expected - chosen_slope * head.rows(targets).astype(mx.float32)) * weights[:, None]
        return loss, gradient.astype(hidden.dtype)

    @loss_and_gradient.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        _, targets, weights = primals
        return (cotangents[0] * outputs[1]).astype(outputs[1].dtype), mx.zeros_like(targets), mx.zeros_like(weights)

    def chunk(hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        both: Any = loss_and_gradient(hidden, targets, weights)
        return both[0]

    return chunk


def exp_above(x: mx.array, top: mx.array) -> mx.array:
    """Return exp(x - top) for float32 x <= top, to 3e-7 + 9e-8 (top - x) of its value.

    MLX's exponential is scalar code on a CPU, and the dearest part of the loss there: 25 ns for each of the
    vocabulary's logits. 2^n * 2^f with a polynomial for 2^f, f in [0, 1), is vector code and four times faster.
    """
    exp: Any = _exp_on_cpu
    return mx.exp(x - top) if mx.default_device() == mx.gpu else exp(x, top)


@mx.custom_function
def _exp_on_cpu(x: mx.array, top: mx.array) -> mx.array:
    return _exp_polynomial(x, top)


@_exp_on_cpu.vjp
def _(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    return cotangent * output, mx.zeros_like(primals[1])  # top is a constant: any shift gives the same loss


@mx.compile
def _exp_polynomial(x: mx.array, top: mx.array) -> mx.array:
    t = mx.maximum((x - top) * math.log2(math.e), -126.0)
    whole = mx.floor(t)
    f = t - whole
    power = 1.8775767e-3 * f + 8.9893397e-3  # minimax on [0, 1), relative error 2e-7
    for coefficient in (5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 9.9999994e-1):
        power = power * f + coefficient
    return power * mx.left_shift((whole + 127).astype(mx.int32), 23).view(mx.float32)  # 2^n through its exponent bits
