"""GPTQ: quantize a fused weight so that its layer's outputs change little, rather than its weights.

The base is quantized already, and the change D is a small part of a quantization step, so rounding
each weight of W + D on its own adds noise larger than D. GPTQ passes a column's rounding error on
to the following columns, which make up for it as far as the layer's inputs allow (Frantar et al.,
arXiv 2210.17323). With H = XᵀX + damping and H⁻¹ = UᵀU,

    e = (w_j - q_j) / U_jj,   w_k ← w_k - e U_jk for k > j
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

COLUMNS = 2048  # that pass errors on to each other; the work grows with the cube of it
BLOCK = 64  # columns that are processed before the errors reach those behind them
DAMPING = 0.01

Grid = tuple[mx.array, mx.array]
"""Scales and biases, (rows, groups) each."""


def inverse_factors(inputs: Sequence[mx.array]) -> list[mx.array]:
    """Return U, upper triangular, for every ``COLUMNS`` of a layer's inputs.

    Args:
        inputs: (tokens, columns) each.
    """
    factors: list[mx.array] = []
    for start in range(0, inputs[0].shape[-1], COLUMNS):
        # H, with enough damping that it can be inverted.
        moment: Any = 0.0
        for x in inputs:
            part = x[:, start : start + COLUMNS].astype(mx.float32)
            moment = moment + part.T @ part
        damping = DAMPING * mx.maximum(mx.diag(moment).mean(), 1e-12)
        factors.append(_inverse_factor(moment + damping * mx.eye(len(moment))))

        # Dropped first, so that it is freed while the factor is computed.
        del moment
        mx.eval(factors)
    return factors


def _inverse_factor(matrix: mx.array) -> mx.array:
    """Return U, upper triangular, with matrix⁻¹ = UᵀU."""
    inverse = mx.linalg.inv(matrix, stream=mx.cpu)
    symmetric = (inverse + inverse.T) / 2
    return mx.linalg.cholesky(symmetric, upper=True, stream=mx.cpu)


def quantize(
    weight: mx.array,
    settings: dict[str, Any],
    dtype: mx.Dtype,
    grid: Grid | None,
    factors: Sequence[mx.array],
) -> dict[str, mx.array]:
    """Quantize a weight to the arrays of a quantized layer, by GPTQ if its inputs are known.

    Args:
        weight: (..., rows, columns), float32; (rows, columns) with ``factors``.
        settings: ``group_size``, ``bits`` and ``mode``. Modes other than affine are rounded by MLX.
        dtype: Of the scales and biases.
        grid: Scales and biases of a base with the same settings. A group that has hardly changed
            fits them best, since the base's weight lies on them.
        factors: From ``inverse_factors``; empty to round each weight on its own.
    """
    is_affine = settings["mode"] == "affine"
    made: Any = mx.quantize(weight.astype(dtype) if is_affine else weight, **settings)
    arrays: dict[str, mx.array] = dict(zip(("weight", "scales", "biases"), made, strict=False))
    if not is_affine or not factors:
        return arrays

    # Take each group's nearer grid.
    scales, biases = arrays["scales"], arrays["biases"]
    if grid is not None:
        old = _distances(weight, *grid, settings)
        new = _distances(weight, scales, biases, settings)
        scales = mx.where(old <= new, grid[0], scales)
        biases = mx.where(old <= new, grid[1], biases)

    rounder = _Rounder.of(scales, biases, settings)
    codes = rounder.codes(weight, factors)
    return {"weight": pack(codes, settings["bits"]), "scales": scales, "biases": biases}


def _distances(
    weight: mx.array, scales: mx.array, biases: mx.array, settings: dict[str, Any]
) -> mx.array:
    """Return each group's squared distance from its nearest codes, (rows, groups)."""
    groups = weight.reshape(len(weight), -1, settings["group_size"])
    steps = _nonzero(scales)[..., None]
    zeros = biases[..., None].astype(mx.float32)

    top = 2 ** settings["bits"] - 1
    codes = mx.clip(mx.round((groups - zeros) / steps), 0, top)
    return mx.square(steps * codes + zeros - groups).sum(axis=-1)


def _nonzero(scales: mx.array) -> mx.array:
    """Return scales to divide by, float32: a group without spread has a scale of zero."""
    return mx.where(scales == 0, 1, scales).astype(mx.float32)


@dataclass(frozen=True)
class _Rounder:
    """The grid of a weight's columns.

    Attributes:
        steps: (rows, groups), float32.
        zeros: The values of code 0, (rows, groups), float32.
        group_size: Columns in a group.
        top: The largest code.
    """

    steps: mx.array
    zeros: mx.array
    group_size: int
    top: int

    @classmethod
    def of(cls, scales: mx.array, biases: mx.array, settings: dict[str, Any]) -> "_Rounder":
        """Return the rounder of a quantized layer's scales and biases."""
        zeros = biases.astype(mx.float32)
        return cls(_nonzero(scales), zeros, settings["group_size"], 2 ** settings["bits"] - 1)

    def codes(self, weight: mx.array, factors: Sequence[mx.array]) -> mx.array:
        """Return GPTQ's codes of a weight, (rows, columns)."""
        codes: list[mx.array] = []
        for number, u in enumerate(factors):
            first = number * COLUMNS
            rest = weight[:, first : first + COLUMNS]

            # Columns up to start are done; rest holds the others, with the errors so far.
            for start in range(0, len(u), BLOCK):
                end = min(start + BLOCK, len(u))
                block, errors = self._round_block(rest[:, : end - start], first, u, start)
                codes += block

                rest = rest[:, end - start :]
                if end < len(u):
                    rest = rest - errors @ u[start:end, end:]
                mx.eval(rest, block)
        return mx.stack(codes, axis=1)

    def _round_block(
        self, columns: mx.array, first: int, u: mx.array, start: int
    ) -> tuple[list[mx.array], mx.array]:
        """Return the codes of some columns, (rows,) each, and their errors e, (rows, columns).

        Args:
            columns: (rows, columns).
            first: The column of the weight that ``u`` begins with.
            u: The factor.
            start: The row of ``u`` that belongs to the first of the columns.
        """
        end = start + columns.shape[1]
        codes: list[mx.array] = []
        errors: list[mx.array] = []
        for j in range(start, end):
            group = (first + j) // self.group_size
            step, zero = self.steps[:, group], self.zeros[:, group]

            column = columns[:, j - start]
            code = mx.clip(mx.round((column - zero) / step), 0, self.top)
            error = (column - (step * code + zero)) / u[j, j]

            columns = columns - error[:, None] * u[j, start:end]
            codes.append(code)
            errors.append(error)
        return codes, mx.stack(errors, axis=1)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes (..., n) into words as MLX does: one stream of bits, lowest first."""
    bit_numbers = mx.arange(bits, dtype=mx.uint8)
    stream = (codes.astype(mx.uint8)[..., None] >> bit_numbers) & 1  # (..., n, bits)

    octets = stream.reshape(*codes.shape[:-1], -1, 8) << mx.arange(8, dtype=mx.uint8)
    return octets.sum(axis=-1).astype(mx.uint8).view(mx.uint32)
