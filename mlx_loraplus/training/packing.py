"""Several examples in one row, each of which sees itself only.

    mask[i, j] = (segment[i] = segment[j]) and (j <= i) and (i - j < window, in a layer that has one)

mlx-lm's models ask a layer's cache for the mask, for the offset of positions and for the keys and values to attend to.
A cache that keeps nothing and answers with the mask above packs rows without touching the model; without segments it
still tells our attention a layer's window. Positions need no restart, since rotary embeddings are relative. Models
whose layers hand on a state, chunk their attention or add absolute positions can't be packed this way: trying it on the
loaded model tells them apart.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..errors import ConfigError
from .attention import CausalMask, chunked_attention, is_chunked


class RowCache:
    """What a training batch answers where mlx-lm's models ask for a cache; it has segments where rows are packed."""

    offset = 0

    def __init__(self, segments: mx.array | None = None):
        self.segments = segments

    def make_mask(self, length: int, return_array: bool = True, window_size: int | None = None) -> Any:  # noqa: ARG002
        """Return who sees whom, as our attention takes it or as MLX's does: (rows, 1, length, length) bool.

        Padding sees padding, so that no row of it is empty.
        """
        mask = CausalMask(window_size, self.segments)
        return mask if is_chunked() else mask.part(slice(0, length), slice(0, length))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return them as they are: nothing came before."""
        return keys, values


def row_caches(model: nn.Module, segments: mx.array | None = None) -> list[Any]:
    """Return the cache of every layer for a training batch, for a model or its trunk."""
    return [RowCache(segments)] * len(make_prompt_cache(model))


def check_packing(model: nn.Module) -> None:
    """Try packing on the loaded model, and raise ConfigError where it can't be packed."""
    if not takes_caches(model):
        kind = getattr(model, "model_type", type(model).__name__)
        raise ConfigError(
            f"pack does not work with this model ({kind}): rows packed into one do not give what each gives alone; "
            "leave --pack off"
        )


def takes_caches(model: nn.Module) -> bool:
    """Try ``row_caches`` on the loaded model: examples in a row don't see one another, and their place doesn't matter.

    The first is seen by changing an example, which must leave the others of its row alone. The second by the same
    examples in rows of their own; half precision rounds otherwise in another place (by up to 6% in SmolLM2), so what
    counts is that they differ less than half as much as from examples that do see one another.
    """
    first, changed, second, third = [3, 9, 4, 7, 5], [8, 2, 6, 9, 8], [6, 2, 8, 4, 9, 3, 7], [5, 8, 6]
    rows = mx.array([[*first, *second, *third, 0], [*changed, *second, *third, 0], [*third, *first, *second, 0]])
    segments = mx.array([[1] * 5 + [2] * 7 + [3] * 3 + [0]] * 2 + [[1] * 3 + [2] * 5 + [3] * 7 + [0]])
    training = model.training
    model.eval()
    try:
        unmasked = model(rows[:1])[0, 5:15].astype(mx.float32)  # (tokens of the second and third, vocabulary)
        short = model(mx.array([second, [*third, 0, 0, 0, 0]])).astype(mx.float32)
        alone = mx.concatenate([short[0], short[1, :3]])
        try:
            with chunked_attention():
                packed = model(rows, cache=row_caches(model, segments)).astype(mx.float32)
        except Exception:  # whatever a model raises that wants a cache of its own kind, or a mask that is an array  # noqa: BLE001
            return False
        one, other, norm = packed[0, 5:15], packed[1, 5:15], mx.linalg.norm
        apart = norm(one - other) <= 1e-2 * norm(one)
        in_place = norm(one - alone) <= 0.5 * norm(unmasked - alone)
        fits: Any = apart & in_place & mx.isfinite(packed).all()
        return fits.item()
    finally:
        model.train(training)
