"""How A and B start: Init[1], Init[2], PiSSA and LoftQ.

- ``init1`` A random, B = 0, and ``init2`` A = 0, B random: the two starts of the LoRA+ paper (arXiv
  2402.12354 §3).
- ``pissa`` (Meng et al., arXiv 2404.02948): s B A is the best approximation of W of rank r, and is
  taken off the base. With ``quantize`` the base that is left, W - s B A, is quantized.
- ``loftq`` (Li et al., arXiv 2310.08659): the base is quantized to Q, and s B A is the best
  approximation of what that loses; both in turn, since with s B A there the rest quantizes better.

Both halves get the same share of the singular values, L = U √S and R = √S Vᵀ, and of the scale,
1/√s.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..config import AdapterConfig
from .layers import full_weight, plain_layer
from .lora import LoRA, uniform

OVERSAMPLING, POWER_ITERATIONS = 8, 4


def initialize(adapter: LoRA, config: AdapterConfig) -> tuple[float, float] | None:
    """Give a new adapter its start.

    Where its base is quantized here, return ‖W - Q‖ / ‖W‖ of quantizing W itself, and ‖W - Q - s B
    A‖ / ‖W‖ as it is.
    """
    residuals = None
    if config.init == "init2":
        adapter.lora_a, adapter.lora_b = (
            mx.zeros_like(adapter.lora_a),
            uniform(adapter.lora_b.shape, adapter.rank),
        )
    elif config.init != "init1":
        residuals = _approximate(adapter, config)
    adapter.settle()
    mx.eval(adapter.parameters())
    return residuals


def _approximate(adapter: LoRA, config: AdapterConfig) -> tuple[float, float] | None:
    """Start as PiSSA or LoftQ do, and take the start off the base, or quantize the base: then return the residuals."""
    weight, exact = full_weight(adapter.base, mx.float32), config.svd == "exact"
    settings: Any = config.quantization

    def quantized(weight: mx.array) -> Any:
        return plain_layer(adapter.base, weight.astype(adapter.base.weight.dtype)).to_quantized(
            **settings
        )

    def rounded(weight: mx.array) -> mx.array:
        return full_weight(quantized(weight), mx.float32)

    if config.init == "pissa":
        left, right = low_rank(weight, adapter.rank, exact=exact)
        rest = weight - left @ right
    else:
        rest, left, right = loftq(weight, adapter.rank, config.loftq_iters, rounded, exact=exact)
    adapter.set_factors(left / adapter.scale**0.5, right / adapter.scale**0.5)
    if settings is None:
        adapter.subtract_start()
        return None
    size = mx.linalg.norm(weight)
    before = mx.linalg.norm(weight - rounded(weight)) / size
    after = mx.linalg.norm(weight - rounded(rest) - left @ right) / size
    adapter.replace_base(quantized(rest))
    return before.item(), after.item()  # pyright: ignore[reportReturnType]


def loftq(
    weight: mx.array, rank: int, iters: int, rounded: Callable[[mx.array], mx.array], *, exact: bool
) -> tuple[mx.array, mx.array, mx.array]:
    """Return (rest, L, R) such that rounded(rest) + L R is close to ``weight``, after LoftQ's ``iters`` turns.

    ``rounded`` gives what quantizing leaves of a weight; one turn approximates what quantizing W
    itself loses.
    """
    rest, left, right = weight, mx.array(0.0), mx.array(0.0)
    for turn in range(iters):
        if turn:
            rest = weight - left @ right
        left, right = low_rank(weight - rounded(rest), rank, exact=exact)
        mx.eval(left, right)
    return rest, left, right


def low_rank(weight: mx.array, rank: int, *, exact: bool) -> tuple[mx.array, mx.array]:
    """Return L (..., rows, rank) and R (..., rank, columns), L R the best approximation of ``weight`` of this rank.

    They are L = U √S and R = √S Vᵀ. The singular vectors come from the smaller Gram matrix: no full
    V is made. If not exact, they are sought in a random subspace that power iterations have turned
    towards them (Halko, Martinsson, Tropp, arXiv 0909.4061 §4.5).
    """
    rows, columns = weight.shape[-2:]
    if not exact and rank + OVERSAMPLING < min(rows, columns):
        sample = weight @ mx.random.normal((*weight.shape[:-2], columns, rank + OVERSAMPLING))
        for _ in range(POWER_ITERATIONS):
            sample = weight @ _orthonormal(weight.swapaxes(-1, -2) @ _orthonormal(sample))
        basis = _orthonormal(sample)  # (..., rows, rank + OVERSAMPLING)
        left, right = low_rank(basis.swapaxes(-1, -2) @ weight, rank, exact=True)
        return basis @ left, right
    if rows > columns:
        left, right = low_rank(weight.swapaxes(-1, -2), rank, exact=True)
        return right.swapaxes(-1, -2), left.swapaxes(-1, -2)
    _, vectors = mx.linalg.eigh(weight @ weight.swapaxes(-1, -2), stream=mx.cpu)
    u = vectors[..., : -rank - 1 : -1]  # eigh's order is ascending
    sv = u.swapaxes(-1, -2) @ weight  # S Vᵀ: (..., rank, columns)
    root = mx.sqrt(mx.linalg.norm(sv, axis=-1))  # √S
    return u * root[..., None, :], sv * mx.where(root > 0, 1 / root, 0.0)[..., None]


def _orthonormal(matrix: mx.array) -> mx.array:
    return mx.linalg.qr(matrix, stream=mx.cpu)[0]
