"""How well a model predicts data that it was not trained on, before and after training.

loss = mean over supervised tokens of -log p(token)      perplexity = exp(loss)
accuracy = fraction of supervised tokens that the model ranks first
exact = fraction of short answers that greedy generation reproduces exactly
preferred = fraction of pairs whose chosen answer has the higher mean log-probability per token

For pairs of answers, the other metrics are those of the chosen answers.
"""

import math
import sys
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..adapters.damaged_files import RUN_SETTINGS
from ..adapters.storage import load_adapter
from ..adapters.stored_files import adapter_files, check_not_peft, is_model_folder
from ..config import TrainConfig
from ..data.eval_prompts import choose_eval_prompts
from ..data.first_rows import check_rows
from ..data.labeled import LabeledExamples
from ..data.load_data import load_data, split_to_evaluate
from ..data.missing_split import no_rows_to_evaluate
from ..data.model_limits import check_examples, limits_of
from ..data.overlaps import find_overlaps
from ..data.pairs import Pairs
from ..data.python_data import store_data
from ..data.sources import SPLITS, SplitName
from ..errors import AdapterError, ConfigError, counted
from ..inference.generate import answer_questions, load
from ..kernels.trunk_and_head import find_trunk_and_head
from ..keyword_types import EvaluateOptions
from ..memory.run_sizes import resolve_batch, resolve_length
from ..migration import translate
from ..models.moved_run_paths import read_run_settings
from ..models.vocabulary import describe_other_tokenizer
from ..rich_display import RichDisplay
from ..settings import configure, settings_of
from .kto import fraction_ranked_right
from .preferences import fraction_preferred
from .run_checks import with_model_name
from .self_consistency import check_caches
from .validation import score

# The settings of a run that have an effect on scoring a model
_SCORED = frozenset(EvaluateOptions.__annotations__)

_SHOWN = 160  # characters of a prompt's end


@dataclass(frozen=True)
class Answer:
    """One prompt with the expected answer and the model's."""

    source: str
    prompt: str
    expected: str
    generated: str

    @property
    def exact(self) -> bool:
        """Whether the answers are equal, ignoring white space at both ends."""
        return self.expected.strip() == self.generated.strip()


@dataclass(frozen=True, repr=False)
class Evaluation(RichDisplay):
    """The scores of a model on a split of the data, from ``evaluate``.

    Attributes:
        split: The split of the data, e.g. "test".
        examples: The number of examples.
        tokens: The number of supervised tokens.
        loss: The mean loss per supervised token, in nats.
        accuracy: The fraction of the supervised tokens that the model ranks first, in [0, 1].
        answers: The model's answers to some of the examples whose expected answers are short.
        base: The evaluation of the model that this one is compared with.
        preferred: The fraction of pairs whose chosen answer is more likely per token than the
            rejected one, in [0, 1]; None without pairs.
    """

    split: str
    examples: int
    tokens: int
    loss: float
    accuracy: float
    answers: list[Answer] = field(default_factory=list)
    base: "Evaluation | None" = None
    preferred: float | None = None

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def exact(self) -> float | None:
        """Return the fraction of exact answers, in [0, 1], or None without answers."""
        if not self.answers:
            return None
        return self.exact_count / len(self.answers)

    @property
    def exact_count(self) -> int:
        """Return the number of exact answers."""
        return sum(answer.exact for answer in self.answers)

    def changed(self) -> list[tuple[Answer, Answer]]:
        """Return the answers that differ from the base's, as pairs (base's, this model's).

        Answers that have become right come first, and those that have become wrong last.
        """
        if self.base is None:
            return []

        different: list[tuple[Answer, Answer]] = []
        for old, new in zip(self.base.answers, self.answers, strict=False):
            if old.generated.strip() != new.generated.strip():
                different.append((old, new))
        return sorted(different, key=lambda pair: pair[0].exact - pair[1].exact)

    def __rich__(self) -> Table:
        """Return a table of this model's and its base's metrics, and up to three changed answers.

        If the base has a base of its own, the base is the model with the adapter that training
        started from, and its own base is the model without it.
        """
        columns = {"model": self}
        if self.base is not None:
            columns = {"base": self.base, "tuned": self}
            if self.base.base is not None:
                columns = {"base": self.base.base, "start": self.base, "tuned": self}

        examples = counted(self.examples, f"{self.split} example")
        title = f"{examples}, {counted(self.tokens, 'supervised token')}"
        table = Table(title=title)
        for name in ("", *columns):
            table.add_column(name, overflow="fold")

        # The metrics.
        figures = (
            ("loss", "loss", ".4f"),
            ("perplexity", "perplexity", ".4g"),
            ("token accuracy", "accuracy", ".1%"),
        )
        for name, attribute, form in figures:
            values = [format(getattr(column, attribute), form) for column in columns.values()]
            table.add_row(name, *values)
        if self.preferred is not None:
            cells = [f"{column.preferred or 0.0:.1%}" for column in columns.values()]
            table.add_row("chosen answers preferred", *cells)
        if self.answers:
            counts = [
                f"{column.exact_count} of {len(column.answers)}" for column in columns.values()
            ]
            table.add_row("exact answers", *counts, end_section=True)

        # The answers. ``Text`` keeps rich from reading their brackets as markup.
        for old, new in self.changed()[:3]:
            prompt = f"{new.source}\n{_end_of(new.prompt)}\nexpected: {new.expected.strip():.200}"
            left_out = [""] * (len(columns) - 2)
            table.add_row(Text(prompt), *left_out, _marked(old), _marked(new))
        return table


def _end_of(prompt: str) -> str:
    """Return a prompt, or its end from a whole word on."""
    text = prompt.strip()
    if len(text) <= _SHOWN:
        return text
    return f"…{text[-_SHOWN:].split(maxsplit=1)[-1]}"


def _marked(answer: Answer) -> Text:
    """Return an answer, shortened, with a mark that says whether it is exact."""
    mark = "✓" if answer.exact else "✗"
    return Text(f"{mark} {answer.generated.strip():.200}")


def evaluate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    /,
    *,
    split: SplitName = "valid",
    answers: int = 64,
    base: Evaluation | None = None,
    **settings: Unpack[EvaluateOptions],
) -> Evaluation:
    """Score a model on a split of the data: loss, perplexity, token accuracy and exact answers.

    Args:
        model: From ``load``, with or without an adapter.
        tokenizer: From ``load``.
        split: "train", "valid" or "test".
        answers: The largest number of examples to answer by greedy generation, chosen from those
            whose answer has up to 64 tokens; 0 for none.
        base: The evaluation of another model on the same split, to show for comparison.
        settings: The settings of ``finetune`` that choose and read the data, and ``seed``, which
            chooses the examples to answer.

    Raises:
        DataError: The split is empty or can't be read.
        ConfigError: ``split`` or a setting is not allowed, ``base`` scores other examples, or a
            setting has no effect here, such as ``rank``: the model is scored as it is.
        ModelError: The model computes NaN, or its logits differ with and without caches.

    Example:
        >>> before = evaluate(model, tokenizer, data="my_folder")
        >>> finetune(model, tokenizer, data="my_folder")
        >>> print(evaluate(model, tokenizer, data="my_folder", base=before))
    """
    if answers < 0:
        raise ConfigError(f"answers is {answers}; allowed are 0 (for none) or more")
    given = translate(TrainConfig, dict(settings))
    config = configure(TrainConfig, with_model_name(model, store_data(given)))
    unused = sorted(set(given) - _SCORED)
    if unused:
        raise ConfigError(
            f"evaluate scores the model as it is, so {', '.join(unused)} would have no effect:"
            f" leave out all but {', '.join(sorted(_SCORED))}"
        )
    if warning := describe_other_tokenizer(model, tokenizer):
        sys.stderr.write(f"{warning}\n")
    found = _score_split(model, tokenizer, config, split, answers, base)
    return replace(found, base=base)


def _score_split(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: TrainConfig,
    split: SplitName,
    answers: int = 64,
    base: Evaluation | None = None,
) -> Evaluation:
    """Score a model on a split of a run's data; see ``evaluate``."""
    # Read the data.
    config = resolve_length(config, model)
    examples = load_data(config, tokenizer, split).examples[split]
    if not len(examples):
        raise no_rows_to_evaluate(config, tokenizer, split)
    if base is not None and (base.split, base.examples) != (split, len(examples)):
        theirs = counted(base.examples, f"{base.split} example")
        ours = counted(len(examples), f"{split} example")
        raise ConfigError(
            f"base scores {theirs}, and this evaluation {ours}: evaluate the base on the same data"
            " and split"
        )
    check_examples(limits_of(model), {split: examples}, tokenizer, partial(print, file=sys.stderr))
    config = resolve_batch(config, model, int(examples.lengths.max()))

    # The loss is computed without caches, but the answers with them.
    if answers:
        check_caches(model)

    # Score all examples.
    trunk_and_head = find_trunk_and_head(model)
    learned, preferred = examples, None
    if isinstance(examples, Pairs):
        learned = examples.chosen
        preferred = fraction_preferred(model, examples, config.data.batch_size)
    elif isinstance(examples, LabeledExamples):
        learned = examples.desirable
        preferred = fraction_ranked_right(model, trunk_and_head, examples, config.data.batch_size)
    found = score(model, trunk_and_head, learned, config.data.batch_size)

    # Answer some of them.
    prompts = choose_eval_prompts(examples, config, tokenizer, answers)
    answered: list[Answer] = []
    for prompt, generated in zip(prompts, answer_questions(model, tokenizer, prompts), strict=True):
        answered.append(Answer(prompt.source, prompt.prompt, prompt.expected or "", generated))

    return Evaluation(
        split=split,
        examples=len(examples),
        tokens=int(learned.target_counts.sum()),
        loss=found.loss,
        accuracy=found.accuracy,
        answers=answered,
        preferred=preferred,
    )


def evaluate_run(config: TrainConfig, given: Collection[str]) -> None:
    """Print how a run's adapter and its base score on the test examples, as ``--test`` does.

    Without test rows, the validation rows are used, which may be held out of the training rows. If
    the run started from another adapter, that one is scored as well.

    Args:
        config: The settings. Those that are not given are taken from the run.
        given: The names of the settings that the user gave.

    Raises:
        AdapterError: The run's folder holds no adapter.
    """
    # Take the settings that are not given from the run.
    own = {name: value for name, value in settings_of(config).items() if name in given}
    stored: dict[str, Any] = {}
    file = Path(config.adapter_path) / RUN_SETTINGS
    if file.is_file():
        stored = read_run_settings(file)
        config = configure(TrainConfig, stored | own)
    changed = [name for name, value in own.items() if value != stored.get(name)]
    unused = sorted(set(changed) - _SCORED - {"adapter_path", "resume_adapter_file"})
    if unused:
        Console().print(
            f"--test scores the run as it is, so these settings have no effect: {', '.join(unused)}"
        )
    check_rows(config)

    # Find the run's adapter, or the model if its weights were trained.
    folder, weights = adapter_files(Path(config.adapter_path))
    is_full = is_model_folder(folder)
    if is_full and not stored:
        raise AdapterError(
            f"{config.adapter_path} holds a model, and no run.yaml: --test scores a run beside its"
            " base; give the folder of a run"
        )
    check_not_peft(folder)
    if not is_full and not (folder / weights).is_file():
        raise AdapterError(
            f"{config.adapter_path} holds no adapter: train one first, without --test"
        )

    # Evaluate the base first, because an adapter changes the model in place.
    model, tokenizer = load(config.model)
    split = _choose_split(resolve_length(config, model), tokenizer)
    base = _score_split(model, tokenizer, config, split)
    start = _score_start(model, tokenizer, config, split)
    if start is not None:
        base = replace(start, base=base)
        del model
        model, tokenizer = load(config.model)

    # Evaluate the result of the run.
    if is_full:
        del model
        model, tokenizer = load(config.adapter_path)
    else:
        load_adapter(model, config.adapter_path)
    tuned = _score_split(model, tokenizer, config, split)
    Console().print(replace(tuned, base=base))


def _choose_split(config: TrainConfig, tokenizer: TokenizerWrapper) -> SplitName:
    """Return "test" if the data has test rows or no validation rows either, else "valid".

    Rows of the split that are in another one are reported, because their scores are too good.
    """
    split = split_to_evaluate(config)
    log = partial(print, file=sys.stderr)
    data = load_data(config, tokenizer, *SPLITS, strict=False, log=log)
    if split == "valid" and len(data.examples["valid"]):
        Console().print("there are no test rows, so the validation rows are used")
    elif split == "valid":
        split = "test"  # the error about it is the more useful one

    for overlap in find_overlaps(data.examples):
        if overlap.count and overlap.split == split:
            Console().print(f"warning: {overlap}", markup=False, highlight=False)
    return split


def _score_start(
    model: nn.Module, tokenizer: TokenizerWrapper, config: TrainConfig, split: SplitName
) -> Evaluation | None:
    """Attach and score the adapter that a run started from; return None without one."""
    if config.resume_adapter_file is None:
        return None
    folder, weights = adapter_files(Path(config.resume_adapter_file))
    if not (folder / weights).is_file():
        Console().print(
            f"the run started from {config.resume_adapter_file}, which no longer holds an adapter,"
            " so the comparison includes the effect of that adapter"
        )
        return None
    load_adapter(model, config.resume_adapter_file)
    return _score_split(model, tokenizer, config, split)
