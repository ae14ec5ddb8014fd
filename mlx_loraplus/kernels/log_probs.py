"""The log-probabilities of answers, which the objectives for preferences compare."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .choices import StepChoices, default_choices
from .cross_entropy import chunk_loss, chunk_score, chunks_of, full_logits, select_hidden
from .trunk_and_head import Head, TrunkAndHead

LogProbs = Callable[..., tuple[mx.array, mx.array]]


def make_log_probs(
    trunk_and_head: TrunkAndHead | None,
    choices: StepChoices | None = None,
    *,
    learning: bool = True,
) -> LogProbs:
    """Return ``log_probs(model, tokens, positions, targets, weights)``.

    ``log_probs`` returns two float32 arrays: log p(supervised tokens of a row | tokens before them)
    and the number of these tokens, each (rows,). The first is differentiable. The arguments are
    those of ``Batch``, which must not be packed.

    Args:
        trunk_and_head: The model's trunk and head, or None.
        choices: The size of the slices; by default that of the device.
        learning: Whether the first result needs a gradient.
    """
    choices = choices or default_choices()

    def log_probs(
        model: Any, tokens: mx.array, positions: mx.array, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array]:
        # The loss of each target.
        if trunk_and_head is None:
            logits = full_logits(model, tokens, positions).astype(mx.float32)
            losses = nn.losses.cross_entropy(logits, targets) * weights
        else:
            hidden = select_hidden(trunk_and_head, model, tokens, positions, learning=learning)
            arrays = (hidden, targets, weights)
            losses = _token_losses(trunk_and_head.head, arrays, choices, learning=learning)

        # Sum over each row. With a mask, the order of summation is the same on every device.
        rows, length = tokens.shape
        is_in_row = (positions // length)[None] == mx.arange(rows)[:, None]  # (rows, targets)
        sums = mx.where(is_in_row, losses[None], 0.0).sum(axis=1)
        counts = mx.where(is_in_row, weights[None], 0.0).sum(axis=1)
        return -sums, counts

    return log_probs


def _token_losses(
    head: Head, arrays: tuple[mx.array, ...], choices: StepChoices, *, learning: bool
) -> mx.array:
    """Return the terms of ``head_loss``, one for each target: (targets,) float32.

    Without ``learning``, they have no gradient.
    """
    chunks = chunks_of(head, arrays, choices)
    if learning:
        losses = chunk_loss(head, choices)
        return mx.concatenate([losses(*chunk) for chunk in chunks])

    score = chunk_score(head, choices)
    return mx.concatenate([score(*chunk)[0] for chunk in chunks])
