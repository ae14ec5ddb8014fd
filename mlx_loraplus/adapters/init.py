"""Initial values of A and B: Init[1], Init[2], PiSSA and LoftQ.

- ``init1`` (A random, B = 0) and ``init2`` (A = 0, B random) are the two initializations of the
  LoRA+ paper (arXiv 2402.12354 §3).
- ``pissa`` (Meng et al., arXiv 2404.02948): s B A is the best rank-r approximation of W, and is
  subtracted from the base. With ``quantize``, the remaining base W - s B A is quantized.
- ``loftq`` (Li et al., arXiv 2310.08659): the base is quantized to Q, and s B A is the best
  approximation of the quantization error W - Q. Q and s B A are updated alternately, because
  W - s B A can be quantized with a smaller error than W.

The singular values are divided equally between L = U √S and R = √S Vᵀ. Each of them is also divided
by √s, because the adapter multiplies their product by the scale s.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..config import AdapterConfig
from .base_layers import full_weight, plain_layer
from .lora import LoRA, uniform

OVERSAMPLING = 8
POWER_ITERATIONS = 4


def initialize(adapter: LoRA, config: AdapterConfig) -> tuple[float, float] | None:
    """Set the initial A and B of a new adapter.

    Returns:
        If the base is quantized here, the relative errors ‖W - Q₀‖ / ‖W‖, where Q₀ is W quantized
        directly, and ‖W - Q - s B A‖ / ‖W‖; otherwise None.
    """
    residuals = None

    # A new layer already has the values of init1.
    if config.init == "init2":
        adapter.lora_a = mx.zeros_like(adapter.lora_a)
        adapter.lora_b = uniform(adapter.lora_b.shape, adapter.rank)
    elif config.init != "init1":
        residuals = _approximate(adapter, config)

    adapter.update_derived()
    mx.eval(adapter.parameters())
    return residuals


def _approximate(adapter: LoRA, config: AdapterConfig) -> tuple[float, float] | None:
    """Initialize with PiSSA or LoftQ, and subtract the start from the base or quantize the base."""
    weight = full_weight(adapter.base, mx.float32)
    exact = config.svd == "exact"
    settings: Any = config.quantization

    def quantized(weight: mx.array) -> Any:
        layer = plain_layer(adapter.base, weight.astype(adapter.base.weight.dtype))
        return layer.to_quantized(**settings)

    def rounded(weight: mx.array) -> mx.array:
        return full_weight(quantized(weight), mx.float32)

    # Split the weight into L R and the rest, which the base will hold.
    if config.init == "pissa":
        left, right = low_rank(weight, adapter.rank, exact=exact)
        rest = weight - left @ right
    else:
        rest, left, right = loftq(weight, adapter.rank, config.loftq_iters, rounded, exact=exact)
    adapter.set_factors(left / adapter.scale**0.5, right / adapter.scale**0.5)

    # Without quantization the base does not change, and the adapter subtracts its start.
    if settings is None:
        adapter.subtract_start()
        return None

    # Measure the errors while the adapter still has its old base.
    size = mx.linalg.norm(weight)
    before: Any = mx.linalg.norm(weight - rounded(weight)) / size
    after: Any = mx.linalg.norm(weight - rounded(rest) - left @ right) / size

    adapter.replace_base(quantized(rest))
    return before.item(), after.item()


def loftq(
    weight: mx.array,
    rank: int,
    iters: int,
    rounded: Callable[[mx.array], mx.array],
    *,
    exact: bool,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return (rest, L, R) of LoftQ, where rounded(rest) + L R approximates ``weight``.

    Args:
        weight: W, (..., rows, columns).
        rank: Rank of L R.
        iters: Number of iterations. With 1, L R approximates the error of quantizing W itself.
        rounded: A function that quantizes and dequantizes a weight.
        exact: As for ``low_rank``.
    """
    rest, left, right = weight, mx.array(0.0), mx.array(0.0)
    for iteration in range(iters):
        if iteration > 0:
            rest = weight - left @ right
        left, right = low_rank(weight - rounded(rest), rank, exact=exact)
        mx.eval(left, right)
    return rest, left, right


def low_rank(
    weight: mx.array,
    rank: int,
    *,
    exact: bool,
) -> tuple[mx.array, mx.array]:
    """Return L and R, where L R is the best approximation of a weight.

    They are L = U √S, (..., rows, rank), and R = √S Vᵀ, (..., rank, columns).

    Args:
        weight: (..., rows, columns).
        rank: Rank of L R.
        exact: Compute the singular vectors of the whole weight; otherwise search for them in a
            random subspace, which is faster.
    """
    rows, columns = weight.shape[-2:]
    if not exact and rank + OVERSAMPLING < min(rows, columns):
        return _low_rank_in_subspace(weight, rank)

    # Work on the smaller side, so that the Gram matrix is small and the full V is never computed.
    if rows > columns:
        left, right = low_rank(weight.swapaxes(-1, -2), rank, exact=True)
        return right.swapaxes(-1, -2), left.swapaxes(-1, -2)

    # U: the eigenvectors of W Wᵀ with the largest eigenvalues, which eigh returns last.
    _, vectors = mx.linalg.eigh(weight @ weight.swapaxes(-1, -2), stream=mx.cpu)
    u = vectors[..., : -rank - 1 : -1]

    # S Vᵀ = Uᵀ W: (..., rank, columns)
    sv = u.swapaxes(-1, -2) @ weight

    # √S; a singular value of zero gives a row of zeros.
    root = mx.sqrt(mx.linalg.norm(sv, axis=-1))
    inverse = mx.where(root > 0, 1 / root, 0.0)
    return u * root[..., None, :], sv * inverse[..., None]


def _low_rank_in_subspace(weight: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """Return L and R as ``low_rank`` does, but search for them in a random subspace.

    Power iterations turn the subspace towards the largest singular vectors (Halko, Martinsson and
    Tropp, arXiv 0909.4061 §4.5).
    """
    # Draw a random subspace of the columns' span, and improve it with power iterations.
    transposed = weight.swapaxes(-1, -2)
    shape = (*weight.shape[:-2], weight.shape[-1], rank + OVERSAMPLING)
    sample = weight @ mx.random.normal(shape)
    for _ in range(POWER_ITERATIONS):
        sample = weight @ _orthonormal(transposed @ _orthonormal(sample))

    # Solve the small problem within the subspace, whose basis is (..., rows, rank + OVERSAMPLING).
    basis = _orthonormal(sample)
    left, right = low_rank(basis.swapaxes(-1, -2) @ weight, rank, exact=True)
    return basis @ left, right


def _orthonormal(matrix: mx.array) -> mx.array:
    """Return an orthonormal basis of the columns' span."""
    return mx.linalg.qr(matrix, stream=mx.cpu)[0]
