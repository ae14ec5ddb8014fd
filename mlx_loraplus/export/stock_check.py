"""Check that mlx-lm alone loads a fused model, and that it computes the same logits."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapters.token_tables import probe_tokens
from ..errors import ModelError
from ..failures import failure_of
from ..models.loading import load_stock, shared_copy


def check_loads_unchanged(model: Any) -> None:
    """Check that mlx-lm would load the weights unchanged.

    For example, mlx-lm normalizes the unquantized head of a Baichuan model.

    Raises:
        ModelError: mlx-lm would change a weight.
    """
    if not hasattr(model, "sanitize"):
        return

    # Work on copies, because ``sanitize`` of some models removes entries of the model.
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    copied: Any = shared_copy(model)
    try:
        read: dict[str, mx.array] = copied.sanitize(dict(weights))
    except (KeyError, ValueError):
        # ``sanitize`` expects the checkpoint's original entries, which a loaded model lacks.
        return

    for name, array in read.items():
        own = weights.get(name)
        if own is None or array is own:
            continue
        if array.shape != own.shape or _differs(array, own):
            raise ModelError(
                f"mlx-lm would change {name} when it loads this model: keep this layer as it is in"
                " the base, without --bits, --dequantize or an adapter on it"
            )


def check_runs_in_mlx_lm(model: nn.Module, folder: Path) -> None:
    """Check that mlx-lm alone computes the same logits from a written folder as our model.

    mlx-lm's model takes the arrays that are already in memory, so this needs hardly more memory.

    Raises:
        ModelError: mlx-lm can't load or run the folder, or its logits differ.
    """
    advice = "leave --dequantize and --bits out, or use a newer mlx-lm"
    tokens = probe_tokens(model, 3)
    training = model.training
    model.eval()
    try:
        expected: Any = model(tokens)
        stock: Any = load_stock(folder)
        own: Any = tree_flatten(model.parameters())
        stock.load_weights(own)
        stock.eval()
        found: Any = stock(tokens)
        is_same = _is_close(found, expected)
    # mlx-lm's model classes may raise any kind of error for unexpected weights.
    except Exception as problem:
        if failure_of(problem) is not None:
            raise
        reason = " ".join(str(problem).split())
        raise ModelError(f"mlx-lm can't run the fused model ({reason:.200}): {advice}") from None
    finally:
        model.train(training)
    if not is_same:
        raise ModelError(f"mlx-lm computes other logits from the fused model: {advice}")


def _differs(array: mx.array, own: mx.array) -> bool:
    """Return whether two arrays differ by more than rounding."""
    difference = mx.abs(array - own).max()
    return bool((difference > 1e-3 * mx.abs(own).max()).item())


def _is_close(found: mx.array, expected: mx.array) -> bool:
    """Return whether logits agree up to rounding; masked logits are -inf in both."""
    known = mx.where(mx.isfinite(expected), mx.abs(expected), 0.0)
    margin = 1e-3 * float(known.max().item())  # pyright: ignore[reportArgumentType]
    same = mx.allclose(found, expected, rtol=0.0, atol=margin, equal_nan=True)
    return bool(same.item())
