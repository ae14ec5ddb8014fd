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
    # The loss, which is a mean over pairs or labeled answers, or over tokens.
    supervised = sum(stats.supervised for stats in window)
    pairs = sum(stats.pairs for stats in window)
    event: Event = {"loss": sum(stats.loss for stats in window) / (pairs or supervised)}
    if pairs:
        sums = np.sum([stats.pair_sums for stats in window], axis=0).tolist()
        event |= describe_stats(objective, sums, pairs)

    # The work, its time and its memory.
    useful = sum(stats.useful for stats in window)
    padded = sum(stats.padded for stats in window)
    seconds = sum(stats.seconds for stats in window)
    event |= {
        "grad_norm": max(stats.norm for stats in window),
        "supervised_tokens": supervised,
        "useful_tokens": useful,
        "padding": 1 - useful / padded,
        "seconds": seconds,
        "tokens_per_second": useful / seconds,
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "active_memory_gb": mx.get_active_memory() / 1e9,
        "cache_memory_gb": mx.get_cache_memory() / 1e9,
    }

    # The rates, as rate_a, rate_b and so on.
    for group, rate in rates.items():
        event[f"rate_{group.removeprefix('lora_')}"] = rate
    return event
