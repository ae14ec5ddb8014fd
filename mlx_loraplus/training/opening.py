"""What a run begins with: the first event of its history, and the prompts that every validation answers."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_reduce
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.attach import Census, find_adapters
from ..config import RunConfig
from ..data.batches import Batches
from ..data.examples import Examples
from ..data.questions import SHORT, choose_questions
from ..data.templates import encode_prompt
from ..errors import ModelError
from ..generation import answer_all
from ..planning import fitting_of
from .history import SCHEMA
from .loop import Event, Length


@dataclass(frozen=True)
class Questions:
    """The fixed prompts of a run: as tokens, as the history tells them, and how long an answer may get."""

    prompts: list[list[int]]
    told: list[dict[str, str | None]]
    max_tokens: int

    @classmethod
    def choose(cls, valid: Examples, config: RunConfig, tokenizer: TokenizerWrapper) -> "Questions":
        """Take ``answer_rows`` of the validation rows, and ``prompts``."""
        rows = choose_questions(valid, config, tokenizer.eos_token_ids, config.answer_rows)
        told = [{"prompt": tokenizer.decode(row.prompt), "wanted": tokenizer.decode(row.wanted)} for row in rows]
        given = [encode_prompt(prompt, tokenizer) for prompt in config.prompts]
        longest = SHORT if given else max((len(row.wanted) for row in rows), default=0)
        told += [{"prompt": prompt, "wanted": None} for prompt in config.prompts]
        return cls([*(row.prompt for row in rows), *given], told, longest + 8)

    def ask(self, model: nn.Module, tokenizer: TokenizerWrapper) -> list[str]:
        """Return the model's answers of this moment."""
        training = model.training
        answers = answer_all(model, tokenizer, self.prompts, max_tokens=self.max_tokens)
        model.train(training)
        return answers


def start_event(
    model: nn.Module,
    config: RunConfig,
    length: Length,
    splits: Mapping[str, Examples],
    census: Census,
    batches: Batches,
    questions: Questions,
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
            "examples": len(examples),
            "tokens": int(examples.lengths.sum()) + len(examples),  # the last of each is only predicted
            "supervised": int(examples.targets.sum()),
        }
        for name, examples in splits.items()
    }
    return {
        "update": 0, "schema": SCHEMA, "updates": length.updates, "model": config.model, "versions": versions(),
        **counts, "adapter": str(census), "memory": memory, "modules": list(find_adapters(model)),
        "prompts": questions.told,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of what the numbers come from."""
    return {name: version(name) for name in ("mlx_loraplus", "mlx", "mlx-lm")}
