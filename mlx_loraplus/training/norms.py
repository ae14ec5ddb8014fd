"""How large the adapters have grown, module by module: ‖A‖, ‖B‖ and ‖s B A‖ / ‖W‖ (Frobenius).

The change s L R of W is never made: ‖L R‖² = tr((Lᵀ L)(R Rᵀ)), of two (rank, rank) matrices, so its last digits are
lost where a PiSSA start is taken off again. DoRA's lengths are left out of it. An expert layer counts as one module.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..adapters.adapter import Adapter
from ..adapters.attach import find_adapters
from ..adapters.base import weight_norm
from .loop import Event


def measure_norms(model: nn.Module) -> Callable[[], Event]:
    """Return a function that measures the norms of this moment; ‖W‖ is computed here, once."""
    adapters = list(find_adapters(model).values())
    weights = [weight_norm(adapter.base) for adapter in adapters]

    def measure() -> Event:
        found: Any = mx.stack([mx.stack(_norms(adapter)) for adapter in adapters]).T  # (3, modules)
        a, b, change = found.tolist()
        shares = [norm / weight if weight else 0.0 for norm, weight in zip(change, weights, strict=True)]
        return {"norm_a": _rounded(a), "norm_b": _rounded(b), "norm_change": _rounded(shares)}

    return measure


def _norms(adapter: Adapter) -> list[mx.array]:
    """Return ‖A‖, ‖B‖ (VeRA's d and b in their place) and ‖s B A‖."""
    a, b = (adapter[name] for name in list(adapter.groups)[:2])
    left, right = adapter.factors()
    squares = (left.swapaxes(-1, -2) @ left) * (right @ right.swapaxes(-1, -2))
    return [*(mx.sqrt(mx.square(p).sum()) for p in (a, b)), adapter.scale * mx.sqrt(mx.maximum(squares.sum(), 0.0))]


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
