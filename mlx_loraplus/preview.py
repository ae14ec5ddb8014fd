"""What training would make of the data: its rows, lengths, batches, duplicates and leaks, and three examples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from .config import RunConfig
from .data.batches import Batches
from .data.dataset import Examples, Report
from .data.limits import Limits, check_examples, limits_of
from .data.overlaps import Overlap, find_overlaps
from .data.packing import plan_batches
from .data.splits import Data, load_data, tell_faults
from .errors import DataError, ModelError
from .memory.plan import resolve_batch, resolve_length
from .models.loading import load_folder_tokenizer
from .models.registry import find_model
from .models.skeleton import make_skeleton, read_config
from .rich_display import RichDisplay
from .settings import configure, settings_of

_TOLD = 20  # places that are named of each problem
_LEARNED, _GIVEN = "bold green", "dim"
_BAR = 40


@dataclass(frozen=True)
class Epoch:
    """The batches of the first epoch."""

    batches: int
    shapes: int  # different (rows, length, targets)
    padding: float  # share of all tokens


@dataclass(frozen=True, repr=False)
class Preview(RichDisplay):
    """What training would make of the data. ``print`` it, or show it in a notebook."""

    config: RunConfig
    data: Data
    overlaps: list[Overlap]
    plan: Epoch | None  # None without training rows
    samples: list[
        tuple[str, list[tuple[str, bool]]]
    ]  # training examples: (place, [(text, whether it is learned)])

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Yield it line by line."""
        for split, report in self.data.reports.items():
            yield from _describe(split, report)
        for overlap in self.overlaps:
            yield Text(str(overlap), "yellow" if overlap.count else "")
        if self.plan:
            yield Text("\nlengths in train, in tokens", "bold")
            yield from _histogram(self.data.examples["train"].lengths + 1)
            plan, settings = self.plan, self.config.data
            rows = f"{settings.batch_size} {'packed ' if settings.pack else ''}rows each"
            yield Text("\nbatches", "bold")
            yield Text(
                f"{plan.batches:,} in an epoch, {rows}; {plan.shapes:,} shapes; {plan.padding:.1%}"
                " padding"
            )
        for place, parts in self.samples:
            yield Text(f"\n{place}", "bold").append(", ⟦what is learned⟧ in brackets", "not bold")
            text = Text()
            for part, learned in parts:
                text.append(f"⟦{part}⟧" if learned else part, _LEARNED if learned else _GIVEN)
            yield text
        if self.data.problems:
            yield Text(f"\ntraining would stop: {'; '.join(self.data.problems)}", "bold red")


def preview(
    data: str | Sequence[str] = (), tokenizer: TokenizerWrapper | None = None, **settings: Any
) -> Preview:
    """Show what training would make of the data, without a model's weights.

    Args:
        data: As ``--data``: folders, files or hub ids; none for the demo set.
        tokenizer: From ``load``; without it, that of the setting ``model``.
        settings: The settings of ``finetune``.

    Raises:
        DataError: The data can't be found or read. Rows that training would refuse are in the
            preview.

    Example:
        >>> preview("my_folder", model="gemma-3", max_seq_length=512)
    """
    config = configure(RunConfig, settings | {"data": data})
    limits = Limits()  # of a tokenizer alone nothing is known
    if tokenizer is None:
        folder = find_model(config.model).path
        tokenizer, limits = load_folder_tokenizer(folder), _limits(folder)
    config = resolve_length(config, None)
    found = load_data(config, tokenizer, strict=False)
    _check(limits, found, tokenizer)
    train, plan, samples = found.examples["train"], None, []
    if len(train):
        config = resolve_batch(config, None, int(train.lengths.max()))
        plan = _plan(plan_batches(train, config.data, config.seed), train)
        chosen = sorted({0, len(train) // 2, len(train) - 1})
        samples = [(train.place(i), _parts(train, i, tokenizer)) for i in chosen]
    return Preview(config, found, list(find_overlaps(found.examples)), plan, samples)


def _limits(folder: Path) -> Limits:
    """Return the limits of a model whose weights are not loaded, as far as its config tells them."""
    config = read_config(folder / "config.json")
    try:
        return limits_of(make_skeleton(config), skeleton=True)
    except ModelError:  # told better where it is loaded
        rows = config.get("text_config", config).get("vocab_size")
        return Limits(embedding=rows, logits=rows)


def _check(limits: Limits, found: Data, tokenizer: TokenizerWrapper) -> None:
    """Add what the model can't hold to the problems, and what it was not made for to the notes."""
    for split, examples in found.examples.items():
        try:
            check_examples(limits, {split: examples}, tokenizer, found.reports[split].notes.append)
        except DataError as problem:
            found.problems.append(str(problem))


def show(config: RunConfig) -> None:
    """Print the preview of a config, as ``--dry-run`` does; raise DataError where training would refuse the data."""
    settings = settings_of(config)
    found = preview(settings.pop("data"), **settings)
    Console(soft_wrap=True).print(found)
    if found.data.problems:
        refusal = DataError("; ".join(found.data.problems))
        refusal.told = True
        raise refusal


def _plan(batches: Batches, train: Examples) -> Epoch:
    shapes, padded, seen = set(), 0, 0
    for n in range(batches.per_epoch):
        rows = batches.rows_of(n)
        shape = batches.shape_of(rows)
        members = np.concatenate(rows)
        shapes.add(shape)
        padded += shape[0] * shape[1]
        seen += int(train.lengths[members].sum())
    return Epoch(batches.per_epoch, len(shapes), 1 - seen / padded)


def _describe(split: str, report: Report) -> Iterator[Text]:
    yield Text(split, "bold").append(f": {report if report.rows else 'no rows'}", "not bold")
    if report.kinds:
        yield Text(f"  kinds: {report.of_kinds()}")
        share = report.supervised_tokens / max(1, report.tokens)
        yield Text(f"  learned: {share:.1%} of the tokens")
    faults = tell_faults(report.bad_rows)
    lines = (
        ("bad", faults, len(faults)),
        ("long", report.long_rows, report.long),
        ("note", report.notes, 0),
    )
    for name, told, count in lines:
        for line in told[:_TOLD]:
            yield Text(f"  {name}: {line}", "yellow")
        if count > _TOLD:
            yield Text(f"  {name}: and {count - _TOLD:,} more", "yellow")


def _histogram(lengths: np.ndarray) -> Iterator[Text]:
    """Yield bars of how many examples have which length, each bar wider than the one before."""
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, 11).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * -(-int(count) * _BAR // int(counts.max()))
        yield Text(f"  {low:>6,} to {high - 1:<6,} {bar} {count:,}")
    middle, most, longest = np.quantile(lengths, (0.5, 0.95, 1), method="nearest")
    yield Text(f"  half have up to {middle:,}, 95% up to {most:,}, the longest {longest:,}")


def _parts(train: Examples, index: int, tokenizer: TokenizerWrapper) -> list[tuple[str, bool]]:
    """Return an example's text in runs that are learned and runs that are not, long ones without their middle."""
    example = train[index]
    seams = np.flatnonzero(np.diff(example.supervised)) + 1
    parts = []
    for run, learned in zip(
        np.split(example.tokens, seams), np.split(example.supervised, seams), strict=True
    ):
        text = tokenizer.decode(run.tolist())
        parts.append(
            (text if len(text) <= 600 else f"{text[:300]} […] {text[-200:]}", bool(learned[0]))
        )
    return parts
