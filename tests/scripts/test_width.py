"""The paper's toys: what is known of them in advance."""

import mlx.core as mx
import numpy as np
import pytest

from scripts.study.toys import DELTA_CASES
from scripts.study.width import (
    adam_losses,
    deltas,
    exponents,
    figure_losses,
)  # isort: skip  before mlx

WIDTHS = (64, 256, 1024)


@pytest.mark.parametrize("init", ["init1", "init2"])
def test_the_three_parts_are_the_change_of_f(init):
    parts = deltas(50, init, 0.002, 0.1, steps=4, draws=20)
    np.testing.assert_allclose(parts[:3].sum(0), parts[3], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DELTA_CASES)
def test_the_exponents_are_the_papers(name):
    init, eta_a, eta_b, expected = DELTA_CASES[name]
    sizes = [
        np.median(np.abs(deltas(n, init, eta_a(n), eta_b(n), draws=4000)[:3]), axis=1)
        for n in WIDTHS
    ]
    np.testing.assert_allclose(exponents(WIDTHS, np.array(sizes)), expected, atol=0.1)


def test_the_grid_of_figure_2_is_gradient_descent_cell_by_cell():
    rates = np.array([0.02, 0.3]), np.array([0.05, 0.01])
    losses = figure_losses(*rates, (0, 3), seed=4, d=3, n=8, rank=2)
    keys = mx.random.split(mx.random.key(4), 6)
    w_in, w_out = (
        mx.random.normal((3, 8), key=keys[0]),
        mx.random.normal((8,), key=keys[1]) / 8**0.5,
    )
    x, x_test = mx.random.normal((1000, 3), key=keys[4]), mx.random.normal((100, 3), key=keys[5])

    def loss(a, b, x):
        f = mx.maximum(mx.maximum(x @ w_in, 0) @ a @ b, 0) @ w_out
        return 0.5 * mx.square(f - mx.sin(x.mean(axis=1))).mean()

    for cell, (eta_a, eta_b) in enumerate(zip(*rates, strict=True)):
        a, b = mx.random.normal((8, 2), key=keys[2]) / 8**0.5, mx.random.normal((2, 8), key=keys[3])
        assert losses[0, cell] == pytest.approx(loss(a, b, x_test).item(), rel=1e-4)
        for _ in range(3):
            d_a, d_b = mx.grad(loss, argnums=(0, 1))(a, b, x)
            a, b = a - eta_a * d_a, b - eta_b * d_b
        assert losses[1, cell] == pytest.approx(loss(a, b, x_test).item(), rel=1e-4)


def test_figure_2s_best_equal_rate_is_the_papers():
    rates = np.array([10 ** (k / 3) for k in range(-7, -2)])
    losses = np.array([figure_losses(rates, rates, (200,), seed=seed)[0] for seed in range(5)])
    best = int(np.median(np.nan_to_num(losses, nan=np.inf), axis=0).argmin())
    assert abs(best - 2) <= 1, (rates, losses)  # 2.15e-2 = 10^(-5/3), within a cell of the grid


def test_a_wide_layer_from_init_2_needs_rates_apart():
    rates = np.array([10 ** (k / 2) for k in range(-8, 1)])
    b, a = (grid.ravel() for grid in np.meshgrid(rates, rates, indexing="ij"))
    narrow, wide = (adam_losses(n, "init2", a, b, steps=60, seed=0) for n in (32, 256))
    equal = a == b
    assert wide[equal].min() > 3 * narrow[equal].min()
    assert wide.min() < 0.1 * wide[equal].min()
    assert b[wide.argmin()] > 30 * a[wide.argmin()]
