"""GPTQ: quantize a fused weight with a small error in the layer's outputs.

The base is already quantized, and the change D is a small part of a quantization step. Rounding
each weight of W + D separately therefore adds noise that is larger than D. GPTQ distributes the
rounding error of a column over the following columns, so that the error of the layer's outputs is
small (Frantar et al., arXiv 2210.17323). With H = XᵀX + damping and H⁻¹ = UᵀU,

    e = (w_j - q_j) / U_jj,   w_k ← w_k - e U_jk for k > j
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

COLUMNS = 2048  # columns that share one factor; the work grows with the cube of this number
BLOCK = 64  # columns that are rounded before their errors are passed to the columns after them
DAMPING = 0.01

Grid = tuple[mx.array, mx.array]
"""Scales and biases, (rows, groups) each."""


def inverse_factors(inputs: Sequence[mx.array]) -> list[mx.array]:
    """Return the upper triangular factor U for each group of ``COLUMNS`` columns of the inputs.

    Args:
        inputs: The layer's inputs, (tokens, columns) each.
    """
    factors: list[mx.array] = []
    for start in range(0, inputs[0].shape[-1], COLUMNS):
        # Compute H with enough damping to make it invertible.
        moment: Any = 0.0
        for x in inputs:
            part = x[:, start : start + COLUMNS].astype(mx.float32)
            moment = moment + part.T @ part
        damping = DAMPING * mx.maximum(mx.diag(moment).mean(), 1e-12)
        factors.append(_inverse_factor(moment + damping * mx.eye(len(moment))))

        # Drop this reference, so that the memory is freed while the factor is computed.
        del moment
        mx.eval(factors)
    return factors


def _inverse_factor(matrix: mx.array) -> mx.array:
    """Return the upper triangular U with matrix⁻¹ = UᵀU."""
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
    """Quantize a weight to the arrays of a quantized layer, with GPTQ if ``factors`` are given.

    Args:
        weight: The weight, (..., rows, columns), float32; (rows, columns) with ``factors``.
        settings: ``group_size``, ``bits`` and ``mode``. Modes other than affine are rounded by MLX.
        dtype: The type of the scales and biases.
        grid: Scales and biases of a base with the same settings. They suit a group that changed
            very little, because the base's weights lie exactly on this grid.
        factors: The factors from ``inverse_factors``; empty to round each weight separately.
    """
    is_affine = settings["mode"] == "affine"
    made: Any = mx.quantize(weight.astype(dtype) if is_affine else weight, **settings)
    arrays: dict[str, mx.array] = dict(zip(("weight", "scales", "biases"), made, strict=False))
    if not is_affine or not factors:
        return arrays

    # For each group, choose the grid with the smaller distance.
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
    """Return the squared distance between each group and its rounded values, (rows, groups)."""
    groups = weight.reshape(len(weight), -1, settings["group_size"])
    steps = _nonzero(scales)[..., None]
    zeros = biases[..., None].astype(mx.float32)

    top = 2 ** settings["bits"] - 1
    codes = mx.clip(mx.round((groups - zeros) / steps), 0, top)
    return mx.square(steps * codes + zeros - groups).sum(axis=-1)


def _nonzero(scales: mx.array) -> mx.array:
    """Return scales in float32 with 1 in place of 0, so that they can be used as divisors.

    A group of equal weights has a scale of 0.
    """
    return mx.where(scales == 0, 1, scales).astype(mx.float32)


@dataclass(frozen=True)
class _Rounder:
    """The quantization grid of a weight.

    Attributes:
        steps: The distances between neighbouring values, (rows, groups), float32.
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
        """Return a rounder for the scales and biases of a quantized layer."""
        zeros = biases.astype(mx.float32)
        return cls(_nonzero(scales), zeros, settings["group_size"], 2 ** settings["bits"] - 1)

    def codes(self, weight: mx.array, factors: Sequence[mx.array]) -> mx.array:
        """Return the codes of a weight, computed with GPTQ, (rows, columns)."""
        codes: list[mx.array] = []
        for number, u in enumerate(factors):
            first = number * COLUMNS
            rest = weight[:, first : first + COLUMNS]

            # Columns before start are rounded. rest holds the others, corrected for the errors.
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
            columns: The columns to round, (rows, columns).
            first: The index of the weight's column that belongs to the first row of ``u``.
            u: The factor.
            start: The row of ``u`` that belongs to the first of the columns to round.
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
    """Pack codes (..., n) into words as MLX does: one stream of bits, lowest bit first."""
    bit_numbers = mx.arange(bits, dtype=mx.uint8)
    stream = (codes.astype(mx.uint8)[..., None] >> bit_numbers) & 1  # (..., n, bits)

    octets = stream.reshape(*codes.shape[:-1], -1, 8) << mx.arange(8, dtype=mx.uint8)
    return octets.sum(axis=-1).astype(mx.uint8).view(mx.uint32)
