"""A run's data, by its settings: the examples of each split, and what became of their rows.

sources → readers → records → templates → shards of tokens on disk → examples → batches
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import RunConfig
from ..errors import DataError, join_problems
from .dataset import Examples, Report, fit, split_holdout
from .rows import FORMATS, RowProblems, parse_names, read_records
from .sources import SPLITS, Source, SplitName, find_sources
from .token_cache import SPAN, Encoder, open_shard
from .weights import reweight

_FIRST_ROWS = 100_000  # of each file are checked before a model is loaded


@dataclass
class Data:
    """The examples of each split, what became of their rows, and why training would refuse them."""

    examples: dict[SplitName, Examples] = field(default_factory=dict)
    reports: dict[SplitName, Report] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_rows(config: RunConfig) -> None:
    """Look for bad rows without a tokenizer, in the first of every file, before a model is fetched.

    Raises: DataError where there are some and ``on_bad`` is error, all told together; or the data
    can't be found.
    """
    names = parse_names(config.data.fields)
    bad, places = 0, []
    for source in find_sources(config.data.data):
        for table in chain(*source.values()):
            findings = RowProblems()
            for _ in islice(read_records(table.rows(), names, findings), _FIRST_ROWS):
                pass
            bad += findings.bad
            places += findings.places(table.name)
    if bad and config.data.on_bad == "error":
        raise DataError(_bad_rows(places, bad))


def load_data(
    config: RunConfig,
    tokenizer: TokenizerWrapper,
    *splits: SplitName,
    strict: bool = True,
    log: Callable[[str], None] = lambda _: None,
) -> Data:
    """Return the examples of ``splits``; of all splits if none is named.

    Args:
        config: Its data settings and seed.
        tokenizer: From ``load``.
        splits: Which to read.
        strict: Raise what training refuses, rather than return it.
        log: Called now and then while a large file is encoded.

    Raises:
        DataError: The data can't be found or read, or rows can't be trained on, all told together.
    """
    settings, sources = config.data, find_sources(config.data.data)
    wanted = set(splits or SPLITS)
    if settings.valid_split:
        if any(source.get("valid") for source in sources):
            raise DataError(
                "valid_split takes rows from the training rows, but there are validation rows:"
                " drop one"
            )
        if wanted & {"train", "valid"}:
            wanted |= {"train", "valid"}
    data, encoder = Data(), Encoder(tokenizer, settings.train_on, parse_names(settings.fields), log)
    for split in SPLITS:
        if split in wanted:
            report = data.reports[split] = Report(settings.max_seq_length, settings.on_long)
            data.examples[split] = _load_split(sources, split, encoder, report)
    data.problems = _problems(config, data)
    if data.problems and strict:
        raise DataError("; ".join(data.problems))
    if settings.valid_split and len(data.examples.get("train", ())):
        data.examples["train"], data.examples["valid"] = split_holdout(
            data.examples["train"], settings.valid_split, config.seed
        )
    if settings.data_weights and len(data.examples.get("train", ())):
        weighted = reweight(data.examples["train"], settings.data_weights, config.seed)
        data.examples["train"], data.reports["train"].drawn = weighted, len(weighted.longest)
    for split, report in data.reports.items():
        report.count(data.examples[split])
    return data


def _load_split(
    sources: Sequence[Source], split: SplitName, encoder: Encoder, report: Report
) -> Examples:
    """Return a split's examples, fitted to the length, and report on their rows."""
    shards, spans = [], []
    for number, source in enumerate(sources):
        for table in source.get(split, ()):
            shard = open_shard(table, encoder)
            report.add(shard)
            report.notes += table.notes
            fitted = fit(shard, report)
            fitted["source"], fitted["shard"] = number, len(shards)
            shards.append(shard)
            spans.append(fitted)
    if len(spans) == 1:  # without a copy: it may be large
        return Examples(shards, spans[0])
    return Examples(shards, np.concatenate([np.zeros(0, SPAN), *spans]))


def _problems(config: RunConfig, data: Data) -> list[str]:
    """Return why training refuses the rows."""
    settings, reports, problems = config.data, data.reports.values(), []
    bad, long = sum(report.bad for report in reports), sum(report.long for report in reports)
    if bad and settings.on_bad == "error":
        problems.append(_bad_rows([place for report in reports for place in report.bad_rows], bad))
    if long and settings.on_long == "error":
        places = [place for report in reports for place in report.long_rows]
        problems.append(
            f"rows longer than max_seq_length {settings.max_seq_length:,}:"
            f" {join_problems(places, count=long)}; raise it, or choose --on-long truncate, drop or"
            " split"
        )
    if "train" in data.examples and not len(data.examples["train"]) and not problems:
        report = data.reports["train"]
        where = ", ".join(settings.data) or "the demo set"
        lost = report.dropped + report.bad
        why = (
            f"no row is left of {lost:,} ({str(report).partition('; ')[2]})"
            if lost
            else "no training rows"
        )
        problems.append(f"{where}: {why}; a row holds {FORMATS}")
    return problems


def tell_faults(places: Sequence[str]) -> list[str]:
    """Return the faults of bad rows, "place: fault", each once, by the first row that has it."""
    rows: dict[str, list[str]] = {}
    for place, _, fault in (told.partition(": ") for told in places):
        rows.setdefault(fault, []).append(place)
    return [
        f"{found[0]}{' and others' if found[1:] else ''}: {fault}" for fault, found in rows.items()
    ]


def _bad_rows(places: Sequence[str], count: int) -> str:
    counted = f"{count:,} bad rows: " if count > 1 else ""
    return (
        f"{counted}{join_problems(tell_faults(places))}; a row holds {FORMATS}; --on-bad drop"
        " leaves bad rows out"
    )
