"""What the history tells beside the loop's own numbers: the start, and the adapters' norms.

The norms are ‖A‖, ‖B‖ and ‖s B A‖ / ‖W‖ (Frobenius), module by module. The change s L R of W is never made:
‖L R‖² = tr((Lᵀ L)(R Rᵀ)), of two (rank, rank) matrices, so its last digits are lost where a PiSSA start is taken off
again. DoRA's lengths are left out of it. An expert layer counts as one module.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

from ..adapters.adapter import Adapter
from ..adapters.attach import Census, find_adapters
from ..adapters.base import weight_norm
from ..config import RunConfig
from ..data.batches import Batches
from ..data.examples import Examples
from ..data.questions import Question
from ..data.sources import Split
from ..errors import ModelError
from ..planning import fitting_of
from .history import SCHEMA
from .loop import Event


def start_event(
    model: nn.Module,
    config: RunConfig,
    updates: int,
    examples: Mapping[Split, Examples],
    census: Census,
    batches: Batches,
    questions: Sequence[Question],
    *,
    recompute: bool,
) -> Event:
    """Return the first event of a history: what is about to be trained."""
    weights: Any = tree_reduce(lambda size, array: size + array.nbytes, model.parameters(), 0)
    memory: dict[str, float | None] = {"weights_gb": weights / 1e9, "planned_gb": None, "available_gb": None}
    with suppress(ModelError):  # there is no plan for such a model, which was told
        fitting = fitting_of(config, model)
        planned = fitting.memory(*batches.largest(), checkpoint=recompute).total
        memory |= {"planned_gb": planned / 1e9, "available_gb": fitting.budget / 1e9}
    counts = {
        name: {
            "examples": len(split),
            "tokens": int(split.lengths.sum()) + len(split),  # the last of each is only predicted
            "supervised": int(split.targets.sum()),
        }
        for name, split in examples.items()
    }
    return {
        "update": 0, "schema": SCHEMA, "updates": updates, "model": config.model, "versions": versions(),
        **counts, "adapter": str(census), "memory": memory, "modules": list(find_adapters(model)),
        "prompts": [{"prompt": question.prompt, "wanted": question.wanted} for question in questions],
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of what the numbers come from."""
    return {name: version(name) for name in ("mlx_loraplus", "mlx", "mlx-lm")}


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
