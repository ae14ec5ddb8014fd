"""The toy models of the LoRA+ paper (Hayou, Ghosh, Yu, arXiv 2402.12354 §3): what width asks of the two rates.

- ``deltas``: f(x) = (W* + b aᵀ) x with one sample and U = f - y. A step of gradient descent changes
  f by

      δ¹ + δ² + δ³ = -η_a b² U ‖x‖² - η_b (aᵀx)² U + η_a η_b U² b (aᵀx) ‖x‖².

  Learning is efficient where all three stay Θ(1) as the width n grows: with equal rates they can't
  (Proposition 1), with η_a = Θ(1/n) and η_b = Θ(1) they do (Proposition 2).
- ``figure_losses``: Figure 2's net, f(x) = W_out relu(B A relu(W_in x)), over a grid of (η_A, η_B).
- ``adam_losses``: one n x n layer, Adam, a teacher of the adapter's rank: which ratio η_B / η_A is
  best at which width.
"""

import mlx_loraplus  # noqa: F401, I001  before mlx

from collections.abc import Sequence
from typing import Literal

import mlx.core as mx
import numpy as np

Init = Literal["init1", "init2"]


def deltas(
    n: int,
    init: Init,
    eta_a: float,
    eta_b: float,
    *,
    steps: int = 3,
    draws: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Return δ¹, δ², δ³ and the change of f itself at the last of ``steps`` updates, (4, draws).

    Args:
        n: Width.
        init: Where it starts: a ~ N(0, 1/n), b = 0, or a = 0, b ~ N(0, 1).
        eta_a: Rate of a.
        eta_b: Rate of b.
        steps: Updates.
        draws: Draws of x ~ N(0, I) and of the start; y - W* x = 1.
        seed: Of the draws.
    """
    generator = np.random.default_rng([seed, n])
    x = generator.standard_normal((draws, n))
    a, b = np.zeros((draws, n)), np.zeros(draws)
    if init == "init1":
        a = generator.standard_normal((draws, n)) / np.sqrt(n)
    else:
        b = generator.standard_normal(draws)
    size = (x * x).sum(1)
    found = np.zeros((4, draws))
    for _ in range(steps):
        ax = (a * x).sum(1)
        u = b * ax - 1
        found[:3] = (
            -eta_a * b**2 * u * size,
            -eta_b * ax**2 * u,
            eta_a * eta_b * u**2 * b * ax * size,
        )
        a, b = a - eta_a * (u * b)[:, None] * x, b - eta_b * u * ax
        found[3] = b * (a * x).sum(1) - 1 - u
    return found


def exponents(widths: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Return the slopes of log value against log width, by least squares: (widths, k) → (k,)."""
    return np.polyfit(np.log(widths), np.log(values), 1)[0]


def figure_losses(
    eta_a: np.ndarray,
    eta_b: np.ndarray,
    reports: Sequence[int],
    *,
    seed: int,
    d: int = 5,
    n: int = 100,
    rank: int = 4,
) -> np.ndarray:
    """Train Figure 2's net by full-batch gradient descent on half the mean squared error, all pairs of rates at once.

    W_in ~ N(0, 1), W_out and A ~ N(0, 1/n), B ~ N(0, 1), x ~ N(0, I), y = sin(mean x), 1,000 rows
    and 100 to test.

    Args:
        eta_a: Rates of A, (cells,).
        eta_b: Rates of B, (cells,).
        reports: After how many updates to test, ascending.
        seed: Of data and start.
        d: Inputs.
        n: Width.
        rank: Of B A.

    Returns:
        The test losses (half the mean squared error), (reports, cells); not finite where it
        diverged.
    """
    keys = iter(mx.random.split(mx.random.key(seed), 6))
    w_in, w_out = (
        mx.random.normal((d, n), key=next(keys)),
        mx.random.normal((n,), key=next(keys)) / n**0.5,
    )
    start_a, start_b = (
        mx.random.normal((n, rank), key=next(keys)) / n**0.5,
        mx.random.normal((rank, n), key=next(keys)),
    )
    x, x_test = (mx.random.normal((rows, d), key=next(keys)) for rows in (1000, 100))
    (h, y), (h_test, y_test) = (
        (mx.maximum(rows @ w_in, 0), mx.sin(mx.mean(rows, axis=1))) for rows in (x, x_test)
    )  # (rows, n), (rows,)
    cells = len(eta_a)
    a = mx.broadcast_to(start_a[:, None], (n, cells, rank))
    b = mx.broadcast_to(start_b, (cells, rank, n))
    rate_a, rate_b = (
        mx.array(eta_a, mx.float32)[:, None],
        mx.array(eta_b, mx.float32)[:, None, None],
    )

    def hidden(a: mx.array, b: mx.array, h: mx.array) -> tuple[mx.array, mx.array]:
        z = (h @ a.reshape(n, -1)).reshape(-1, cells, rank).swapaxes(0, 1)  # (cells, rows, rank)
        return z, mx.maximum(z @ b, 0)  # (cells, rows, n)

    found, done = [], 0
    for report in reports:
        for _ in range(done, report):
            z, p = hidden(a, b, h)
            d_p = ((p @ w_out - y) / len(y))[..., None] * mx.where(p > 0, w_out, 0)
            d_z = (
                (d_p @ b.swapaxes(1, 2)).swapaxes(0, 1).reshape(len(y), -1)
            )  # (rows, cells * rank)
            a, b = a - rate_a * (h.T @ d_z).reshape(a.shape), b - rate_b * (z.swapaxes(1, 2) @ d_p)
            mx.eval(a, b)
        done = report
        error = hidden(a, b, h_test)[1] @ w_out - y_test
        found.append(np.array(0.5 * mx.mean(error * error, axis=1)))
    return np.stack(found)


def adam_losses(
    n: int,
    init: Init,
    eta_a: np.ndarray,
    eta_b: np.ndarray,
    *,
    steps: int,
    seed: int,
    samples: int = 32,
    rank: int = 4,
) -> np.ndarray:
    """Train y = x A B on a teacher of the same rank by full-batch Adam, all pairs of rates at once.

    Init[1]: A ~ N(0, 1/n), B = 0; Init[2]: A = 0, B ~ N(0, 1). The teacher's outputs are Θ(1).

    Args:
        n: Width of input and output.
        init: Where it starts.
        eta_a: Rates of A, (cells,).
        eta_b: Rates of B, (cells,).
        steps: Updates.
        seed: Of data, teacher and start.
        samples: Rows, the same at every width: what aligns A with x.
        rank: Of A B and of the teacher.

    Returns:
        Loss at the end / loss at the start, (cells,); infinite where it diverged.
    """
    keys = iter(mx.random.split(mx.random.key(seed), 4))
    x = mx.random.normal((samples, n), key=next(keys))
    y = (x @ mx.random.normal((n, rank), key=next(keys)) / n**0.5) @ mx.random.normal(
        (rank, n), key=next(keys)
    )
    cells, random = len(eta_a), next(keys)
    a, b = mx.zeros((n, cells, rank)), mx.zeros((cells, rank, n))
    if init == "init1":
        a = a + mx.random.normal((n, 1, rank), key=random) / n**0.5
    else:
        b = b + mx.random.normal((rank, n), key=random)
    rates = mx.array(eta_a, mx.float32)[:, None], mx.array(eta_b, mx.float32)[:, None, None]
    moments = [(mx.zeros_like(p), mx.zeros_like(p)) for p in (a, b)]
    for step in range(1, steps + 1):
        z = (
            (x @ a.reshape(n, -1)).reshape(samples, cells, rank).swapaxes(0, 1)
        )  # (cells, samples, rank)
        error = z @ b - y  # (cells, samples, n)
        d_z = (error @ b.swapaxes(1, 2)).swapaxes(0, 1).reshape(samples, -1)
        gradients = (x.T @ d_z).reshape(a.shape), z.swapaxes(1, 2) @ error
        new = []
        for which, (p, g, rate) in enumerate(zip((a, b), gradients, rates, strict=True)):
            m, v = moments[which]
            moments[which] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            new.append(p - rate * (m / (1 - 0.9**step)) / (mx.sqrt(v / (1 - 0.999**step)) + 1e-12))
        a, b = new
        mx.eval(a, b, moments)
    z = (x @ a.reshape(n, -1)).reshape(samples, cells, rank).swapaxes(0, 1)
    loss = mx.square(z @ b - y).sum((1, 2)) / mx.square(y).sum()
    return np.nan_to_num(np.array(loss), nan=np.inf)
