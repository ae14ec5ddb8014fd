"""Cross-entropy at supervised positions only, computed in slices of the vocabulary.

    loss = - sum over supervised i of log softmax(head(hidden_i))[target_i]

The trunk computes the hidden states, and those that predict a target are selected. The head's
scores are computed for one slice of the vocabulary at a time, instead of as full logits. With a
frozen head, the forward pass can already compute the gradient of the hidden states,

    d loss / d hidden = (e W) / sum(e) - W[target],   e = exp(logits - max)

with one exponential for each logit. The backward pass only multiplies this gradient by the
cotangent. The maximum, the sum and e W are updated from slice to slice, as in *FlashAttention*
(arXiv 2205.14135). W is read twice for each chunk of rows. Only a few slices are in memory at a
time, instead of (batch, seq, vocabulary) logits.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import checkpoint

from ..adapters.layers import full_weight, project
from .choices import StepChoices, default_choices
from .elementwise import exp
from .head import Head, TrunkAndHead
from .packed_rows import row_caches
from .patch import replaces_attention

CHUNK_ROWS = 512  # positions whose logits are computed together

Loss = Callable[..., mx.array]


def make_loss(split: TrunkAndHead | None, choices: StepChoices | None = None) -> Loss:
    """Return ``loss(model, tokens, positions, targets, weights, segments=None)``.

    ``loss`` returns the summed loss of a batch, a float32 scalar. Its arguments are those of
    ``Batch``. Without a split, the whole model computes full logits.

    Args:
        split: The model's trunk and head, or None.
        choices: The size of the slices; by default that of the device.
    """
    choices = choices or default_choices()

    def loss(
        model: Any,
        tokens: mx.array,
        positions: mx.array,
        targets: mx.array,
        weights: mx.array,
        segments: mx.array | None = None,
    ) -> mx.array:
        takes_caches = segments is not None or (split is not None and split.takes_caches)
        caches = {"cache": row_caches(model, segments)} if takes_caches else {}
        if split is None:
            logits = (
                model(tokens, **caches).flatten(0, 1)[positions].astype(mx.float32)
            )  # (targets, vocabulary)
            return (nn.losses.cross_entropy(logits, targets) * weights).sum()
        hidden = split.trunk(tokens, **caches)  # (rows, length, hidden)
        chosen = hidden.flatten(0, 1)[positions]
        return head_loss(split.head, chosen, targets, weights, choices)

    return loss


def make_score(split: TrunkAndHead | None, choices: StepChoices | None = None) -> Loss:
    """Return ``score(model, tokens, positions, targets, weights)``.

    ``score`` returns (summed loss, number of targets with the largest logit). Its arguments are
    those of the function that ``make_loss`` returns. It has no gradient.

    Args:
        split: The model's trunk and head, or None.
        choices: The size of the slices; by default that of the device.
    """
    choices = choices or default_choices()

    def score(
        model: Any, tokens: mx.array, positions: mx.array, targets: mx.array, weights: mx.array
    ) -> mx.array:
        if split is None:
            return _score(model(tokens).flatten(0, 1)[positions], targets, weights)
        caches = {"cache": row_caches(model)} if split.takes_caches and replaces_attention() else {}
        head, hidden = (
            split.head,
            split.trunk(tokens, **caches).flatten(0, 1)[positions],
        )  # (targets, hidden)

        def chunk(hidden: mx.array, *rest: mx.array) -> mx.array:
            return (
                _score_slices(head, hidden, *rest, slice_bytes=choices.slice_bytes)[0]
                if head.is_frozen
                else _score(head(hidden), *rest)
            )

        return _in_chunks(head, chunk, (hidden, targets, weights), choices)

    return score


def head_loss(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    choices: StepChoices | None = None,
) -> mx.array:
    """Return the weighted sum of the cross-entropy of ``head(hidden)`` and ``targets``, float32.

    Args:
        head: The head.
        hidden: The hidden states, (targets, hidden).
        targets: Token ids, (targets,).
        weights: 1, or 0 to ignore a row, (targets,).
        choices: The size of the slices; by default that of the device.
    """
    choices = choices or default_choices()
    chunk = _frozen_chunk(head, choices.slice_bytes) if head.is_frozen else _trained_chunk(head)
    return _in_chunks(head, chunk, (hidden, targets, weights), choices)


def _in_chunks(
    head: Head, chunk: Loss, arrays: tuple[mx.array, ...], choices: StepChoices
) -> mx.array:
    """Return the sum of ``chunk`` over chunks of rows, small ones if the head can't be sliced."""
    rows = CHUNK_ROWS
    if not head.is_frozen:
        rows = max(8, 8 * choices.slice_bytes // (4 * head.vocabulary))
    total = mx.array(0.0)
    for start in range(0, arrays[0].shape[0], rows):
        total = total + chunk(*(array[start : start + rows] for array in arrays))
    return total


def _score(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return (summed loss, number of targets with the largest logit).

    The loss is differentiable.
    """
    logits = logits.astype(mx.float32)  # (targets, vocabulary)
    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    total = exp(logits - top) @ mx.ones((logits.shape[-1], 1))
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)
    loss = ((top + mx.log(total) - chosen).squeeze(-1) * weights).sum()
    return mx.stack([loss, ((chosen >= top).squeeze(-1) * weights).sum()])


def _trained_chunk(head: Head) -> Loss:
    """Return a loss function for a chunk that is recomputed in the backward pass.

    Its gradient also reaches an adapter on the head.
    """

    def chunk(hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        return checkpoint(head.layer, lambda hidden: _score(head(hidden), targets, weights)[0])(
            hidden
        )

    return chunk


def _frozen_chunk(head: Head, slice_bytes: int) -> Loss:
    """Return a loss function for a chunk that computes the gradient of ``hidden`` at once.

    The loss and the gradient need the same exponentials, so the forward pass computes both.
    """

    @mx.custom_function
    def loss_and_gradient(
        hidden: mx.array, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array]:
        score, gradient = _score_slices(
            head, hidden, targets, weights, slice_bytes=slice_bytes, learning=True
        )
        return score[0], gradient

    @loss_and_gradient.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        _, targets, weights = primals
        return (
            (cotangents[0] * outputs[1]).astype(outputs[1].dtype),
            mx.zeros_like(targets),
            mx.zeros_like(weights),
        )

    def chunk(hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        both: Any = loss_and_gradient(hidden, targets, weights)
        return both[0]

    return chunk


def _score_slices(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    *,
    slice_bytes: int,
    learning: bool = False,
) -> tuple[mx.array, mx.array]:
    """Compute the loss of a frozen head and its gradient in slices.

    The first result is (summed loss, number of targets with the largest logit). The second is the
    gradient of ``hidden``, which is valid only if ``learning`` is true.
    """
    width = max(1, slice_bytes // (4 * hidden.shape[0]))
    targets = targets[:, None]
    top, total, pulled = (
        mx.full(targets.shape, -1e8),
        mx.zeros(targets.shape),
        mx.zeros(hidden.shape),
    )
    score = total  # scores of the targets: (targets, 1)
    # An array, because MLX would compile a kernel for every constant.
    starts = mx.arange(0, head.vocabulary, width)
    for number, start in enumerate(range(0, head.vocabulary, width)):
        part = slice(start, min(start + width, head.vocabulary))
        # Without this dependency, all slices would be in memory at once.
        hidden = mx.depends([hidden], [total, pulled, score])[0]
        scores = project(head.layer, hidden, part).astype(mx.float32)  # (targets, width)
        place = targets - starts[number]
        inside = (place >= 0) & (place < scores.shape[1])
        place = mx.where(inside, place, 0)
        score = mx.where(inside, mx.take_along_axis(scores, place, axis=-1), score)
        logits = head.finish(scores)
        higher = mx.maximum(top, logits.max(axis=-1, keepdims=True))
        fade, exps = exp(top - higher), exp(logits - higher)
        # Sum by a matrix product, which rounds small terms less than a plain sum does.
        ones = mx.ones((scores.shape[1], 1))
        top, total = higher, total * fade + exps @ ones
        if learning:
            pull = head.pull_back(scores, exps).astype(hidden.dtype)
            pulled = pulled * fade + project(head.layer, pull, part, back=True).astype(mx.float32)
    chosen = head.finish(score)
    loss = ((top + mx.log(total) - chosen).squeeze(-1) * weights).sum()
    likeliest = ((chosen >= top).squeeze(-1) * weights).sum()
    rows = full_weight(head.layer, mx.float32, targets[:, 0])  # W[target]: (targets, hidden)
    slope = head.pull_back(score, mx.ones_like(score))
    return mx.stack([loss, likeliest]), ((pulled / total - slope * rows) * weights[:, None]).astype(
        hidden.dtype
    )
