"""What a run says while it goes."""

from collections.abc import Callable
from typing import Any

Tell = Callable[[str], None]


def quiet(_: str) -> None:
    """Say nothing."""


def tell_event(event: dict[str, Any], updates: int, tell: Tell) -> None:
    """Tell one event of the loop as a line."""
    place = f"update {event['update']:>{len(str(updates))}}/{updates}"
    if "valid_loss" in event:
        tell(f"{place}  validation loss {event['valid_loss']:.4f}  ({event['seconds']:.1f} s)")
        return
    if "skipped" in event:
        tell(f"{place}  skipped: {event['reason']}  ({event['skipped']} skipped so far)")
        return
    rates = ", ".join(
        f"{name.removeprefix('rate_')} {rate:.2e}" for name, rate in event.items() if name.startswith("rate_")
    )
    tell(
        f"{place}  loss {event['loss']:.4f}  rates {rates}  {event['tokens_per_second']:,.0f} tokens/s  "
        f"{event['peak_memory_gb']:.2f} GB peak"
    )
