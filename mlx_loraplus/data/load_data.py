"""Load a run's data: the examples of each split, and reports on their rows.

``sources`` finds the files, and ``readers`` reads their rows. ``rows`` brings them into a common
form, ``chat_renderer`` renders chats, and ``tokenize`` encodes them. ``dataset`` stores the tokens,
and ``long_rows`` limits their number. ``training/make_batches`` puts the examples together later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import ObjectiveConfig, TrainConfig
from ..errors import DataError
from .data_problems import find_problems
from .dataset import SPAN, EncodedTable, Examples, open_encoded_table
from .encoding_settings import EncodingSettings
from .fields_setting import parse_names
from .holdout import has_holdout, hold_out, validation_advice
from .labeled import LabeledExamples, note_labels
from .labeled_rows import make_labeled
from .long_rows import limit_lengths
from .overlaps import find_overlaps
from .pairs import Pairs, limit_pairs
from .preference_rows import make_pair
from .row_kinds import FORMATS, LABELED_FORMAT, PAIR_FORMAT
from .rows import MakeRow, make_row
from .sampling_weights import WeightedExamples
from .sources import SPLITS, Source, SplitName, find_sources
from .split_report import SplitReport

DEMO_NOTE = (
    "no --data given, so the built-in demo set is used, which maps requests in plain English to"
    " JSON commands"
)


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
        log(f"data: {DEMO_NOTE}")
    data = load_data(config, tokenizer, "train", "valid", log=log)

    for split, report in data.reports.items():
        if report.rows:
            log(f"{split}: {report} ({report.of_kinds()})")
        else:
            # The notes say why a split of the data has no rows.
            lost = "; ".join(["no rows", *report.dropped_rows()])
            advice = validation_advice(len(data.examples["train"]))
            hint = "" if report.notes else f" ({advice})"
            log(f"{split}: {lost}, so no validation loss{hint}")
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
        config: Settings of the run. Only the data settings, the objective and the seed are used.
        tokenizer: From ``load``.
        splits: Splits to read.
        strict: Raise an error for data that can't be trained on, instead of returning the problems.
        log: Called regularly with the progress while a large file is encoded.

    Raises:
        ConfigError: The setting ``fields`` is wrong.
        DataError: The data can't be found or read, or can't be trained on. The message lists all
            problems.
        ModelError: The tokenizer or its chat template can't be used.
        OutputError: The cache can't be written.
    """
    # Holding out needs both splits, even if only one of them is wanted
    settings = config.data
    sources = find_sources(settings.data)
    holds_out = has_holdout(settings, sources)
    wanted: set[SplitName] = set(splits or SPLITS)
    if holds_out and wanted & {"train", "valid"}:
        wanted |= {"train", "valid"}

    # Encode the rows, or find their tokens in the cache
    data = Data()
    names = parse_names(settings.fields)
    make, needed = row_format(config.objective)
    encoding = EncodingSettings(tokenizer, settings.train_on, names, log, make)
    for split in SPLITS:
        if split in wanted:
            report = SplitReport(settings.max_seq_length, settings.on_long, settings.on_bad)
            data.reports[split] = report
            data.examples[split] = _load_split(sources, split, encoding, config.objective, report)

    data.problems = find_problems(config, data.examples, data.reports, sources, needed)
    if data.problems and strict:
        raise DataError("; ".join(data.problems))

    # Hold out validation examples, and apply the sampling weights to the training examples
    train = data.examples.get("train")
    lacks_valid = "valid" in wanted and not data.examples["valid"]
    if train and holds_out:
        train, valid = hold_out(train, config, data.reports["valid"])
        data.examples |= {"train": train, "valid": valid}
    elif train and lacks_valid and settings.valid_split is None:
        data.reports["valid"].notes.append(
            "there is no validation, because nothing is held out beside a validation split; remove"
            " the split, or add rows"
        )
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


def _load_split(
    sources: Sequence[Source],
    split: SplitName,
    encoding: EncodingSettings,
    objective: ObjectiveConfig,
    report: SplitReport,
) -> Examples:
    """Return a split's examples, limited to the maximum length, and report on their rows."""
    # Encode each table. A source is one name of --data: split → tables
    tables: list[EncodedTable] = []
    spans = []
    for number, source in enumerate(sources):
        for table in source.get(split, ()):
            if objective.has_preferences and table.documents:
                _, needed = row_format(objective)
                raise DataError(
                    f"{table.name} holds text and no preferences: give a file whose rows have"
                    f" {needed}, or --objective sft"
                )
            encoded = open_encoded_table(table, encoding)
            report.add(encoded)
            report.notes += table.notes
            if not len(encoded.rows) and not encoded.problems.bad:
                report.notes.append(f"{table.name} has no rows")

            # Limit the examples to the maximum length, which is stored in the report
            limit = limit_pairs if objective.is_paired else limit_lengths
            limited = limit(encoded, report)
            limited["source"] = number
            limited["table"] = len(tables)
            tables.append(encoded)
            spans.append(limited)

    # Join the examples of all tables
    if objective.is_paired:
        return Pairs(tables, np.concatenate([np.zeros((0, 2), SPAN), *spans]))
    if objective.is_labeled:
        return LabeledExamples(tables, np.concatenate([np.zeros(0, SPAN), *spans]))

    # A single array is not copied, because it may be large
    if len(spans) == 1:
        return Examples(tables, spans[0])
    return Examples(tables, np.concatenate([np.zeros(0, SPAN), *spans]))
