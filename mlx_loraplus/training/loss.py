"""Cross-entropy at supervised positions only, the head computed in chunks of rows and never as full logits.

    loss = - sum over supervised i of log softmax(head(hidden_i))[target_i]

The trunk gives the hidden states; those that predict a target are gathered; the head turns them into logits a chunk at
a time. With a frozen head the gradient for the hidden states is known in the forward pass already,

    d loss / d hidden = (e W) / sum(e) - W[target],   e = exp(logits - max)

with one exponential for each logit, and the backward pass only multiplies it by the cotangent. Memory is that of a few
chunks instead of (batch, seq, vocabulary).
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .split import Head, Split

# Bytes of float32 logits in a chunk. MLX schedules ahead, so about seven chunks are alive at once.
CHUNK_BYTES = 32 * 2**20

Loss = Callable[..., mx.array]


def make_loss(split: Split | None) -> Loss:
    """Return ``loss(model, tokens, positions, targets, weights)``: the summed loss of a batch, a float32 scalar.

    Args:
        split: The model's trunk and head, or None to compute full logits with the whole model.

    The arguments are those of ``Batch``: tokens (rows, length), and (targets,) each of flat positions, targets and
    weights.
    """

    def split_loss(_: nn.Module, tokens: mx.array, positions: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        assert split is not None
        hidden = split.trunk(tokens)  # (rows, length, hidden)
        return head_loss(split.head, hidden.flatten(0, 1)[positions], targets, weights)

    def full_loss(
        model: nn.Module, tokens: mx.array, positions: mx.array, targets: mx.array, weights: mx.array
    ) -> mx.array:
        logits = model(tokens).flatten(0, 1)[positions].astype(mx.float32)  # (targets, vocabulary)
        return (nn.losses.cross_entropy(logits, targets) * weights).sum()

    return split_loss if split is not None else full_loss


def head_loss(head: Head, hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return the summed, weighted cross-entropy of ``head(hidden)`` against ``targets``, a float32 scalar.

    Args:
        head: The model's head.
        hidden: (targets, hidden).
        targets: Token ids, (targets,).
        weights: 1, or 0 to leave a row out, (targets,).
    """
    chunk = _frozen_chunk(head) if head.is_frozen else _trained_chunk(head)
    rows = max(8, CHUNK_BYTES // (4 * head.vocabulary))
    total = mx.array(0.0)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        total = total + chunk(hidden[part], targets[part], weights[part])
    return total


def _frozen_chunk(head: Head) -> Loss:
    """Return a chunk's loss whose gradient for ``hidden`` is made on the way forward."""

    @mx.custom_function
    def loss_and_gradient(hidden: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        scores = head.project(hidden)
        logits = head.finish(scores).astype(mx.float32)  # (targets, vocabulary)
        top = logits.max(axis=-1, keepdims=True)
        exps = mx.exp(logits - top)
        total = exps.sum(axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)
        loss = ((top + mx.log(total) - chosen).squeeze(-1) * weights).sum()
        if head.has_slope:
            slope = head.slope(scores).astype(mx.float32)  # d logits / d scores
            exps, chosen_slope = exps * slope, mx.take_along_axis(slope, targets[:, None], axis=-1)
        else:
            chosen_slope = 1.0
        expected = head.project_back(exps.astype(hidden.dtype)).astype(mx.float32) / total
        gradient = (expected - chosen_slope * head.rows(targets).astype(mx.float32)) * weights[:, None]
        return loss, gradient.astype(hidden.dtype)

    @loss_and_gradient.vjp
    def _(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple:
        _, targets, weights = primals
        return (cotangents[0] * outputs[1]).astype(outputs[1].dtype), mx.zeros_like(targets), mx.zeros_like(weights)

    return lambda hidden, targets, weights: loss_and_gradient(hidden, targets, weights)[0]


def _trained_chunk(head: Head) -> Loss:
    """Return a chunk's loss that is computed again on the way back: its gradient reaches the head's adapter too."""

    def chunk(hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        logits = head(hidden).astype(mx.float32)  # (targets, vocabulary)
        return (nn.losses.cross_entropy(logits, targets) * weights).sum()

    return nn.utils.checkpoint(head.layer, chunk)
