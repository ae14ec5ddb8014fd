"""Updates of weights in half precision that lose nothing.

bfloat16 has 8 significant bits. An update below 2⁻⁹ of a weight is rounded away, and at the usual
rates most updates are that small. The optimizer therefore stores what rounding loses in a second
array for each weight: its compensation, as in Kahan's sum.

A bfloat16 number is the upper half of a float32 number. With x the exact value in float32,

    weight = x rounded to bfloat16,   compensation = the lower 16 bits of x

Both together hold all bits of x, so the weight is updated like a float32 weight. They take 4 bytes;
the weight with a float32 copy would take 6. For float16, the compensation is x - weight in
bfloat16. The model computes with the weight.

Sources: Kahan, *Further remarks on reducing truncation errors*, CACM 8 (1965); Zamirai et al.,
*Revisiting BFloat16 Training*, arXiv 2010.06192.
"""

import mlx.core as mx

HALF_TYPES = (mx.bfloat16, mx.float16)


def zero_compensation(weight: mx.array) -> mx.array:
    """Return the compensation of a weight in half precision before its first update."""
    return mx.zeros(weight.shape, mx.uint16 if weight.dtype == mx.bfloat16 else mx.bfloat16)


def widened(weight: mx.array, compensation: mx.array | None) -> mx.array:
    """Return the exact value in float32, or a weight that has no compensation unchanged."""
    if compensation is None:
        return weight
    if weight.dtype != mx.bfloat16:
        return weight.astype(mx.float32) + compensation.astype(mx.float32)

    # If the lower half is 0x8000 or more, the upper half was rounded up.
    low = compensation.astype(mx.uint32)
    high = weight.view(mx.uint16).astype(mx.uint32) - (low >> 15)
    return ((high << 16) | low).view(mx.float32)


def narrowed(exact: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Return the weight of type ``dtype`` and its compensation, for an exact value in float32."""
    if dtype != mx.bfloat16:
        weight = exact.astype(dtype)
        return weight, (exact - weight.astype(mx.float32)).astype(mx.bfloat16)

    bits = exact.view(mx.uint32)
    low = bits & 0xFFFF
    high = (bits >> 16) + (low >> 15)
    return high.astype(mx.uint16).view(mx.bfloat16), low.astype(mx.uint16)
