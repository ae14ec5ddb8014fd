"""Attention in chunks of queries. The backward pass recomputes the scores of each chunk.

    O = softmax(s Q Kᵀ + mask) V

MLX's own attention keeps (rows, heads, length, length) elements for the backward pass. Here, both
passes compute the scores of one chunk, use them, and free them (Dao et al., *FlashAttention*, arXiv
2205.14135):

    P = exp(s Q Kᵀ + mask - lse),   dV = Pᵀ dO,   dS = P (dO Vᵀ - rowsum(dO O)),
    dQ = s dS K,   dK = s dSᵀ Q

A chunk never reads the keys after its end or before its sliding window.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .elementwise import exp

CHUNK = 512  # queries whose attention is computed at a time
UNSEEN = -1e8  # finite, so that a row without visible keys gives no NaN


@dataclass(frozen=True)
class CausalMask:
    """A causal mask that is not stored as a matrix.

    Query i sees key j if j <= i, both have the same segment, and j is inside the window.
    """

    window: int | None = None  # i - j < window
    # (rows, length): 1, 2, ... for the examples of a row, and 0 for padding
    segments: mx.array | None = None
    # 0, 1, ... for a whole row. If layers share this array, a compiled step computes each part of
    # the mask only once.
    positions: mx.array | None = None

    def is_plain(self, length: int) -> bool:
        """Return whether each of ``length`` tokens sees itself and all earlier tokens."""
        return self.segments is None and (self.window is None or self.window >= length)

    def part(self, queries: slice, keys: slice) -> mx.array:
        """Return the mask of these queries and keys, bool.

        Its shape is (queries, keys), or (rows, 1, queries, keys) with segments.
        """
        positions = self.positions
        if positions is None:
            positions = mx.arange(max(queries.stop, keys.stop))
        distance = positions[queries][:, None] - positions[keys]
        seen = distance >= 0
        if self.window is not None:
            seen = seen & (distance < self.window)
        if self.segments is None:
            return seen

        own = self.segments[:, None, queries, None] == self.segments[:, None, None, keys]
        return own & seen

    def chunks(self, length: int) -> Iterator[tuple[slice, slice]]:
        """Yield each chunk of queries with the keys that it can see, rounded to whole chunks."""
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            first = 0 if self.window is None else max(0, start - self.window + 1)
            yield slice(start, stop), slice(first // CHUNK * CHUNK, stop)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: CausalMask) -> mx.array:
    """Return O, (rows, heads, length, v dim), in the type of q; the softmax is float32.

    Args:
        q: (rows, heads, length, dim).
        k: (rows, kv heads, length, dim); each is shared by heads / kv heads query heads.
        v: (rows, kv heads, length, v dim).
        scale: s.
        mask: The mask.
    """
    rows, heads, length, _ = q.shape
    shared = k.shape[1]

    def by_key(x: mx.array, part: slice) -> mx.array:
        """Join the query heads that share a key head into one axis.

        The result has the shape (rows, kv heads, heads / kv heads * part, dim).
        """
        return x[:, :, part].reshape(rows, shared, heads // shared * (part.stop - part.start), -1)

    def scores(q: mx.array, k: mx.array, queries: slice, keys: slice) -> mx.array:
        products = by_key(q, queries) @ k[:, :, keys].swapaxes(-1, -2)
        by_head = products.reshape(rows, heads, queries.stop - queries.start, -1)
        return mx.where(mask.part(queries, keys), by_head.astype(mx.float32) * scale, UNSEEN)

    if mask.positions is None:
        mask = replace(mask, positions=mx.arange(length))

    @mx.custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, ...]:
        outs, sums = [], []
        for queries, keys in mask.chunks(length):
            s = scores(q, k, queries, keys)  # (rows, heads, queries, keys)
            top = s.max(axis=-1, keepdims=True)
            e = exp(s - top)
            total = e.sum(axis=-1, keepdims=True)
            out = by_key(e.astype(v.dtype), slice(0, s.shape[2])) @ v[:, :, keys]
            out = out.reshape(rows, heads, s.shape[2], -1) / total
            outs.append(out.astype(q.dtype).swapaxes(1, 2))
            sums.append(top + mx.log(total))

        # Contiguous in the layout that o_proj reads, so the model's transpose does not copy.
        joined = mx.contiguous(mx.concatenate(outs, axis=1))
        return joined.swapaxes(1, 2), *sums

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        d_out, (out, *lses) = cotangents[0], outputs
        # Without this dependency, a compiled step would keep the scores of the forward pass.
        q, k, v = mx.depends(list(primals), [d_out])
        delta = (d_out.astype(mx.float32) * out.astype(mx.float32)).sum(axis=-1, keepdims=True)
        dq: list[mx.array] = []
        dk: dict[int, Any] = {}  # by the index of the first key of a chunk
        dv: dict[int, Any] = {}

        for (queries, keys), lse in zip(mask.chunks(length), lses, strict=True):
            # Recompute P, and compute dS.
            d = by_key(d_out, queries)
            p = exp(scores(q, k, queries, keys) - lse)
            dp = (d @ v[:, :, keys].swapaxes(-1, -2)).reshape(p.shape)
            ds = (p * (dp - delta[:, :, queries]) * scale).astype(q.dtype)
            whole = slice(0, p.shape[2])
            p, ds = by_key(p.astype(v.dtype), whole), by_key(ds, whole)

            # Each chunk of keys gets gradients from all chunks of queries that see it.
            dq.append((ds @ k[:, :, keys]).reshape(rows, heads, queries.stop - queries.start, -1))
            _add_by_chunk(dk, ds.swapaxes(-1, -2) @ by_key(q, queries), keys)
            _add_by_chunk(dv, p.swapaxes(-1, -2) @ d, keys)
        joined = [_join_chunks(dk), _join_chunks(dv)]

        # Blocks that share the keys of an earlier block need d_keys only there. Without this
        # dependency, the scores of all of them would be kept until then.
        (d_queries,) = mx.depends([mx.concatenate(dq, axis=2)], joined)
        return d_queries, *joined

    both: Any = forward(q, k, v)
    return both[0]


def _add_by_chunk(sums: dict[int, Any], part: mx.array, keys: slice) -> None:
    """Add the gradients of some keys to the sums of the chunks of keys.

    Args:
        sums: Index of a chunk's first key → sum; changed in place.
        part: The gradients, (rows, kv heads, keys, dim).
        keys: The keys, which begin at the start of a chunk.
    """
    for start in range(keys.start, keys.stop, CHUNK):
        piece = part[:, :, start - keys.start : start - keys.start + CHUNK]
        sums[start] = sums[start] + piece if start in sums else piece


def _join_chunks(sums: dict[int, Any]) -> mx.array:
    """Return the sums of all chunks of keys as one array, in the order of the keys."""
    return mx.concatenate([sums[start] for start in sorted(sums)], axis=2)
