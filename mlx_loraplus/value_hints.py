"""How to write the value of a setting that was refused."""

import re
from collections.abc import Sequence

from .spelling import flag_of

# A number in a notation that is not accepted, and the factors that its units stand for.
_ODD_NUMBER = re.compile(
    r"=?(?P<digits>\d{1,3}(,\d{3})+|\d+([.,]\d+)?(e[-+]?\d{1,2})?)\s*(?P<unit>[%kx]?)[,;]?",
    re.IGNORECASE,
)
_UNITS = {"%": 0.01, "k": 1000, "x": 1}
_TOKENS = {"k": 1024}  # as in the names of models with a context of 4k

# A time with a unit, and the seconds that the units stand for.
_DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[smhd])[a-z]*", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATIONS = {"max_minutes": 60, "distributed_timeout": 1}
"""Settings that are durations → the seconds in their unit."""

_EXAMPLES = {
    "alpha": "16", "alphas": "16 32", "batch_size": "8", "data_weights": "1 0.5",
    "distributed_timeout": "600", "embedding_learning_rate": "1e-6", "epochs": "3", "iters": "300",
    "kto_weights": "1 0.5", "learning_rate": "1e-4", "learning_rates": "1e-4 1e-3",
    "lr_ratio": "16", "lr_ratios": "1 4 16", "magnitude_lr_ratio": "4", "max_grad_norm": "1",
    "max_minutes": "60", "max_seq_length": "1024", "max_tokens": "256", "port": "8765",
    "ranks": "8 16", "sample_tokens": "2048", "steps_per_eval": "100", "steps_per_report": "10",
    "steps_per_save": "100", "temperature": "0.7", "valid_rows": "100", "warmup": "10",
}  # fmt: skip
"""Values of settings that take numbers; the others are ``_USUAL``."""
_USUAL = {True: "8", False: "0.1"}  # whether the number is whole


SWEPT = {
    "alpha": "alphas", "learning_rate": "learning_rates", "lr_ratio": "lr_ratios", "rank": "ranks",
}  # fmt: skip
"""Settings that take one number → the settings of a sweep, which takes several."""

_NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]?\d{1,2})?", re.IGNORECASE)


def example_of(name: str, *, whole: bool) -> str:
    """Return a number that a setting accepts, or several for a setting that takes several."""
    return _EXAMPLES.get(name, _USUAL[whole])


def number_hint(name: str, written: str, *, whole: bool) -> str:
    """Return how to write a number that was refused, in parentheses.

    It is what was probably meant by 10%, 1,000, 1,5, 1e3, 2k or 1h, or else an example.

    Args:
        name: The setting.
        written: The value as it was written.
        whole: Whether the number must be whole.
    """
    numbers = listed_numbers(written)
    if name in SWEPT and numbers:
        return f" ({sweep_advice(name, numbers)})"
    meant = _meant_number(name, written)
    if name == "warmup" and meant is not None and 0 < meant < 1:
        return (
            f" (it counts steps: --warmup-ratio {meant:g} with --iters N is a fraction of the run)"
        )
    if meant is None or (whole and (not meant.is_integer() or "%" in written)):
        return f" ({'one number, ' if numbers else ''}such as {example_of(name, whole=whole)})"
    return f" (write {meant:.0f})" if meant.is_integer() else f" (write {meant:g})"


def sweep_advice(name: str, numbers: Sequence[str]) -> str:
    """Return what to do about several numbers for a setting that takes one.

    Args:
        name: The setting.
        numbers: The numbers as they were written.
    """
    if name not in SWEPT:
        return f"one number, such as {numbers[0]}"
    flag = flag_of(SWEPT[name])
    return f"one number, or try several with mlx_loraplus.sweep {flag} {' '.join(numbers)}"


def listed_numbers(written: str) -> list[str]:
    """Return the numbers of a text that lists several, and [] for one with a comma in it."""
    words = written.strip("[]()").replace(",", " ").replace(";", " ").split()
    if len(words) < 2 or not all(map(_NUMBER.fullmatch, words)):
        return []

    # 0,1 and 1,5e-4 have a comma for the point; 1,000 has one for the eye.
    first, *others = words
    is_fraction = len(others) == 1 and first.isdigit() and (first == "0" or "e" in others[0])
    is_one = is_fraction or all(word == "000" for word in others)
    return [] if is_one and re.fullmatch(r"[^\s\[(]+", written) else words


def fraction_hint(value: float, limit: float) -> str:
    """Return how to write a percentage that was given as a fraction; "" if it is none.

    Args:
        value: The value that was refused.
        limit: What the value must be less than.
    """
    if limit > 1 or not 1 < value < 100 * limit:
        return ""
    return f" ({value:g}% is {value / 100:g})"


def numbers_hint(name: str, written: str) -> str:
    """Return how to write several numbers, in parentheses."""
    words = written.replace("'", " ").replace(",", " ").split()
    if words and all(re.fullmatch(r"\d+(\.\d+)?(e[-+]?\d{1,2})?", word) for word in words):
        return f" (write {' '.join(words)})"
    return f" (such as {example_of(name, whole=False)})"


def _meant_number(name: str, written: str) -> float | None:
    """Return the number that was probably meant, or None."""
    duration = _DURATION.fullmatch(written)
    if duration is not None and name in _DURATIONS:
        seconds = float(duration["number"]) * _SECONDS[duration["unit"].lower()]
        return seconds / _DURATIONS[name]

    found = _ODD_NUMBER.fullmatch(written)
    if found is None:
        return None
    digits, unit = found["digits"], found["unit"].lower()
    if re.fullmatch(r"\d{1,3}(,\d{3})+", digits):
        digits = digits.replace(",", "")
    units = _UNITS | (_TOKENS if name == "max_seq_length" else {})
    return float(digits.replace(",", ".")) * units.get(unit, 1)
