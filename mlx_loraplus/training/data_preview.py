"""Preview the data of a run: rows, lengths, batches, duplicates, leaks and three examples."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from ..adapters.stored_files import check_names_model
from ..call_checks import shown
from ..config import TrainConfig
from ..data.batches import Batches
from ..data.data_problems import group_problems
from ..data.dataset import Examples
from ..data.eval_prompts import choose_format, own_eval_prompts
from ..data.labeled import LabeledExamples
from ..data.load_data import Data, load_data
from ..data.model_limits import Limits, check_examples, check_prompt, limits_of
from ..data.overlaps import Overlap, find_overlaps
from ..data.pairs import Pairs
from ..data.python_data import store_data
from ..data.split_report import SplitReport
from ..data.tokenize import Example
from ..errors import ConfigError, DataError, ModelError, counted
from ..keyword_types import PreviewOptions, RowsOrNames
from ..memory.run_sizes import resolve_batch, resolve_length
from ..migration import translate
from ..models.find_model import find_model
from ..models.ignored_window import ignored_window
from ..models.loading import load_folder_tokenizer
from ..models.skeleton import make_skeleton, read_config
from ..python_messages import in_keywords
from ..rich_display import RichDisplay
from ..settings import configure
from .make_batches import plan_batches

# Lines that are shown about each kind of problem
_MAX_LINES = 20

# Width of the longest bar and number of bars in the histogram of lengths
_BAR_WIDTH = 40
_BARS = 10

# Texts with more characters are shown without their middle
_MAX_TEXT = 600
_TEXT_START, _TEXT_END = 300, 200

_LEARNED, _GIVEN = "bold green", "dim"

Part = tuple[str, bool]
"""A piece of an example's text, and whether it is learned."""


@dataclass(frozen=True)
class Epoch:
    """The batches of the first epoch.

    Attributes:
        batches: Number of batches.
        rows: Number of rows of a full batch.
        shapes: Number of different (rows, length, targets) among them.
        padding: Fraction of their tokens that is padding.
        useful_tokens: Number of their tokens, without padding.
    """

    batches: int
    rows: int
    shapes: int
    padding: float
    useful_tokens: int


@dataclass(frozen=True, repr=False)
class Preview(RichDisplay):
    """What a run would train on. ``print`` it, or show it in a notebook.

    Attributes:
        config: The settings, with the maximum length and batch size resolved.
        data: Examples, reports and problems.
        overlaps: Duplicates and leaks.
        plan: The batches, or None if there are no training examples.
        samples: Training examples as (place, parts); both answers of a pair.
    """

    config: TrainConfig
    data: Data
    overlaps: list[Overlap]
    plan: Epoch | None
    samples: list[tuple[str, list[Part]]]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Yield the preview line by line."""
        # Rows
        for split, report in self.data.reports.items():
            yield from _describe(split, report)
        for overlap in self.overlaps:
            yield Text(str(overlap), "yellow" if overlap.count else "")

        # Lengths and batches
        if self.plan:
            yield Text("\nlengths in train, in tokens", "bold")
            yield from _histogram(self.data.examples["train"].lengths + 1)
            yield from _answer_lengths(self.data.examples["train"])
            yield Text("\nbatches", "bold")
            yield _describe_batches(self.plan, self.config)

        # Samples
        for place, parts in self.samples:
            yield Text(f"\n{place}", "bold").append(", ⟦what is learned⟧ in brackets", "not bold")
            text = Text()
            for part, is_learned in parts:
                if is_learned:
                    text.append(f"⟦{part}⟧", _LEARNED)
                else:
                    text.append(part, _GIVEN)
            yield text

        if self.data.problems:
            yield Text(f"\ntraining would stop: {'; '.join(self.data.problems)}", "bold red")


def preview(
    data: RowsOrNames | None = None,
    tokenizer: TokenizerWrapper | None = None,
    **settings: Unpack[PreviewOptions],
) -> Preview:
    """Return a preview of what training would use, without loading a model's weights.

    Args:
        data: Paths, hub ids or rows, as for ``finetune``. By default, the demo set.
        tokenizer: From ``load``. By default, that of the model in the settings.
        settings: The settings of ``finetune``.

    Raises:
        DataError: The data can't be found or read. Rows that training would refuse do not raise;
            they are listed in the preview.

    Example:
        >>> preview("my_folder", model="gemma-3", max_seq_length=512)
    """
    model: Any = settings.get("model", "")
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(
            f"preview: model is the name of a model, not {shown(model)}: give its name, or"
            " tokenizer=tokenizer"
        )
    given = translate(TrainConfig, dict(settings))
    if data is not None:
        given = store_data({**given, "data": data})
    found = preview_run(configure(TrainConfig, given), tokenizer)

    # Notes and problems name keywords, as errors do
    found.data.problems[:] = map(in_keywords, found.data.problems)
    for report in found.data.reports.values():
        report.bad_rows[:] = map(in_keywords, report.bad_rows)
        report.notes[:] = map(in_keywords, report.notes)
    return found


def preview_run(config: TrainConfig, tokenizer: TokenizerWrapper | None = None) -> Preview:
    """Preview the data of a config; see ``preview``."""
    # A tokenizer does not reveal the limits of its model
    limits = Limits()
    if tokenizer is None:
        check_names_model(config.model)
        folder = find_model(config.model).path
        tokenizer = load_folder_tokenizer(folder)
        limits = _limits_without_weights(folder)

    config = resolve_length(config, None)
    found = load_data(config, tokenizer, strict=False)
    _check_limits(limits, found, tokenizer)
    _check_prompts(limits, found, config, tokenizer)

    # Plan the batches, and show the first, the middle and the last training example
    train = found.examples["train"]
    plan = None
    samples: list[tuple[str, list[Part]]] = []
    if len(train):
        config = resolve_batch(config, None, int(train.lengths.max()))
        plan = _plan_epoch(plan_batches(train, config.data, config.seed), train)
        for index in sorted({0, len(train) // 2, len(train) - 1}):
            samples += _samples(train, index, tokenizer)

    return Preview(config, found, list(find_overlaps(found.examples)), plan, samples)


def _limits_without_weights(folder: Path) -> Limits:
    """Return the limits of a model that can be read from its config."""
    config = read_config(folder / "config.json")
    try:
        model = make_skeleton(config)
        model.ignored_window = ignored_window(model, config)
        return limits_of(model, skeleton=True)
    except ModelError:
        # Loading the model gives a better error message
        vocabulary = config.get("text_config", config).get("vocab_size")
        return Limits(embedding=vocabulary, logits=vocabulary)


def _check_limits(limits: Limits, found: Data, tokenizer: TokenizerWrapper) -> None:
    """Add examples that exceed the model's limits to the problems, and warnings to the notes."""
    for split, examples in found.examples.items():
        try:
            check_examples(limits, {split: examples}, tokenizer, found.reports[split].notes.append)
        except DataError as problem:
            found.problems.append(str(problem))


def _check_prompts(
    limits: Limits, found: Data, config: TrainConfig, tokenizer: TokenizerWrapper
) -> None:
    """Add the first of the user's own prompts that exceeds the model's limits to the problems."""
    if not config.prompts or not len(found.examples["train"]):
        return
    form, _ = choose_format(found.examples["train"], tokenizer)
    try:
        for prompt in own_eval_prompts(config, tokenizer, form):
            check_prompt(limits, prompt.tokens, prompt.length, tokenizer)
    except DataError as problem:
        found.problems.append(str(problem))


def _plan_epoch(batches: Batches, train: Examples) -> Epoch:
    """Return the number, shapes and padding of the batches of the first epoch."""
    shapes: set[tuple[int, int, int]] = set()
    tokens = useful = 0
    for number in range(batches.per_epoch):
        rows = batches.rows_of(number)
        count, length, targets = batches.shape_of(rows)
        shapes.add((count, length, targets))
        tokens += count * length
        useful += _useful_tokens(train, np.concatenate(rows))
    padding = 1 - useful / tokens
    return Epoch(batches.per_epoch, batches.full_rows, len(shapes), padding, useful)


def _useful_tokens(train: Examples, members: np.ndarray) -> int:
    """Return the number of input tokens of some examples, or of both answers of some pairs."""
    if isinstance(train, Pairs):
        return int(train.answers["inputs"][members].sum())
    return int(train.lengths[members].sum())


def _describe_batches(plan: Epoch, config: TrainConfig) -> Text:
    """Return a line about the batches of an epoch."""
    unit = "packed row" if config.data.pack else "row"
    if config.objective.is_paired:
        unit = "pair"
    return Text(
        f"{plan.batches:,} in an epoch, of up to {counted(plan.rows, unit)};"
        f" {counted(plan.shapes, 'shape')}; {plan.padding:.1%} padding"
    )


def _describe(split: str, report: SplitReport) -> Iterator[Text]:
    """Yield the lines about a split's rows."""
    yield Text(split, "bold").append(f": {report if report.rows else 'no rows'}", "not bold")
    if report.kinds:
        fraction = report.supervised_tokens / max(1, report.tokens)
        yield Text(f"  formats: {report.of_kinds()}")
        yield Text(f"  learned: {fraction:.1%} of the tokens")

    yield from _list_lines("bad", group_problems(report.bad_rows))
    yield from _list_lines("long", report.long_rows, report.long)
    yield from _list_lines("note", report.notes)


def _list_lines(name: str, lines: Sequence[str], count: int | None = None) -> Iterator[Text]:
    """Yield the first lines, then the number of lines left out; ``count`` is the total."""
    for line in lines[:_MAX_LINES]:
        label = "" if line.startswith("warning: ") else f"{name}: "
        yield Text(f"  {label}{line}", "yellow")
    left_out = (len(lines) if count is None else count) - _MAX_LINES
    if left_out > 0:
        yield Text(f"  {name}: and {left_out:,} more", "yellow")


def _histogram(lengths: np.ndarray) -> Iterator[Text]:
    """Yield a histogram of lengths with geometrically growing bins, and a line of quantiles."""
    edges = np.geomspace(lengths.min(), lengths.max() + 1, _BARS + 1)
    edges = np.unique(edges.round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    largest = int(counts.max())

    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        # Rounded up, so that every bin that is not empty has a bar
        bar = "█" * math.ceil(int(count) * _BAR_WIDTH / largest)
        last = f"to {high - 1:,}" if high - 1 > low else ""
        yield Text(f"  {low:>6,} {last:<9} {bar} {count:,}")

    median, most, longest = np.quantile(lengths, (0.5, 0.95, 1), method="nearest")
    yield Text(f"  median {median:,}, 95th percentile {most:,}, longest {longest:,}")


def _answer_lengths(train: Examples) -> Iterator[Text]:
    """Yield the mean lengths of the preferred and of the other answers, if the rows have both.

    If one kind is longer, objectives that sum over an answer's tokens may learn its length.
    """
    if isinstance(train, Pairs):
        chosen, rejected = train.chosen.target_counts.mean(), train.rejected.target_counts.mean()
        yield Text(f"  chosen answers have {chosen:.1f} tokens, rejected answers {rejected:.1f}")
    if isinstance(train, LabeledExamples):
        for kind, members in (
            ("desirable", train.is_desirable),
            ("undesirable", ~train.is_desirable),
        ):
            if members.any():
                mean = train.target_counts[members].mean()
                answers = counted(int(members.sum()), f"{kind} answer")
                yield Text(f"  {answers}, of {mean:.1f} tokens on average")


def _samples(
    train: Examples, index: int, tokenizer: TokenizerWrapper
) -> list[tuple[str, list[Part]]]:
    """Return an example, or both answers of a pair, as (place, parts)."""
    place = train.place(index)
    if not isinstance(train, Pairs):
        return [(place, _parts(train[index], tokenizer))]
    return [
        (f"{place}, chosen", _parts(train.chosen[index], tokenizer)),
        (f"{place}, rejected", _parts(train.rejected[index], tokenizer)),
    ]


def _parts(example: Example, tokenizer: TokenizerWrapper) -> list[Part]:
    """Return an example's text, divided where learned and other tokens meet."""
    seams = np.flatnonzero(np.diff(example.supervised)) + 1
    runs = np.split(example.tokens, seams)
    supervised = np.split(example.supervised, seams)

    parts: list[Part] = []
    for tokens, is_learned in zip(runs, supervised, strict=True):
        text = tokenizer.decode(tokens.tolist())
        if len(text) > _MAX_TEXT:
            text = f"{text[:_TEXT_START]} […] {text[-_TEXT_END:]}"
        parts.append((text, bool(is_learned[0])))
    return parts
