"""Read mlx-lm's ``lr_schedule``, which has more forms than the schedules here.

::

    lr_schedule:
      name: cosine_decay            # or linear_schedule, or another function of MLX
      warmup: 10                    # steps
      arguments: [1e-5, 90, 1e-7]   # cosine_decay: start, steps, end
"""

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

_NEAR_ZERO = 0.1  # a schedule that ends below this fraction of its peak counts as ending at zero
_NEAR_END = 0.15  # a schedule may end this fraction of the run before or after the last step

_SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}
_ARGUMENTS = {
    "cosine_decay": "[start, steps] or [start, steps, end]",
    "linear_schedule": "[start, end, steps]",
}
_PARTS = ("name", "arguments", "warmup", "warmup_init")
_ALLOWED = "cosine_decay and linear_schedule"


def read_schedule(value: Any, steps: int | None) -> dict[str, Any]:
    """Return the settings here that mean the same as an ``lr_schedule``.

    It must fall to about zero at about the last step, as the schedules here do.

    Args:
        value: The value of ``lr_schedule``.
        steps: The optimizer steps of the run, or None if they are not known.

    Raises:
        ConfigError: A part has no counterpart here. The message says which part, and what to write
            instead, with flags.
    """
    name, warmup, (start, length, end) = _read_parts(value)
    is_long = steps is not None and warmup >= steps
    advice = _instead(start if start > 0 else None, _SCHEDULES[name], 0 if is_long else warmup)
    if start <= 0 or abs(end) > _NEAR_ZERO * start:
        raise ConfigError(f"it goes from {start:g} to {end:g}, and schedules here end at 0{advice}")

    # In mlx-lm, the run may end before or after the schedule does.
    total = warmup + length
    if steps is not None and abs(total - steps) > max(_NEAR_END * steps, warmup + 1):
        raise ConfigError(
            f"it ends at step {total:g} (warmup {warmup} + {length:g}) of a run of {steps:,}, and"
            f" schedules here end at the last step{advice}"
        )
    return {"learning_rate": start, "schedule": _SCHEDULES[name], "warmup": warmup}


def unused_parts(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the parts of a schedule that ``read_schedule`` does not use, as (part, reason)."""
    parts: list[tuple[str, str]] = []
    _, warmup, (_, _, end) = _read_parts(value)
    if end:
        parts.append((f"end {end:g}", "schedules end at 0 here"))
    if value.get("warmup_init"):
        reason = "a warm-up begins at 0 here" if warmup else "there is no warm-up"
        parts.append((f"warmup_init {value['warmup_init']!s:.80}", reason))

    unknown = [name for name in value if name not in _PARTS]
    return parts + [(str(name), "mlx-lm does not read it either") for name in unknown]


def _read_parts(value: Any) -> tuple[str, int, tuple[float, float, float]]:
    """Return the name and the warm-up of a schedule, and its start, length and end.

    Raises:
        ConfigError: One of them is missing or unknown.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"it holds name, arguments and warmup, not {value!s:.80}{_instead()}")
    name, arguments = value.get("name"), value.get("arguments")
    numbers = _numbers(arguments)
    start = numbers[0] if numbers and numbers[0] > 0 else None
    if name not in _SCHEDULES:
        raise ConfigError(
            f"its name is {name!s:.80}, and only {_ALLOWED} are known{_instead(start)}"
        )

    # The arguments are those of MLX's function.
    if name == "cosine_decay" and len(numbers) == 2:
        numbers.append(0.0)
    if len(numbers) != 3:
        raise ConfigError(
            f"the arguments of {name} are {_ARGUMENTS[name]}, not"
            f" {arguments!s:.80}{_instead(start, _SCHEDULES[name])}"
        )
    first, second, third = numbers
    order = (first, second, third) if name == "cosine_decay" else (first, third, second)

    warmup = value.get("warmup") or 0
    if not isinstance(warmup, int):
        raise ConfigError(
            f"its warmup must be a number of steps, not"
            f" {warmup!s:.80}{_instead(start, _SCHEDULES[name])}"
        )
    return name, warmup, order


def _numbers(arguments: Any) -> list[float]:
    """Return the arguments as numbers; none if one is not a number."""
    try:
        return [float(argument) for argument in arguments]
    except (TypeError, ValueError):
        return []


def _instead(rate: float | None = None, schedule: str = "", warmup: int = 0) -> str:
    """Return what to write instead, as the end of a message."""
    shape = f"--schedule {schedule}" if schedule else "--schedule cosine, linear or constant"
    parts = [shape, f"--learning-rate {1e-4 if rate is None else rate:g}"]
    if warmup:
        parts.append(f"--warmup {warmup}")
    return f": leave it out, and give for example {', '.join(parts)}"
