"""Load a run's data: the examples of each split, and reports on their rows.

``sources`` finds the files, and ``readers`` reads their rows. ``rows`` and ``tokenize`` convert the
rows to tokens, which ``token_cache`` stores. ``long_rows`` limits their length, ``dataset`` makes
examples of them, and ``batches`` puts these together.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import DataConfig, ObjectiveConfig, TrainConfig
from ..errors import DataError, join_problems
from .dataset import SPAN, Examples
from .fields_advice import ADVICE
from .fields_setting import parse_names
from .holdout import group_conversations, split_holdout
from .labeled import LabeledExamples, note_labels
from .labeled_rows import make_labeled
from .long_rows import truncate_or_split
from .overlaps import find_overlaps
from .pairs import Pairs, limit_pairs
from .preference_rows import make_pair
from .row_kinds import FORMATS, LABELED_FORMAT, PAIR_FORMAT
from .row_problems import RowProblems
from .rows import MakeRow, make_row, make_rows
from .sampling_weights import WeightedExamples
from .sources import SPLITS, Source, SplitName, describe_sources, find_sources
from .split_report import SplitReport
from .token_cache import Encoder, open_shard

# Number of rows of each file that are checked before the model is downloaded
_FIRST_ROWS = 100_000

# Without validation rows, this share of the training examples is held out
_HELD_OUT = 0.1
# With fewer training examples, none are held out
_FEWEST = 10


@dataclass
class Data:
    """The data of a run.

    Attributes:
        examples: The examples of each split.
        reports: The report on the rows of each split.
        problems: Reasons why the data can't be trained on.
    """

    examples: dict[SplitName, Examples] = field(default_factory=dict)
    reports: dict[SplitName, SplitReport] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_rows(config: TrainConfig) -> None:
    """Check the first rows of every file without a tokenizer, before the model is downloaded.

    Raises:
        DataError: The data can't be found, ``valid_split`` is set although there are validation
            files, or ``on_bad`` is "error" and there are bad rows. The message reports them
            together.
    """
    names = parse_names(config.data.fields)
    make, needed = row_format(config.objective)
    sources = find_sources(config.data.data)

    # Only to raise an error if valid_split contradicts the files
    _holds_out(config.data, sources)

    bad = rows = 0
    places: list[str] = []
    for source in sources:
        for table in chain(*source.values()):
            # Reading the rows collects their problems
            problems = RowProblems()
            for _ in islice(make_rows(table.rows(), names, problems, make), _FIRST_ROWS):
                rows += 1
            bad += problems.bad
            places += problems.places(table.name)

    if bad and config.data.on_bad == "error":
        raise DataError(_bad_rows(places, bad, needed, are_all=not rows))


def row_format(objective: ObjectiveConfig) -> tuple[MakeRow, str]:
    """Return the function that makes the rows of an objective, and the fields that they need."""
    if objective.is_paired:
        return make_pair, PAIR_FORMAT
    if objective.is_labeled:
        return make_labeled, LABELED_FORMAT
    return make_row, FORMATS


def load_examples(
    config: TrainConfig, tokenizer: TokenizerWrapper, log: Callable[[str], None]
) -> dict[SplitName, Examples]:
    """Return the examples of "train" and "valid", and report how their rows were used."""
    if not config.data.data:
        log(
            "data: no --data given, so the built-in demo set is used: requests in plain English"
            " to JSON commands"
        )
    data = load_data(config, tokenizer, "train", "valid", log=log)

    for split, report in data.reports.items():
        if not report.rows:
            log(f"{split}: no rows, so no validation loss (add a valid file, or --valid-split)")
            continue
        log(f"{split}: {report} ({report.of_kinds()})")
        for note in report.notes:
            log(f"{split}: {note}")

    for overlap in find_overlaps(data.examples):
        if overlap.leak and overlap.count:
            log(f"warning: {overlap}")
    return data.examples


def load_data(
    config: TrainConfig,
    tokenizer: TokenizerWrapper,
    *splits: SplitName,
    strict: bool = True,
    log: Callable[[str], None] = lambda _: None,
) -> Data:
    """Return the examples of the named splits, or of all splits if none is named.

    Args:
        config: Settings of the run. Only the data settings and the seed are used.
        tokenizer: From ``load``.
        splits: Splits to read.
        strict: Raise an error for data that can't be trained on, instead of returning the problems.
        log: Called regularly with the progress while a large file is encoded.

    Raises:
        DataError: The data can't be found or read, or can't be trained on. The message lists all
            problems.
    """
    # Holding out needs both splits, even if only one of them is wanted
    settings = config.data
    sources = find_sources(settings.data)
    holds_out = _holds_out(settings, sources)
    wanted: set[SplitName] = set(splits or SPLITS)
    if holds_out and wanted & {"train", "valid"}:
        wanted |= {"train", "valid"}

    # Encode the rows, or find their tokens in the cache
    data = Data()
    names = parse_names(settings.fields)
    make, needed = row_format(config.objective)
    encoder = Encoder(tokenizer, settings.train_on, names, log, make)
    for split in SPLITS:
        if split in wanted:
            report = SplitReport(settings.max_seq_length, settings.on_long)
            data.reports[split] = report
            data.examples[split] = _load_split(sources, split, encoder, config.objective, report)

    data.problems = _find_problems(settings, data, needed)
    if data.problems and strict:
        raise DataError("; ".join(data.problems))

    # Hold out validation examples, and apply the sampling weights to the training examples
    train = data.examples.get("train")
    if train and holds_out:
        train, valid = _hold_out(train, config, data.reports["valid"])
        data.examples |= {"train": train, "valid": valid}
    if train and settings.data_weights:
        weighted = WeightedExamples(train, settings.data_weights, config.seed)
        data.examples["train"] = weighted
        data.reports["train"].drawn = len(weighted.longest)

    # Count the examples that remain
    for split, report in data.reports.items():
        examples = data.examples[split]
        report.count(examples)
        if isinstance(examples, LabeledExamples):
            report.notes += note_labels(examples, config.objective, split)
    return data


def split_to_evaluate(config: TrainConfig) -> SplitName:
    """Return "test" if the data has test rows, else "valid".

    Raises:
        DataError: The data can't be found.
    """
    sources = find_sources(config.data.data)
    return "test" if any(source.get("test") for source in sources) else "valid"


def _holds_out(settings: DataConfig, sources: Sequence[Source]) -> bool:
    """Return whether validation examples are held out of the training examples.

    Raises:
        DataError: ``valid_split`` is set although there are validation files.
    """
    has_valid = any(source.get("valid") for source in sources)
    if has_valid and settings.valid_split:
        raise DataError(
            "valid_split holds out training rows, but the data already has validation rows: use"
            " one of them"
        )
    return not has_valid and settings.valid_split != 0


def _hold_out(
    train: Examples, config: TrainConfig, report: SplitReport
) -> tuple[Examples, Examples]:
    """Divide the training examples into training and validation examples, and report it.

    Without ``valid_split``, data with few examples is not divided.
    """
    share = config.data.valid_split
    conversations = group_conversations(train)
    if share is not None:
        return split_holdout(train, conversations, share, config.seed)

    if len(train) < _FEWEST or len(np.unique(conversations)) < 2:
        return train, train.take(np.arange(0))
    report.notes.append(
        f"held out of the {len(train):,} training examples, because there is no validation file"
        " (--valid-split 0 trains on all of them)"
    )
    return split_holdout(train, conversations, _HELD_OUT, config.seed)


def _load_split(
    sources: Sequence[Source],
    split: SplitName,
    encoder: Encoder,
    objective: ObjectiveConfig,
    report: SplitReport,
) -> Examples:
    """Return a split's examples, limited to the maximum length, and report on their rows."""
    # Open the shard of each table
    shards = []
    spans = []
    for number, source in enumerate(sources):
        for table in source.get(split, ()):
            if objective.has_preferences and table.documents:
                _, needed = row_format(objective)
                raise DataError(
                    f"{table.name} holds text and no preferences: give a file whose rows have"
                    f" {needed}, or --objective sft"
                )
            shard = open_shard(table, encoder)
            report.add(shard)
            report.notes += table.notes

            # Limit the examples to the maximum length
            limit = limit_pairs if objective.is_paired else truncate_or_split
            limited = limit(shard, report)
            limited["source"] = number
            limited["shard"] = len(shards)
            shards.append(shard)
            spans.append(limited)

    # Join the examples of all shards
    if objective.is_paired:
        return Pairs(shards, np.concatenate([np.zeros((0, 2), SPAN), *spans]))
    if objective.is_labeled:
        return LabeledExamples(shards, np.concatenate([np.zeros(0, SPAN), *spans]))

    # A single array is not copied, because it may be large
    if len(spans) == 1:
        return Examples(shards, spans[0])
    return Examples(shards, np.concatenate([np.zeros(0, SPAN), *spans]))


def _find_problems(settings: DataConfig, data: Data, needed: str) -> list[str]:
    """Return the reasons why the data can't be trained on."""
    problems: list[str] = []
    reports = list(data.reports.values())

    # Bad rows
    bad = sum(report.bad for report in reports)
    if bad and settings.on_bad == "error":
        bad_rows = chain(*(report.bad_rows for report in reports))
        are_all = not any(len(examples) for examples in data.examples.values())
        problems.append(_bad_rows(bad_rows, bad, needed, are_all=are_all))

    # Long rows
    long = sum(report.long for report in reports)
    if long and settings.on_long == "error":
        places = list(chain(*(report.long_rows for report in reports)))
        problems.append(
            f"rows longer than max_seq_length {settings.max_seq_length:,}:"
            f" {join_problems(places, count=long)}; raise it, or choose --on-long truncate, drop or"
            " split"
        )

    # No rows
    has_nothing = "train" in data.examples and not len(data.examples["train"])
    if has_nothing and not problems:
        report = data.reports["train"]
        why = "no training rows"
        advice = f"a row needs {needed}"
        if report.dropped + report.bad:
            reasons = "; ".join(report.dropped_rows())
            why = f"none of the {report.dropped + report.bad:,} training rows is left ({reasons})"
        if report.dropped:
            advice = f"raise max_seq_length {settings.max_seq_length:,}"
        problems.append(f"{describe_sources(settings.data)}: {why}; {advice}")
    return problems


def group_problems(problems: Iterable[str]) -> list[str]:
    """Return each problem once, with the place of the first row that has it.

    Args:
        problems: Problems of rows, in the form "place: problem".
    """
    # Problems that differ only in their advice, which depends on a row's values, are the same
    places: dict[str, list[str]] = {}
    shown: dict[str, str] = {}
    for line in problems:
        place, _, problem = line.partition(": ")
        same = problem.partition(ADVICE)[0]
        places.setdefault(same, []).append(place)
        shown.setdefault(same, problem)

    grouped: list[str] = []
    for same, found in places.items():
        others = " and others" if len(found) > 1 else ""
        grouped.append(f"{found[0]}{others}: {shown[same]}")
    return grouped


def _bad_rows(problems: Iterable[str], count: int, needed: str, *, are_all: bool) -> str:
    """Return a message about ``count`` bad rows; ``problems`` describes the first of them."""
    number = f"{count:,} bad rows: " if count > 1 else ""
    found = join_problems(group_problems(problems))
    skip = "" if are_all else "; --on-bad drop skips bad rows"
    return f"{number}{found}; a row needs {needed}{skip}"
