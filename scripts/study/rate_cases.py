"""The cases of ``rate.py``: what a learning rate is sought for, and the rates of other programs."""

from dataclasses import dataclass
from typing import Any

MODELS = ("smollm2-135m", "gemma-3-270m")
DATA = ("demo", "wikisql", "chat", "text")
RANK = 8
SETTINGS: dict[str, Any] = {"max_seq_length": 256, "rank": RANK, "alpha": 16}


@dataclass(frozen=True)
class Case:
    """What a rate is sought for.

    Attributes:
        model: The model's name.
        data: One of ``DATA``.
        ratio: Lambda.
        adapter: The kind of adapter.
        init: How it starts.
        batch: The batch size.
    """

    model: str
    data: str
    ratio: float
    adapter: str = "lora"
    init: str = "init1"
    batch: int = 4

    @property
    def name(self) -> str:
        """How the case is called in the results and in the tables."""
        kind = self.init if self.adapter == "lora" else self.adapter
        return f"{self.model}, {self.data}, {kind}, λ {self.ratio:g}, batch {self.batch}"

    @property
    def bench(self) -> str:
        """What decides how long a step takes."""
        return f"{self.model}, {self.data}, batch {self.batch}"

    def settings(self) -> dict[str, Any]:
        """Return the case's settings of a run."""
        settings: dict[str, Any] = {
            "adapter": self.adapter,
            "lr_ratio": self.ratio,
            "batch_size": self.batch,
        }
        if self.adapter == "vera":
            return settings | {"rank": 256, "alpha": 16}
        return SETTINGS | settings | {"init": self.init}


def all_cases() -> list[Case]:
    """Return the cases in the order in which they are studied; a first answer comes early."""
    small, large = MODELS
    cases = [Case(small, "demo", 1), Case(small, "demo", 16)]
    cases += [Case(large, "demo", 4), Case(small, "wikisql", 4)]

    # Each data set with both models, then the other lambdas and starts.
    cases += [Case(model, data, 4) for data in DATA for model in MODELS]
    cases += [Case(model, "demo", ratio) for ratio in (1, 16) for model in MODELS]
    cases += [Case(model, "demo", ratio, init="init2") for ratio in (4, 16, 1) for model in MODELS]
    cases += [Case(model, "demo", 4, init="pissa") for model in MODELS]
    cases += [Case(model, "demo", 4, adapter=kind) for kind in ("dora", "vera") for model in MODELS]
    cases += [Case(model, data, 4, batch=16) for data in ("demo", "wikisql") for model in MODELS]
    cases += [Case(model, data, ratio) for ratio in (1, 16) for data in DATA for model in MODELS]

    # For the table about lambda alone.
    cases += [
        Case(small, "demo", ratio, init=init) for init in ("init1", "init2") for ratio in (2, 8)
    ]
    return list(dict.fromkeys(cases))


def baselines(case: Case) -> dict[str, dict[str, Any]]:
    """Return the rates of other programs, and the default, as settings: name → settings."""
    found: dict[str, dict[str, Any]] = {"default": {}}
    if case.adapter == "lora" and case.init == "init1":
        found["mlx-lm"] = {"learning_rate": 1e-5, "lr_ratio": 1, "alpha": 20 * RANK}
        found["Unsloth"] = {"learning_rate": 2e-4, "lr_ratio": 1, "alpha": RANK}
    return found
