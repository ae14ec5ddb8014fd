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
TILE = 64  # the width of a slice is a multiple of this, as MLX's kernels for matrices prefer

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
                _score_slices(head, hidden, *rest, choices=choices)[0]
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
    chunk = _frozen_chunk(head, choices) if head.is_frozen else _trained_chunk(head)
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


def slice_width(slice_bytes: int, rows: int) -> int:
    """Return the number of tokens in a slice of the vocabulary for this many rows."""
    width = max(1, slice_bytes // (4 * rows))
    return width if width < TILE else width // TILE * TILE


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


def _frozen_chunk(head: Head, choices: StepChoices) -> Loss:
    """Return a loss function for a chunk that computes the gradient of ``hidden`` at once.

    The loss and the gradient need the same exponentials, so the forward pass computes both.
    """

    @mx.custom_function
    def loss_and_gradient(
        hidden: mx.array, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array]:
        score, gradient = _score_slices(
            head, hidden, targets, weights, choices=choices, learning=True
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
    choices: StepChoices,
    learning: bool = False,
) -> tuple[mx.array, mx.array]:
    """Compute the loss of a frozen head and its gradient in slices.

    The first result is (summed loss, number of targets with the largest logit). The second is the
    gradient of ``hidden``. If ``learning`` is true, the gradient is valid and the number may not
    be; otherwise only the number is.

    The exponentials are relative to ``top``: the largest logit of the slices so far, or with MLX's
    own cross-entropy the logarithm of the sum of all their exponentials, which makes the sum 1.
    """
    native = learning and choices.cross_entropy == "native"
    width = slice_width(choices.slice_bytes, hidden.shape[0])
    targets = targets[:, None]
    top, pulled = mx.full(targets.shape, -1e8), mx.zeros(hidden.shape)
    total = mx.full(targets.shape, 1.0 if native else 0.0)
    score = mx.zeros(targets.shape)  # scores of the targets

    # The slice of each target, and its place there. The numbers of the slices are an array,
    # because MLX would compile a kernel for every constant.
    numbers = mx.arange(-(-head.vocabulary // width), dtype=targets.dtype)
    number_of, place = targets // width, targets % width

    for number, start in enumerate(range(0, head.vocabulary, width)):
        part = slice(start, min(start + width, head.vocabulary))
        # Without this dependency, all slices would be in memory at once.
        hidden = mx.depends([hidden], [total, pulled, score])[0]
        scores = project(head.layer, hidden, part)  # (targets, width)

        # The last slice may be narrower than the places in other slices.
        if scores.shape[1] < width:
            place = mx.minimum(place, scores.shape[1] - 1)
        inside = number_of == numbers[number : number + 1]
        found = mx.take_along_axis(scores, place, axis=-1).astype(mx.float32)
        score = mx.where(inside, found, score)

        # Each use casts the scores by itself, so that no float32 copy of the slice is stored.
        if native:
            logits = scores if head.is_plain else head.finish(scores.astype(mx.float32))
            relative = mx.fast.cross_entropy(logits, place[:, 0])[:, None]
            higher = mx.logaddexp(top, relative + head.finish(found))
        else:
            # The logits increase with the scores, so the largest score gives the largest logit.
            largest = scores.max(axis=-1, keepdims=True).astype(mx.float32)
            higher = mx.maximum(top, head.finish(largest))
        scores = scores.astype(mx.float32)
        fade, exps = exp(top - higher), exp(head.finish(scores) - higher)
        top = higher

        if not native:
            # Sum by a matrix product, which rounds small terms less than a plain sum does.
            total = total * fade + exps @ mx.ones((scores.shape[1], 1))
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
