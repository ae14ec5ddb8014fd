"""Everything this package raises on purpose.

::

    LoRAPlusError                 what a person can mend; a command prints it and exits with code 2
    ├── ConfigError               a flag, a YAML key or a keyword argument
    ├── DataError                 a data folder, a file or a row
    ├── ModelError                a model's name, folder, GGUF file or weights
    ├── AdapterError              an adapter's folder, or an adapter that does not fit its base
    ├── OutputError               a place that can't be written, or that holds something already
    └── PeerError                 another process of the run that is lost

A message is one line: what is wrong, the value, what is allowed, what to do next. Problems found
together are told together, joined by ``join_problems``. Anything else that escapes is a bug and
keeps its traceback.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class LoRAPlusError(Exception):
    """The root of the tree above: what a person can mend."""

    told = False
    """Whether it stands there already, or another process of the run tells it."""


class ConfigError(LoRAPlusError, ValueError):
    """A setting that is unknown, out of range, or at odds with another one."""


class DataError(LoRAPlusError, ValueError):
    """Data that can't be read, or rows that can't be trained on."""


class ModelError(LoRAPlusError, ValueError):
    """A model that can't be found, read or used."""


class AdapterError(LoRAPlusError, ValueError):
    """An adapter that can't be read or does not belong to its base."""


class OutputError(LoRAPlusError, OSError):
    """A place that can't be written, or that must not be overwritten."""


class PeerError(LoRAPlusError, RuntimeError):
    """Another process of the run that is lost: it has ended, hangs, or can't be reached any more."""


MLX_LM_NAMES = {
    "train": "what the command does by itself", "fine_tune_type": "--adapter", "mask_prompt": "--train-on turns",
    "lora_layers": "--num-layers", "lora_parameters": "rank, alpha, dropout and target_modules",
    "keys": "target_modules", "scale": "--alpha / --rank", "lr_schedule": "--schedule and --warmup",
    "save_every": "--steps-per-save", "val_batches": "the whole of valid",
}  # fmt: skip
"""Settings of mlx-lm that have another name here."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'a' or 'b'?)"`` for the known names nearest to ``name``, or nothing."""
    other = name.lstrip("-").replace("-", "_").removeprefix("no_")
    if other in MLX_LM_NAMES:
        return f" (mlx-lm's {other} is {MLX_LM_NAMES[other]} here)"
    matches = get_close_matches(
        name[:64], list(known), cutoff=0.5
    )  # comparing takes the square of its length
    return f" (did you mean {' or '.join(repr(match) for match in matches)}?)" if matches else ""


def join_problems(problems: Sequence[str], most: int = 8, count: int | None = None) -> str:
    """Join problems into one line, the first ``most`` of them in full; there are ``count``, or just these."""
    rest = (len(problems) if count is None else count) - most
    return "; ".join(problems[:most]) + (f"; and {rest:,} more" if rest > 0 else "")
