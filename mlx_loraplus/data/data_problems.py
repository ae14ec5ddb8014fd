"""The reasons why data can't be trained on: bad rows, long rows, or no rows."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from ..config import TrainConfig
from ..errors import join_problems
from .dataset import Examples
from .fields_advice import ADVICE
from .sources import SPLITS, Source, SplitName, describe_sources
from .split_report import SplitReport


def find_problems(
    config: TrainConfig,
    examples: Mapping[SplitName, Examples],
    reports: Mapping[SplitName, SplitReport],
    sources: Sequence[Source],
    needed: str,
) -> list[str]:
    """Return the reasons why data can't be trained on.

    Args:
        config: The settings of the run.
        examples: The examples of each split.
        reports: The report on the rows of each split.
        sources: The tables of the data.
        needed: The fields that a row needs.
    """
    settings = config.data
    problems: list[str] = []

    # Bad rows
    bad = sum(report.bad for report in reports.values())
    if bad and settings.on_bad == "error":
        bad_rows = chain(*(report.bad_rows for report in reports.values()))
        are_all = not any(len(found) for found in examples.values())
        lacking = needed if any(report.lacks_fields for report in reports.values()) else ""
        problems.append(describe_bad_rows(bad_rows, bad, lacking, are_all=are_all))

    # Long rows
    long = sum(report.long for report in reports.values())
    if long and settings.on_long == "error":
        places = list(chain(*(report.long_rows for report in reports.values())))
        others = (
            "truncate or drop" if config.objective.has_preferences else "truncate, drop or split"
        )
        problems.append(
            f"rows longer than --max-seq-length {settings.max_seq_length:,}:"
            f" {join_problems(places, count=long)}; raise it, or choose --on-long {others}"
        )

    # No rows
    has_nothing = "train" in examples and not len(examples["train"])
    if has_nothing and not problems:
        report = reports["train"]
        dropped_rows = report.dropped + report.equal + report.bad
        advice = f"a row needs {needed}"
        if report.dropped + report.equal:
            advice = f"raise --max-seq-length, which is {settings.max_seq_length:,}"
        if dropped_rows:
            reasons = "; ".join(report.dropped_rows())
            problems.append(
                f"{describe_sources(settings.data)}: no training row of {dropped_rows:,} is left"
                f" ({reasons}); {advice}"
            )
        else:
            problems.append(no_training_rows(settings.data, sources, needed))
    return problems


def no_training_rows(names: Sequence[str], sources: Sequence[Source], needed: str) -> str:
    """Return the message for data without training rows.

    Args:
        names: The names of the data sets.
        sources: Their tables.
        needed: The fields that a row needs.
    """
    splits = [split for split in SPLITS if any(split in source for source in sources)]
    found, advice = "no training rows", f"a row needs {needed}"
    if "train" not in splits:
        found = f"no training rows, only {' and '.join(splits)}"
        advice = "training rows have the key 'train', as in {'train': rows}"
    return f"{describe_sources(names)}: {found}; {advice}"


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


def describe_bad_rows(problems: Iterable[str], count: int, needed: str, *, are_all: bool) -> str:
    """Return a message about bad rows.

    Args:
        problems: The problems of the first of them.
        count: The number of bad rows.
        needed: The fields that a row needs if some row lacks one, or an empty string.
        are_all: Whether all rows are bad.
    """
    number = f"{count:,} bad rows: " if count > 1 else ""
    found = join_problems(group_problems(problems))
    fields = f"; a row needs {needed}" if needed else ""
    skip = "" if are_all else "; --on-bad drop skips bad rows"
    return f"{number}{found}{fields}{skip}"
