"""Elementwise functions with custom gradients that make one pass and save only their inputs.

A gated MLP computes h = act(gate) * up. By default, MLX keeps several arrays of the size of h for
the backward pass, and on a CPU its exp takes 20 to 30 ns per element. Let S be the sigmoid, and
write the activation as act(x) = x S(p(x)). Then

    silu:         p(x) = x
    gelu (tanh):  p(x) = 2 √(2/π) (x + 0.044715 x³),   since (1 + tanh u) / 2 = S(2u)

    d act / dx = S + x S (1 - S) p'(x),

so the forward and the backward pass each need one exponential per element. It is computed in
float32, whatever the type of the activations.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..device import on_gpu

_C, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715

Unary = Callable[[mx.array], mx.array]
Gate = Callable[[mx.array, mx.array], Any]


def _make_gate(inner: Unary, slope: Unary) -> Gate:
    """Return h(gate, up) = gate S(p(gate)) * up for p = ``inner`` and p' = ``slope``.

    All arrays have the same shape and type.
    """

    @mx.custom_function
    def gated(gate: mx.array, up: mx.array) -> mx.array:
        x = gate.astype(mx.float32)
        return (x * sigmoid(inner(x)) * up.astype(mx.float32)).astype(gate.dtype)

    @gated.vjp
    def _(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        # Without this dependency, a compiled step would keep the sigmoid of the forward pass.
        gate, up = mx.depends(list(primals), [cotangent])
        x, y, d = gate.astype(mx.float32), up.astype(mx.float32), cotangent.astype(mx.float32)
        s = sigmoid(inner(x))
        d_gate = d * y * (s + x * s * (1 - s) * slope(x))
        d_up = d * x * s
        return d_gate.astype(gate.dtype), d_up.astype(up.dtype)

    return gated


GATES: dict[str, Gate] = {
    "silu": _make_gate(lambda x: x, mx.ones_like),
    "gelu_approx": _make_gate(
        lambda x: _C * (x + _CUBIC * x * x * x), lambda x: _C * (1 + 3 * _CUBIC * x * x)
    ),
}


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + exp(-x)) for float32 x."""
    if on_gpu():
        return mx.sigmoid(x)
    e = exp(-mx.abs(x))
    return mx.where(x < 0, e, 1.0) / (1 + e)


def exp(x: mx.array) -> Any:
    """Return e to the power of x, for float32 x in [-1e9, 0].

    The relative error is at most 3e-7 + 9e-8 |x|. Below x = -88 the result is 0.

    On a CPU, MLX's own exp is scalar code. MLX's compiler vectorizes this function, which then
    takes a quarter of the time.
    """
    return mx.exp(x) if on_gpu() else _exp_on_cpu(x)


@mx.custom_function
@mx.compile
def _exp_on_cpu(x: mx.array) -> mx.array:
    t = x * math.log2(math.e)
    whole = t.astype(mx.int32)  # rounds towards zero, so t - whole is in (-1, 0]
    f = t - whole.astype(mx.float32)
    # Minimax polynomial on [-1, 0] with relative error 2e-7; exp(0) is exactly 1.
    power = 9.44903e-4 * f + 9.2057968e-3
    for coefficient in (5.5297356e-2, 2.4018015e-1, 6.9314373e-1, 1.0):
        power = power * f + coefficient
    # Make 2^whole from its exponent bits. Where it would be subnormal it is 0, because subnormal
    # numbers slow down later operations.
    return power * mx.left_shift(mx.maximum(whole, -127) + 127, 23).view(mx.float32)


@_exp_on_cpu.vjp
def _(_: Any, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output
