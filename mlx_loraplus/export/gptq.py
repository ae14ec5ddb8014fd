"""Quantizing a fused weight so that its layer's outputs, rather than its weights, are near: GPTQ.

W + D lies between the codes of a base that is quantized already, and D is a small part of a step,
so rounding each weight by itself gives noise larger than D. Here a column's rounding error is
carried over to the columns that follow, as far as the layer's inputs make up for it (Frantar et
al., arXiv 2210.17323): with H = XᵀX + damping and H⁻¹ = UᵀU,

    e = (w_j - q_j) / U_jj,   w_k ← w_k - e U_jk for k > j
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

COLUMNS = 2048  # whose errors are carried over among themselves: the work grows with the cube of it
BLOCK = 64  # of them worked off together
DAMPING = 0.01

Grid = tuple[mx.array, mx.array]
"""Scales and biases, (rows, groups)."""


def inverse_factors(inputs: Sequence[mx.array]) -> list[mx.array]:
    """Return U, upper triangular, for every ``COLUMNS`` of a layer's inputs, each (tokens, columns)."""
    factors = []
    for start in range(0, inputs[0].shape[-1], COLUMNS):
        moment: Any = 0.0
        for x in inputs:
            part = x[:, start : start + COLUMNS].astype(mx.float32)
            moment = moment + part.T @ part
        damping = DAMPING * mx.maximum(mx.diag(moment).mean(), 1e-12)
        inverse = mx.linalg.inv(moment + damping * mx.eye(len(moment)), stream=mx.cpu)
        factors.append(mx.linalg.cholesky((inverse + inverse.T) / 2, upper=True, stream=mx.cpu))
        mx.eval(factors)
    return factors


def quantize(
    weight: mx.array,
    settings: dict[str, Any],
    dtype: mx.Dtype,
    grid: Grid | None,
    factors: Sequence[mx.array],
) -> dict[str, mx.array]:
    """Quantize a weight to the arrays of a quantized layer, by GPTQ where its inputs are known.

    Args:
        weight: (..., rows, columns), float32; (rows, columns) with ``factors``.
        settings: ``group_size``, ``bits`` and ``mode``; the microscaling modes have MLX's own
            rounding.
        dtype: Of the scales and biases.
        grid: Scales and biases of a base with the same settings: what it holds lies on them, so a
            group that has hardly changed is best kept on them.
        factors: From ``inverse_factors``; none for rounding each weight by itself.
    """
    made: Any = mx.quantize(
        weight if settings["mode"] != "affine" else weight.astype(dtype), **settings
    )
    arrays: dict[str, mx.array] = dict(zip(("weight", "scales", "biases"), made, strict=False))
    if settings["mode"] == "affine" and factors:
        scales, biases = arrays["scales"], arrays["biases"]
        if grid is not None:
            nearer = _distances(weight, *grid, settings) <= _distances(
                weight, scales, biases, settings
            )
            scales, biases = mx.where(nearer, grid[0], scales), mx.where(nearer, grid[1], biases)
        codes = _carried(weight, scales, biases, settings, factors)
        return {"weight": pack(codes, settings["bits"]), "scales": scales, "biases": biases}
    return arrays


def _distances(
    weight: mx.array, scales: mx.array, biases: mx.array, settings: dict[str, Any]
) -> mx.array:
    """Return each group's squared distance from its nearest codes, (rows, groups)."""
    groups = weight.reshape(len(weight), -1, settings["group_size"])
    s, beta = (
        mx.where(scales == 0, 1, scales)[..., None].astype(mx.float32),
        biases[..., None].astype(mx.float32),
    )
    codes = mx.clip(mx.round((groups - beta) / s), 0, 2 ** settings["bits"] - 1)
    return mx.square(s * codes + beta - groups).sum(axis=-1)


def _carried(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    settings: dict[str, Any],
    factors: Sequence[mx.array],
) -> mx.array:
    """Return GPTQ's codes, (rows, columns)."""
    size, top = settings["group_size"], 2 ** settings["bits"] - 1
    s = mx.where(scales == 0, 1, scales).astype(mx.float32)
    beta = biases.astype(mx.float32)
    codes: list[mx.array] = []
    for number, u in enumerate(factors):
        rest = weight[:, number * COLUMNS : (number + 1) * COLUMNS]
        for start in range(0, rest.shape[1], BLOCK):
            end = min(start + BLOCK, rest.shape[1])
            here, errors = rest[:, start:end], []
            for j in range(end - start):
                group = (number * COLUMNS + start + j) // size
                column, step, zero = here[:, j], s[:, group], beta[:, group]
                code = mx.clip(mx.round((column - zero) / step), 0, top)
                errors.append((column - (step * code + zero)) / u[start + j, start + j])
                here = here - errors[-1][:, None] * u[start + j, start:end]
                codes.append(code)
            if end < rest.shape[1]:
                left = rest[:, end:] - mx.stack(errors, axis=1) @ u[start:end, end:]
                rest = mx.concatenate([rest[:, :end], left], axis=1)
            mx.eval(rest, codes[-len(errors) :])
    return mx.stack(codes, axis=1)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes (..., n) of so many bits into words, as MLX does: one stream of bits, the lowest first."""
    stream = (
        codes.astype(mx.uint8)[..., None] >> mx.arange(bits, dtype=mx.uint8)
    ) & 1  # (..., n, bits)
    octets = stream.reshape(*codes.shape[:-1], -1, 8) << mx.arange(8, dtype=mx.uint8)
    return octets.sum(axis=-1).astype(mx.uint8).view(mx.uint32)
