"""Cross-entropy at supervised positions only, computed in slices of the vocabulary.

    loss = - sum over supervised i of log softmax(head(hidden_i))[target_i]

The trunk computes the hidden states, and those that predict a target are selected. The head's
scores are computed for one slice of the vocabulary at a time, instead of as full logits. With a
frozen head, the forward pass can already compute the gradient of the hidden states,

    d loss / d hidden = (e W) / sum(e) - W[target],   e = exp(logits - max)

with one exponential for each logit. Here scores = hidden Wᵀ, and logits = head.finish(scores),
which applies a multiplier and a soft cap if the model has them. head.pull_back multiplies a
gradient by d logits / d scores.

The backward pass only multiplies the gradient of the hidden states by the cotangent. The maximum,
the sum and e W are updated from slice to slice, as in *FlashAttention* (arXiv 2205.14135). W is
read twice for each chunk of rows. Only a few slices are in memory at a time, instead of
(batch, seq, vocabulary) logits.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import checkpoint

from ..adapters.base_layers import full_weight, project
from ..device import MOST_ELEMENTS, on_gpu
from ..errors import ConfigError, counted
from .choices import StepChoices, default_choices
from .elementwise import exp
from .patch import replaces_attention
from .row_masks import row_caches
from .trunk_and_head import Head, TrunkAndHead

CHUNK_POSITIONS = 512  # positions whose logits are computed together
TILE = 64  # the width of a slice is a multiple of this, as MLX's kernels for matrices prefer
_SPREAD = 0.05  # a remainder up to this fraction of a slice is spread over the other slices

Loss = Callable[..., mx.array]


def make_loss(trunk_and_head: TrunkAndHead | None, choices: StepChoices | None = None) -> Loss:
    """Return ``loss(model, tokens, positions, targets, weights, segments=None)``.

    ``loss`` returns the summed loss of a batch, a float32 scalar. Its arguments are those of
    ``Batch``. Without them, the whole model computes full logits.

    Args:
        trunk_and_head: The model's trunk and head, or None.
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
        if trunk_and_head is None:
            caches = {} if segments is None else {"cache": row_caches(model, segments)}
            logits = full_logits(model, tokens, positions, **caches).astype(mx.float32)
            return (nn.losses.cross_entropy(logits, targets) * weights).sum()
        hidden = select_hidden(trunk_and_head, model, tokens, positions, segments)
        return head_loss(trunk_and_head.head, hidden, targets, weights, choices)

    return loss


def make_score(trunk_and_head: TrunkAndHead | None, choices: StepChoices | None = None) -> Loss:
    """Return ``score(model, tokens, positions, targets, weights)``.

    ``score`` returns (summed loss, number of targets with the largest logit). Its arguments are
    those of the function that ``make_loss`` returns. It has no gradient.

    Args:
        trunk_and_head: The model's trunk and head, or None.
        choices: The size of the slices; by default that of the device.
    """
    choices = choices or default_choices()

    def score(
        model: Any, tokens: mx.array, positions: mx.array, targets: mx.array, weights: mx.array
    ) -> mx.array:
        if trunk_and_head is None:
            found = _losses_of_logits(full_logits(model, tokens, positions), targets, weights)
            return mx.stack([each.sum() for each in found])

        hidden = select_hidden(trunk_and_head, model, tokens, positions, learning=False)
        score_chunk = chunk_score(trunk_and_head.head, choices)
        total = mx.array(0.0)
        for chunk in chunks_of(trunk_and_head.head, (hidden, targets, weights), choices):
            losses, likeliest = score_chunk(*chunk)
            total = total + mx.stack([losses.sum(), likeliest.sum()])
        return total

    return score


def full_logits(model: Any, tokens: mx.array, positions: mx.array, **caches: Any) -> mx.array:
    """Return the logits at some positions, (positions, vocabulary), from those at all positions.

    Raises:
        ConfigError: There are more logits than an array on a GPU can have.
    """
    logits: mx.array = model(tokens, **caches)
    if on_gpu() and logits.size > MOST_ELEMENTS:
        rows, length = tokens.shape
        raise ConfigError(
            f"a batch of {counted(rows, 'row')} x {length:,} tokens needs an array of"
            f" {logits.size:,} logits, and on a GPU an array has at most {MOST_ELEMENTS:,}"
            " elements: use a smaller --batch-size, with --grad-accumulation-steps, or a smaller"
            " --max-seq-length"
        )
    return logits.flatten(0, 1)[positions]


def select_hidden(
    trunk_and_head: TrunkAndHead,
    model: Any,
    tokens: mx.array,
    positions: mx.array,
    segments: mx.array | None = None,
    *,
    learning: bool = True,
) -> mx.array:
    """Return the trunk's hidden states that predict a target: (targets, hidden).

    Each token attends to itself and to the tokens before it in its example.
    """
    # mlx-lm's models take their attention masks from caches; those of ``row_caches`` hold only
    # masks. Packed rows need them, and so does the attention that replaces MLX's in training steps,
    # and sometimes in validation. Otherwise, a model makes causal masks without caches.
    needs_masks = trunk_and_head.takes_caches and (learning or replaces_attention())
    caches: dict[str, Any] = {}
    if segments is not None or needs_masks:
        caches["cache"] = row_caches(model, segments)
    return trunk_and_head.trunk(tokens, **caches).flatten(0, 1)[positions]


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
        weights: 1, or 0 to ignore a target, (targets,).
        choices: The size of the slices; by default that of the device.
    """
    choices = choices or default_choices()
    losses = chunk_loss(head, choices)
    total = mx.array(0.0)
    for chunk in chunks_of(head, (hidden, targets, weights), choices):
        total = total + losses(*chunk).sum()
    return total


def chunks_of(
    head: Head, arrays: tuple[mx.array, ...], choices: StepChoices
) -> Iterator[list[mx.array]]:
    """Yield chunks of the positions of ``arrays``, small ones if the head is not frozen."""
    size = CHUNK_POSITIONS
    if not head.is_frozen:
        # The full logits of a chunk may take as much memory as eight slices.
        size = max(8, 8 * choices.slice_bytes // (4 * head.vocabulary))
    for start in range(0, arrays[0].shape[0], size):
        yield [array[start : start + size] for array in arrays]


def chunk_loss(head: Head, choices: StepChoices) -> Loss:
    """Return ``losses(hidden, targets, weights)``: the loss of each target, with a gradient."""
    return _frozen_losses(head, choices) if head.is_frozen else _trained_losses(head)


def chunk_score(head: Head, choices: StepChoices) -> Callable[..., tuple[mx.array, mx.array]]:
    """Return ``score(hidden, targets, weights)``: ``_losses_of_logits`` without a gradient."""

    def score(hidden: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        if not head.is_frozen:
            return _losses_of_logits(head(hidden), targets, weights)
        losses, likeliest, _ = _losses_in_slices(head, hidden, targets, weights, choices=choices)
        return losses, likeliest

    return score


def slice_width(slice_bytes: int, rows: int, vocabulary: int) -> int:
    """Return the number of tokens in a slice of the vocabulary for this many rows.

    All slices but the last have this width. They may be larger than ``slice_bytes`` by a twentieth,
    so that a small rest of the vocabulary needs no slice of its own.
    """
    most = max(1, slice_bytes // (4 * rows))
    count = math.ceil(vocabulary / most - _SPREAD)
    width = math.ceil(vocabulary / max(1, count))
    return width if width < TILE else math.ceil(width / TILE) * TILE


def _losses_of_logits(
    logits: mx.array, targets: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the loss of each target, and whether it has the largest logit: two of (targets,).

    Both are multiplied by the weights. The loss is differentiable.
    """
    logits = logits.astype(mx.float32)  # (targets, vocabulary)
    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    total = exp(logits - top) @ mx.ones((logits.shape[-1], 1))
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)
    losses = (top + mx.log(total) - chosen).squeeze(-1) * weights
    return losses, (chosen >= top).squeeze(-1) * weights


def _trained_losses(head: Head) -> Loss:
    """Return a function for the losses of a chunk that is recomputed in the backward pass.

    Its gradient also reaches an adapter on the head.
    """

    def losses(hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        def losses_of(hidden: mx.array) -> mx.array:
            return _losses_of_logits(head(hidden), targets, weights)[0]

        return checkpoint(head.layer, losses_of)(hidden)

    return losses


def _frozen_losses(head: Head, choices: StepChoices) -> Loss:
    """Return a function for the losses of a chunk that computes the gradient of ``hidden`` at once.

    The losses and the gradient need the same exponentials, so the forward pass computes both.
    """

    @mx.custom_function
    def losses_and_gradient(
        hidden: mx.array, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array]:
        losses, _, gradient = _losses_in_slices(
            head, hidden, targets, weights, choices=choices, learning=True
        )
        return losses, gradient

    @losses_and_gradient.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        # Only ``hidden`` has a gradient.
        _, targets, weights = primals
        gradient = cotangents[0][:, None] * outputs[1]
        return (
            gradient.astype(outputs[1].dtype),
            mx.zeros_like(targets),
            mx.zeros_like(weights),
        )

    def losses(hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        both: Any = losses_and_gradient(hidden, targets, weights)
        return both[0]

    return losses


def _losses_in_slices(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    *,
    choices: StepChoices,
    learning: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute the losses of a frozen head and their gradients in slices.

    Return the loss of each target, (targets,); whether it has the largest logit, (targets,); and
    the gradient of each loss with respect to its hidden state, (targets, hidden). All three are
    multiplied by the weights. The losses are always valid; the gradient only if ``learning`` is
    true, and the second result only if it is false.

    The exponentials are relative to ``shift``. That is the largest logit of the slices so far, and
    ``total`` is the sum of the exponentials. With MLX's own cross-entropy, ``shift`` is the
    logarithm of that sum instead, and ``total`` stays 1.
    """
    native = learning and choices.cross_entropy == "native"
    width = slice_width(choices.slice_bytes, hidden.shape[0], head.vocabulary)
    targets = targets[:, None]
    shift, gradient_sum = mx.full(targets.shape, -1e8), mx.zeros(hidden.shape)
    total = mx.full(targets.shape, 1.0 if native else 0.0)
    target_score = mx.zeros(targets.shape)  # scores of the targets

    # The slice of each target, and its place there. The numbers of the slices are an array,
    # because MLX would compile a kernel for every constant.
    numbers = mx.arange(-(-head.vocabulary // width), dtype=targets.dtype)
    slice_of, place = targets // width, targets % width

    for number, start in enumerate(range(0, head.vocabulary, width)):
        part = slice(start, min(start + width, head.vocabulary))
        # Without this dependency, all slices would be in memory at once.
        hidden = mx.depends([hidden], [total, gradient_sum, target_score])[0]
        scores = project(head.layer, hidden, part)  # (targets, width)

        # The last slice may be narrower. The places of targets in other slices may be outside it.
        if scores.shape[1] < width:
            place = mx.minimum(place, scores.shape[1] - 1)
        inside = slice_of == numbers[number : number + 1]
        found = mx.take_along_axis(scores, place, axis=-1)
        target_score = mx.where(inside, found, target_score.astype(scores.dtype))

        # Each use casts the scores separately, so that no float32 copy of the slice is stored.
        if native:
            higher = _log_of_sum(head, shift, scores, found, place)
        else:
            higher = _largest_logit(head, shift, scores)
        scores = scores.astype(mx.float32)
        rescale = exp(shift - higher)
        exps = exp(head.finish(scores) - higher)
        shift = higher

        if not native:
            # Sum by a matrix product, which rounds small terms less than a plain sum does.
            total = total * rescale + exps @ mx.ones((scores.shape[1], 1))
        if learning:
            # Add e W of this slice, where ``pull_back`` has multiplied e by d logits / d scores.
            slice_gradient = head.pull_back(scores, exps).astype(hidden.dtype)
            product = project(head.layer, slice_gradient, part, back=True)
            gradient_sum = gradient_sum * rescale + product.astype(mx.float32)

    # The losses, and the gradient of the sum of exponentials minus that of the targets' logits.
    target_score = target_score.astype(mx.float32)
    chosen = head.finish(target_score)
    losses = (shift + mx.log(total) - chosen).squeeze(-1) * weights
    likeliest = (chosen >= shift).squeeze(-1) * weights
    target_weights = full_weight(head.layer, mx.float32, targets[:, 0])  # (targets, hidden)
    target_slope = head.pull_back(target_score, mx.ones_like(target_score))
    gradient = (gradient_sum / total - target_slope * target_weights) * weights[:, None]
    return losses, likeliest, gradient.astype(hidden.dtype)


def _log_of_sum(
    head: Head, shift: mx.array, scores: mx.array, found: mx.array, place: mx.array
) -> mx.array:
    """Return the logarithm of the sum of all exponentials so far, with MLX's own cross-entropy.

    MLX returns log(sum of exp(logits)) - logits[place], so the logit there is added back.

    Args:
        head: The head.
        shift: The logarithm for the slices before this one, (targets, 1).
        scores: The scores of this slice, (targets, width).
        found: The scores at ``place``, (targets, 1).
        place: A place in the slice for each target, (targets, 1).
    """
    logits = scores if head.is_plain else head.finish(scores.astype(mx.float32))
    relative = mx.fast.cross_entropy(logits, place[:, 0])[:, None]
    return mx.logaddexp(shift, relative + head.finish(found.astype(mx.float32)))


def _largest_logit(head: Head, shift: mx.array, scores: mx.array) -> mx.array:
    """Return the largest logit of this slice and of the slices before it, (targets, 1)."""
    # The logits increase with the scores, so the largest score gives the largest logit.
    largest = scores.max(axis=-1, keepdims=True).astype(mx.float32)
    return mx.maximum(shift, head.finish(largest))
