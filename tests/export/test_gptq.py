"""Codes are packed as MLX packs them, and GPTQ keeps a change that plain rounding loses, for inputs it has not seen."""

import mlx.core as mx
import pytest

from mlx_loraplus.export.gptq import COLUMNS, inverse_factors, pack, quantize

WIDTHS = (2, 3, 4, 5, 6, 8)


def restored(arrays: dict[str, mx.array], bits: int) -> mx.array:
    scales, biases = (arrays[name].astype(mx.float32) for name in ("scales", "biases"))
    return mx.dequantize(arrays["weight"], scales, biases, 64, bits)


def cosine(a: mx.array, b: mx.array) -> float:
    return ((a * b).sum() / mx.linalg.norm(a) / mx.linalg.norm(b)).item()  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_is_mlx_s(bits: int):
    codes = mx.random.randint(0, 2**bits, (3, 5, 128)).astype(mx.uint32)
    ones = mx.ones((3, 5, 2))
    assert mx.array_equal(
        mx.dequantize(pack(codes, bits), ones, 0 * ones, 64, bits), codes.astype(mx.float32)
    )


def problem(columns: int, ratio: float, bits: int, dtype: mx.Dtype):
    """Return a quantized base, a change in directions that the inputs have, inputs, and others like them."""
    mx.random.seed(0)
    mixing = mx.random.normal((columns, columns)) / mx.arange(1, columns + 1)[:, None] ** 0.7
    inputs, others = (
        mx.random.normal((256, columns)) @ mixing,
        mx.random.normal((128, columns)) @ mixing,
    )
    grid = mx.quantize(mx.random.normal((48, columns)).astype(dtype), 64, bits)
    base = restored(dict(zip(("weight", "scales", "biases"), grid, strict=True)), bits)
    change = mx.random.normal((48, 8)) @ mx.random.normal((8, 24)) @ mixing[:24]
    return (
        base,
        change * ratio * mx.linalg.norm(base) / mx.linalg.norm(change),
        grid[1:],
        inputs,
        others,
    )


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize(
    ("bits", "ratio"), [(3, 0.03), (4, 0.02), (5, 0.01), (6, 0.006), (8, 0.001)]
)
def test_gptq_keeps_what_plain_rounding_loses(bits: int, ratio: float, dtype: mx.Dtype):
    base, change, grid, inputs, others = problem(256, ratio, bits, dtype)
    settings = {"group_size": 64, "bits": bits, "mode": "affine"}
    kept = []
    for factors in ([], inverse_factors([inputs[:100], inputs[100:]])):
        made = restored(quantize(base + change, settings, dtype, grid, factors), bits) - base
        kept.append(cosine(others @ change.T, others @ made.T))
    assert kept[0] < 0.9
    assert kept[1] > 0.95


def test_wide_layers_are_worked_off_in_parts():
    columns = COLUMNS + 64
    base, change, grid, inputs, others = problem(columns, 0.01, 4, mx.float32)
    factors = inverse_factors([inputs])
    assert [len(factor) for factor in factors] == [COLUMNS, 64]
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    made = restored(quantize(base + change, settings, mx.float32, grid, factors), 4) - base
    assert cosine(others @ change.T, others @ made.T) > 0.9


def test_without_inputs_and_for_other_modes_it_is_mlx_s():
    weight = mx.random.normal((8, 128))
    for settings in (
        {"group_size": 64, "bits": 4, "mode": "affine"},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    ):
        factors = [] if settings["mode"] == "affine" else inverse_factors([weight])
        made = quantize(weight, settings, mx.float32, None, factors)
        assert all(
            mx.array_equal(a, b)
            for a, b in zip(made.values(), mx.quantize(weight, **settings), strict=True)
        )


def test_groups_without_spread_and_inputs_of_zeros_stay_finite():
    weight = mx.concatenate([mx.zeros((4, 64)), mx.full((4, 64), -0.25)], axis=1)
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    made = restored(
        quantize(weight, settings, mx.bfloat16, None, inverse_factors([mx.zeros((5, 128))])), 4
    )
    assert mx.abs(made - weight).max() < 1e-6
