"""How good a model is on rows it was not trained on, in figures that people understand, before and after.

loss = mean over supervised tokens of -log p(token)      perplexity = exp(loss)
accuracy = share of supervised tokens that the model ranks first
exact = share of short answers that greedy generation gives word for word
"""

import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..adapters.storage import adapter_files, load_adapter
from ..config import RunConfig
from ..data.eval_prompts import choose_eval_prompts
from ..data.limits import check_examples, limits_of
from ..data.sources import SPLITS, SplitName
from ..data.splits import check_rows, load_data
from ..errors import AdapterError, ConfigError, DataError
from ..inference.generate import answer_questions, load
from ..kernels.head import split_model
from ..memory.plan import resolve_batch, resolve_length
from ..rich_display import RichDisplay
from ..settings import configure, settings_of
from .trainer import score


@dataclass(frozen=True)
class Answer:
    """One prompt, the answer its row has, and the model's."""

    source: str
    prompt: str
    expected: str
    generated: str

    @property
    def exact(self) -> bool:
        """Whether the model's answer is the row's, but for blanks at both ends."""
        return self.expected.strip() == self.generated.strip()


@dataclass(frozen=True, repr=False)
class Evaluation(RichDisplay):
    """What ``evaluate`` found."""

    split: str  # which rows, e.g. "test"
    examples: int
    tokens: int  # that are supervised
    loss: float  # mean over these tokens, in nats
    accuracy: float  # share of them that the model ranks first, in [0, 1]
    answers: list[Answer] = field(default_factory=list)  # to some of the rows whose own are short
    base: "Evaluation | None" = None  # the same for the model it is compared to

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def exact(self) -> float | None:
        """Return the share of ``answers`` that are right word for word, or None without any."""
        return (
            sum(answer.exact for answer in self.answers) / len(self.answers)
            if self.answers
            else None
        )

    def changed(self) -> list[tuple[Answer, Answer]]:
        """Return the answers that differ from those of ``base``, as (base's, this model's), mended ones first."""
        pairs = list(zip(self.base.answers if self.base else [], self.answers, strict=False))
        different = [
            (old, new) for old, new in pairs if old.generated.strip() != new.generated.strip()
        ]
        return sorted(different, key=lambda pair: pair[0].exact - pair[1].exact)

    def __rich__(self) -> Table:
        """Return a table of the figures, the base's beside them, and three answers that changed."""
        columns = [("base", self.base), ("tuned", self)] if self.base else [("model", self)]
        table = Table(
            title=f"{self.examples:,} {self.split} examples, {self.tokens:,} supervised tokens"
        )
        for name in ("", *(name for name, _ in columns)):
            table.add_column(name, overflow="fold")
        figures = (
            ("loss", "loss", ".4f"),
            ("perplexity", "perplexity", ".4g"),
            ("token accuracy", "accuracy", ".1%"),
        )
        for name, attribute, form in figures:
            table.add_row(
                name, *(format(getattr(column, attribute), form) for _, column in columns)
            )
        if self.answers:
            exact = [
                f"{sum(a.exact for a in column.answers)} of {len(column.answers)}"
                for _, column in columns
            ]
            table.add_row("exact answers", *exact, end_section=True)
        for old, new in self.changed()[:3]:
            marks = [
                f"{'✓' if answer.exact else '✗'} {answer.generated.strip():.200}"
                for answer in (old, new)
            ]
            prompt = (
                f"{new.source}\n…{new.prompt.strip()[-160:]}\nexpected: {new.expected.strip():.200}"
            )
            table.add_row(*map(Text, (prompt, *marks)))  # as they are: brackets are no markup
        return table


def evaluate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    /,
    *,
    split: SplitName = "valid",
    answers: int = 64,
    base: Evaluation | None = None,
    **settings: Any,
) -> Evaluation:
    """Score a model on a split of the data: loss, perplexity, token accuracy, and exact answers.

    Args:
        model: From ``load``, with or without an adapter.
        tokenizer: From ``load``.
        split: Which rows: "train", "valid" or "test".
        answers: Most rows to answer by greedy generation, of those whose answer has up to 64
            tokens; 0 for none.
        base: What ``evaluate`` gave for another model on the same rows, to stand beside this one's.
        settings: The data settings of ``finetune``, and ``seed``, which chooses the rows to answer.

    Raises:
        DataError: There are no such rows, or they can't be read.
        ConfigError: ``split`` or a setting is not allowed.

    Example:
        >>> before = evaluate(model, tokenizer, data="my_folder")
        >>> finetune(model, tokenizer, data="my_folder")
        >>> print(evaluate(model, tokenizer, data="my_folder", base=before))
    """
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
    config = resolve_length(configure(RunConfig, settings), model)
    examples = load_data(config, tokenizer, split).examples[split]
    if not len(examples):
        where = ", ".join(config.data.data) or "the demo set"
        raise DataError(
            f"{where} has no {split} rows: add a {split} file, or evaluate on train, valid or test"
        )
    check_examples(limits_of(model), {split: examples}, tokenizer, partial(print, file=sys.stderr))
    config = resolve_batch(config, model, int(examples.lengths.max()))
    found = score(model, split_model(model), examples, config.data.batch_size)
    eval_prompts = choose_eval_prompts(examples, config, tokenizer, answers)
    answered = [
        Answer(question.source, question.prompt, question.expected or "", generated)
        for question, generated in zip(
            eval_prompts, answer_questions(model, tokenizer, eval_prompts), strict=True
        )
    ]
    return Evaluation(
        split,
        len(examples),
        int(examples.targets.sum()),
        found.loss,
        found.accuracy,
        answered,
        base,
    )


def evaluate_run(config: RunConfig) -> None:
    """Print how a run's adapter does on the test rows beside its base, as ``--test`` does."""
    check_rows(config)
    folder, weights = adapter_files(Path(config.adapter_path))
    if not (folder / weights).is_file():
        raise AdapterError(
            f"{config.adapter_path} holds no adapter: train one first, without --test"
        )
    model, tokenizer = load(config.model)
    base = evaluate(model, tokenizer, split="test", **settings_of(config))
    load_adapter(model, config.adapter_path)
    Console().print(evaluate(model, tokenizer, split="test", base=base, **settings_of(config)))
