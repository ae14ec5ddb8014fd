"""What the history holds besides the loop's own metrics: the start, and the adapters' norms.

The norms are ‖A‖, ‖B‖ and ‖s B A‖ / ‖W‖ (Frobenius) of each module. The change of W is s L R. The
matrix L R is never computed: ‖L R‖² = tr((Lᵀ L)(R Rᵀ)), the trace of a product of two (rank, rank)
matrices. If a PiSSA start is subtracted, the last digits are lost. The norms do not include DoRA's
magnitudes. A layer of experts counts as one module.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

from ..adapters.base_layers import weight_norm
from ..adapters.lora import Adapter
from ..adapters.trainable import TrainableParams, find_adapters
from ..config import TrainConfig
from ..data.batches import Batches
from ..data.dataset import Examples
from ..data.sources import SplitName
from ..errors import ModelError
from ..memory.plan import memory_plan_of
from .history import SCHEMA
from .state import Event


def start_event(
    model: nn.Module,
    config: TrainConfig,
    steps: int,
    examples: Mapping[SplitName, Examples],
    trainable: TrainableParams,
    batches: Batches,
    *,
    grad_checkpoint: bool,
) -> Event:
    """Return the first event of a history, which describes the training.

    The recorder adds the prompts, and what the probes found out about the model.
    """
    counts = {name: _counts_of(split) for name, split in examples.items()}
    return {
        "step": 0,
        "schema": SCHEMA,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": steps,
        "batch_rows": batches.full_rows,
        "model": config.model,
        "versions": versions(),
        **counts,
        "adapter": str(trainable),
        "memory": _memory_of(model, config, batches, grad_checkpoint=grad_checkpoint),
        "modules": list(find_adapters(model)),
    }


def _memory_of(
    model: nn.Module, config: TrainConfig, batches: Batches, *, grad_checkpoint: bool
) -> dict[str, float | None]:
    """Return the size of the weights, and the planned peak and the limit if there is a plan."""
    weights: Any = tree_reduce(lambda size, array: size + array.nbytes, model.parameters(), 0)
    memory: dict[str, float | None] = {
        "weights_gb": weights / 1e9,
        "planned_gb": None,
        "available_gb": None,
    }

    # A model that can't be planned was reported before.
    with suppress(ModelError):
        plan = memory_plan_of(config, model)
        planned = plan.memory(*batches.largest(), checkpoint=grad_checkpoint).total
        memory["planned_gb"] = planned / 1e9
        memory["available_gb"] = plan.budget / 1e9
    return memory


def _counts_of(split: Examples) -> dict[str, int]:
    return {
        "examples": len(split),
        # lengths counts the model's inputs; the last token of an example is only predicted.
        "tokens": int(split.lengths.sum()) + len(split),
        "supervised": int(split.target_counts.sum()),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine a run's results."""
    return {name: version(name) for name in ("mlx_loraplus", "mlx", "mlx-lm")}


def measure_norms(model: nn.Module) -> Callable[[], Event]:
    """Return a function that measures the current norms; ‖W‖ is computed once, here.

    Without adapters, there are no norms.
    """
    adapters = list(find_adapters(model).values())
    if not adapters:
        return dict
    weights = [weight_norm(adapter.base) for adapter in adapters]

    def measure() -> Event:
        norms = [mx.stack(_norms(adapter)) for adapter in adapters]
        found: Any = mx.stack(norms).T  # (3, modules)
        a, b, change = found.tolist()

        ratios: list[float] = []
        for norm, weight in zip(change, weights, strict=True):
            ratios.append(norm / weight if weight else 0.0)
        return {"norm_a": _rounded(a), "norm_b": _rounded(b), "norm_change": _rounded(ratios)}

    return measure


def _norms(adapter: Adapter) -> list[mx.array]:
    """Return ‖A‖, ‖B‖ and ‖s B A‖; for VeRA the first two are those of d and b."""
    a, b = (adapter[name] for name in list(adapter.groups)[:2])
    norm_a = mx.sqrt(mx.square(a).sum())
    norm_b = mx.sqrt(mx.square(b).sum())

    left, right = adapter.factors()
    gram = (left.swapaxes(-1, -2) @ left) * (right @ right.swapaxes(-1, -2))
    square = mx.maximum(gram.sum(), 0.0)  # rounding may make it slightly negative
    return [norm_a, norm_b, adapter.scale * mx.sqrt(square)]


def _rounded(values: list[float]) -> list[float]:
    """Round to four significant digits."""
    return [float(f"{value:.4g}") for value in values]
