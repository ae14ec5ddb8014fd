"""Sliding-window attention in blocks of queries that are computed together, for GPUs.

    O = softmax(s Q Kᵀ + mask) V

A query sees only the keys of its window. The queries are cut into blocks, and each block gets the
keys of its own block and of the blocks that its window reaches back to, as a strided view. All
blocks form one batch of matrix products, so that the number of kernels does not depend on the
length, and the scores take length · (window + 2 blocks) elements per head instead of length². The
backward pass recomputes them:

    dV = Pᵀ dO,   dS = P (dO Vᵀ - rowsum(dO O)),   dQ = s dS K,   dK = s dSᵀ Q

A key is in the keys of several blocks, so its gradient is the sum over them. The scores have the
type of the queries, as in MLX's own attention where it is not fused; the softmax sums in float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .attention import UNSEEN, CausalMask

BLOCK = 256  # queries in a block
GROUP_BYTES = 256 * 2**20  # of the scores of the blocks that are computed together
_FAR = 2**30  # position of padding, outside every window


@dataclass(frozen=True)
class Blocks:
    """How rows are cut into blocks.

    Attributes:
        rows: Rows of the batch.
        heads: Query heads.
        shared: Key heads.
        length: Tokens of a row.
        window: Keys that a query sees, including its own.
    """

    rows: int
    heads: int
    shared: int
    length: int
    window: int

    @property
    def size(self) -> int:
        """The number of queries in a block."""
        return min(BLOCK, self.length)

    @property
    def count(self) -> int:
        """The number of blocks."""
        return math.ceil(self.length / self.size)

    @property
    def before(self) -> int:
        """The number of blocks before its own that a block's queries see."""
        return math.ceil((self.window - 1) / self.size)

    @property
    def keys(self) -> int:
        """The number of keys of a block."""
        return (self.before + 1) * self.size

    @property
    def padding(self) -> tuple[int, int]:
        """The numbers of positions to add before and after a row."""
        return self.before * self.size, self.count * self.size - self.length

    def groups(self, itemsize: int) -> Iterator[slice]:
        """Yield the blocks whose scores, of ``itemsize`` bytes, are computed together."""
        step = max(1, GROUP_BYTES // self._block_bytes(itemsize))
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))

    def group_bytes(self, itemsize: int) -> int:
        """Return the bytes of the scores of the largest group."""
        first = next(self.groups(itemsize))
        return (first.stop - first.start) * self._block_bytes(itemsize)

    def cut_queries(self, x: mx.array) -> mx.array:
        """Return the blocks' queries. The query heads that share a key head become one axis.

        (rows, heads, length, dim) → (rows, kv heads, blocks, heads / kv heads · size, dim)
        """
        if self.padding[1]:
            x = mx.pad(x, [(0, 0), (0, 0), (0, self.padding[1]), (0, 0)])
        x = x.reshape(self.rows, self.shared, -1, self.count, self.size, x.shape[-1])
        return x.swapaxes(2, 3).flatten(3, 4)

    def join_queries(self, x: mx.array) -> mx.array:
        """Return an array of blocks of queries in the order of the tokens.

        (rows, kv heads, blocks, heads / kv heads · size, dim) → (rows, length, heads, dim)
        """
        x = x.reshape(self.rows, self.shared, self.count, -1, self.size, x.shape[-1])
        x = x.transpose(0, 2, 4, 1, 3, 5).reshape(self.rows, -1, self.heads, x.shape[-1])
        return x[:, : self.length]

    def cut_keys(self, x: mx.array) -> mx.array:
        """Return the blocks' keys, or values, as a view of one padded copy.

        (rows, kv heads, length, dim) → (rows, kv heads, blocks, keys, dim)
        """
        x = mx.pad(x, [(0, 0), (0, 0), self.padding, (0, 0)])
        _, _, padded, dim = x.shape
        shape = (self.rows, self.shared, self.count, self.keys, dim)
        strides = (self.shared * padded * dim, padded * dim, self.size * dim, dim, 1)
        return mx.as_strided(x, shape, strides)

    def sum_keys(self, x: mx.array) -> mx.array:
        """Return the sum over all blocks that have a key, as the gradient of ``cut_keys`` needs it.

        (rows, kv heads, blocks, keys, dim) → (rows, kv heads, length, dim)
        """
        x = mx.pad(x, [(0, 0), (0, 0), (0, self.before), (0, 0), (0, 0)])
        parts = x.reshape(self.rows, self.shared, -1, self.before + 1, self.size, x.shape[-1])

        # Keys that are part ``before`` of their own block are part 0 of the block ``before`` later.
        total = parts[:, :, : self.count, self.before].astype(mx.float32)
        for later in range(1, self.before + 1):
            part = parts[:, :, later : later + self.count, self.before - later]
            total = total + part.astype(mx.float32)
        return total.astype(x.dtype).flatten(2, 3)[:, :, : self.length]

    def seen(self, mask: CausalMask) -> mx.array:
        """Return which keys of its block each query sees: (blocks, 1, size, keys), bool.

        With segments, the shape is (rows, 1, blocks, 1, size, keys).
        """
        positions = mx.arange(self.length) if mask.positions is None else mask.positions
        positions = mx.pad(positions, self.padding, constant_values=_FAR)
        distance = self._of_queries(positions)[..., None] - self._of_keys(positions)[:, None]
        seen = (distance >= 0) & (distance < self.window)
        if mask.segments is None:
            return seen[:, None]

        segments = mx.pad(mask.segments, [(0, 0), self.padding])
        own = self._of_queries(segments)[..., None] == self._of_keys(segments)[:, :, None]
        return (own & seen)[:, None, :, None]

    def _block_bytes(self, itemsize: int) -> int:
        return self.rows * self.heads * self.size * self.keys * itemsize

    def _of_queries(self, x: mx.array) -> mx.array:
        """Return what belongs to the queries of padded rows: (…, padded) → (…, blocks, size)."""
        return x[..., self.before * self.size :].reshape(*x.shape[:-1], self.count, self.size)

    def _of_keys(self, x: mx.array) -> mx.array:
        """Return what belongs to the keys of padded rows: (…, padded) → (…, blocks, keys)."""
        shape = (*x.shape[:-1], self.count, self.keys)
        strides = (*(x.shape[-1],) * (x.ndim - 1), self.size, 1)
        return mx.as_strided(x, shape, strides)


def window_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: CausalMask
) -> mx.array:
    """Return O, (rows, heads, length, v dim), in the type of q.

    Args:
        q: (rows, heads, length, dim).
        k: (rows, kv heads, length, dim); each is shared by heads / kv heads query heads.
        v: (rows, kv heads, length, v dim).
        scale: s.
        mask: The mask; it must have a window.
    """
    assert mask.window is not None
    rows, heads, length, _ = q.shape
    blocks = Blocks(rows, heads, k.shape[1], length, mask.window)
    groups = list(blocks.groups(q.itemsize))
    seen = blocks.seen(mask)

    def probabilities(q: mx.array, k: mx.array, group: slice) -> mx.array:
        """Return P of a group: (rows, kv heads, blocks, heads / kv heads · size, keys)."""
        products = q @ k.swapaxes(-1, -2)
        by_head = mx.unflatten(products, 3, (-1, blocks.size)).astype(mx.float32)
        visible = seen[..., group, :, :, :]
        scores = mx.where(visible, by_head * scale, UNSEEN).astype(q.dtype)
        return mx.softmax(scores, axis=-1, precise=True).flatten(3, 4)

    @mx.custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        q, k, v = blocks.cut_queries(q), blocks.cut_keys(k), blocks.cut_keys(v)

        # Each group depends on the one before, so that one group at a time is in memory.
        outs: list[mx.array] = []
        for group in groups:
            (queries,) = mx.depends([q[:, :, group]], outs[-1:])
            p = probabilities(queries, k[:, :, group], group)
            outs.append(p @ v[:, :, group])

        # Contiguous in the layout that o_proj reads, so the model's transpose does not copy.
        joined = blocks.join_queries(mx.concatenate(outs, axis=2))
        return mx.contiguous(joined.astype(q.dtype)).swapaxes(1, 2)

    @forward.vjp
    def backward(primals: Any, d_out: mx.array, out: mx.array) -> Any:
        # Without this dependency, a compiled step would keep the scores of the forward pass.
        q, k, v = mx.depends(list(primals), [d_out])
        delta = (d_out.astype(mx.float32) * out.astype(mx.float32)).sum(axis=-1, keepdims=True)
        q, d, delta = (blocks.cut_queries(x) for x in (q, d_out, delta))
        k, v = blocks.cut_keys(k), blocks.cut_keys(v)

        # Recompute P, and compute the gradients of the group's queries, keys and values.
        parts: list[list[mx.array]] = []
        for group in groups:
            last = parts[-1] if parts else []
            queries, grads = mx.depends([q[:, :, group], d[:, :, group]], last)
            p = probabilities(queries, k[:, :, group], group)
            dp = grads @ v[:, :, group].swapaxes(-1, -2)
            ds = (p * (dp - delta[:, :, group]) * scale).astype(q.dtype)
            d_keys, d_values = ds.swapaxes(-1, -2) @ queries, p.swapaxes(-1, -2) @ grads
            parts.append([ds @ k[:, :, group], d_keys, d_values])

        # Join the groups, and sum over the blocks that share a key.
        dq, dk, dv = (mx.concatenate(list(part), axis=2) for part in zip(*parts, strict=True))
        d_keys, d_values = blocks.sum_keys(dk), blocks.sum_keys(dv)

        # As in ``attention``: what is kept for shared keys is their gradient, not the scores.
        (d_queries,) = mx.depends([blocks.join_queries(dq).swapaxes(1, 2)], [d_keys, d_values])
        return d_queries, d_keys, d_values

    result: Any = forward(q, k, v)
    return result
