"""What a report says about the steps since the last report."""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from ..config import ObjectiveConfig
from ..runs.state import Event, StepStats
from .objectives import describe_stats


def summarize(
    window: Sequence[StepStats], rates: Mapping[str, float], objective: ObjectiveConfig
) -> Event:
    """Return a report of the steps since the last one, with the rates of the last step."""
    names = ("loss", "supervised", "useful", "padded", "seconds", "pairs")
    loss, supervised, useful, padded, seconds, pairs = (
        sum(getattr(made, name) for made in window) for name in names
    )
    event: Event = {"loss": loss / (pairs or supervised)}
    if pairs:
        sums = np.sum([made.pair_sums for made in window], axis=0).tolist()
        event |= describe_stats(objective, sums, pairs)
    return (
        event
        | {
            "grad_norm": max(made.norm for made in window),
            "supervised_tokens": supervised,
            "useful_tokens": useful,
            "padding": 1 - useful / padded,
            "seconds": seconds,
            "tokens_per_second": useful / seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "active_memory_gb": mx.get_active_memory() / 1e9,
            "cache_memory_gb": mx.get_cache_memory() / 1e9,
        }
        | {f"rate_{group.removeprefix('lora_')}": rate for group, rate in rates.items()}
    )
