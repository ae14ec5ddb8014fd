"""Elementwise functions with their own gradients: one pass over memory, and only the inputs are saved.

A gated MLP computes h = act(gate) * up. Left to itself MLX keeps several arrays of that size for
the backward pass, and on a CPU its exp takes 20 to 30 ns an element. With act(x) = x S(p(x)) and
the sigmoid S,

    silu:         p(x) = x
    gelu (tanh):  p(x) = 2 √(2/π) (x + 0.044715 x³),   since (1 + tanh u) / 2 = S(2u)

    d act / dx = S + x S (1 - S) p'(x),

both directions need one exponential for each element, in float32 whatever the type of the
activations.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

_C, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715

Unary = Callable[[mx.array], mx.array]
Gate = Callable[[mx.array, mx.array], Any]


def _make_gate(inner: Unary, slope: Unary) -> Gate:
    """Return h(gate, up) = gate S(p(gate)) * up for p = ``inner`` and p' = ``slope``.

    All arrays have one shape and type.
    """

    @mx.custom_function
    def gated(gate: mx.array, up: mx.array) -> mx.array:
        x = gate.astype(mx.float32)
        return (x * sigmoid(inner(x)) * up.astype(mx.float32)).astype(gate.dtype)

    @gated.vjp
    def _(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        gate, up = mx.depends(
            list(primals), [cotangent]
        )  # or a compiled step would keep the forward pass's sigmoid
        x, y, d = gate.astype(mx.float32), up.astype(mx.float32), cotangent.astype(mx.float32)
        s = sigmoid(inner(x))
        return (d * y * (s + x * s * (1 - s) * slope(x))).astype(gate.dtype), (d * x * s).astype(
            up.dtype
        )

    return gated


GATES: dict[str, Gate] = {
    "silu": _make_gate(lambda x: x, mx.ones_like),
    "gelu_approx": _make_gate(
        lambda x: _C * (x + _CUBIC * x * x * x), lambda x: _C * (1 + 3 * _CUBIC * x * x)
    ),
}


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + exp(-x)) for float32 x."""
    if mx.default_device() == mx.gpu:
        return mx.sigmoid(x)
    e = exp(-mx.abs(x))
    return mx.where(x < 0, e, 1.0) / (1 + e)


def exp(x: mx.array) -> Any:
    """Return exp(x) for float32 x in [-1e9, 0], with a relative error of at most 3e-7 + 9e-8 |x|.

    Below -88 it is 0.

    On a CPU MLX's exp is scalar code. This one, which its compiler makes vectors of, takes a fourth
    of the time.
    """
    return mx.exp(x) if mx.default_device() == mx.gpu else _exp_on_cpu(x)


@mx.custom_function
@mx.compile
def _exp_on_cpu(x: mx.array) -> mx.array:
    t = x * math.log2(math.e)
    whole = t.astype(mx.int32)  # towards zero, so t - whole is in (-1, 0]
    f = t - whole.astype(mx.float32)
    power = (
        9.44903e-4 * f + 9.2057968e-3
    )  # minimax on [-1, 0], relative error 2e-7, and exp(0) is 1
    for coefficient in (5.5297356e-2, 2.4018015e-1, 6.9314373e-1, 1.0):
        power = power * f + coefficient
    # 2^whole through its exponent bits, and 0 where it would be subnormal, which would slow what
    # follows
    return power * mx.left_shift(mx.maximum(whole, -127) + 127, 23).view(mx.float32)


@_exp_on_cpu.vjp
def _(_: Any, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output
