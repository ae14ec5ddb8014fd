"""Make the attention masks of training rows, in which each example sees only its own tokens.

    mask[i, j] = (segment[i] = segment[j]) and (j <= i) and (i - j < window, if the layer has one)

mlx-lm's models ask the cache of a layer for the mask, the position offset, and the keys and values
to attend to. ``RowCache`` keeps nothing and returns the mask above, so several examples can be
packed into a row without changing the model. Rows of one example have no segments; the cache then
only passes the layer's window to our attention. Positions do not restart at each example, because
rotary embeddings are relative. Models can't be packed in this way if their layers carry a state,
limit attention to blocks of tokens or add absolute positions. A trial on the loaded model detects
them.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..adapters.token_tables import TOKEN_TABLES, table_rows
from ..errors import ConfigError
from ..failures import is_lost
from .attention import CausalMask
from .patch import replaced_attention, replaces_attention
from .reduced_model import front_of

TOLERANCE = 1e-3
"""Largest allowed relative difference between logits of packed and of separate examples."""

# The reduced model for the trial has at least 4 blocks, and 64 rows of embeddings and head.
_BLOCKS = 4
_TOKENS = 64


class RowCache:
    """The cache for training: it makes the mask, and does not keep keys or values.

    ``segments`` is None unless rows are packed.
    """

    offset = 0

    def __init__(self, segments: mx.array | None = None):
        self.segments = segments

    def make_mask(
        self,
        length: int,
        return_array: bool = True,  # noqa: ARG002
        window_size: int | None = None,
    ) -> Any:
        """Return the mask: a ``CausalMask`` for our attention, or a bool array for MLX's.

        The array has the shape (rows, 1, length, length). Padding sees padding, so that every query
        sees at least one key.
        """
        mask = CausalMask(window_size, self.segments, mx.arange(length))
        return mask if replaces_attention() else mask.part(slice(0, length), slice(0, length))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values unchanged, because the cache holds no earlier ones."""
        return keys, values


def row_caches(model: nn.Module, segments: mx.array | None = None) -> list[Any]:
    """Return one ``RowCache`` per layer for a training batch; ``model`` may also be a trunk."""
    return [RowCache(segments)] * len(make_prompt_cache(model))


def check_packing(model: nn.Module) -> None:
    """Try packing on the loaded model, and raise ConfigError if it does not work."""
    if not takes_caches(model):
        kind = getattr(model, "model_type", type(model).__name__)
        raise ConfigError(
            f"pack does not work with this model ({kind}): packed examples give other logits than"
            " separate ones; leave --pack off"
        )


def takes_caches(model: nn.Module) -> bool:
    """Return whether ``row_caches`` separates the examples of a row, at any position in the row.

    Two tests are made. Changing one example must not change the logits of the other examples in its
    row, and each example must give the same logits as in a row of its own. Both comparisons use
    ``TOLERANCE``. The tests run in float32 on the first blocks, which include every kind of block.
    Half precision is not used, because its rounding depends on the position in the row (by up to 6%
    in SmolLM2).
    """
    front = front_of(model, blocks=_BLOCKS, rows=_TOKENS)
    if front is None:
        return False
    front.set_dtype(mx.float32)

    # Two rows of three examples and one token of padding. Only the first example differs.
    known = min(table_rows(front, TOKEN_TABLES) or 2, _TOKENS)
    tokens = [(7 * place) % known for place in range(1, 47)]
    first, second, third = tokens[:29], tokens[29:40], tokens[40:]
    changed = [(token + 1) % known for token in first]
    rows = mx.array([[*first, *second, *third, 0], [*changed, *second, *third, 0]])
    segments = mx.array([[1] * 29 + [2] * 11 + [3] * 6 + [0]] * 2)

    try:
        alone = mx.concatenate([front(mx.array([second]))[0], front(mx.array([third]))[0]])
        with replaced_attention():
            packed = front(rows, cache=row_caches(front, segments))

        # Compare the logits of the second and third examples.
        one, other = packed[0, 29:46], packed[1, 29:46]
        size = TOLERANCE * mx.linalg.norm(alone)
        fits: Any = (
            (mx.linalg.norm(one - other) <= size)
            & (mx.linalg.norm(one - alone) <= size)
            & mx.isfinite(packed).all()
        )
        return fits.item()
    # A model that requires its own type of cache, or a mask array, may raise any exception.
    except Exception as problem:
        if is_lost(problem):
            raise
        return False
