"""Why a split of the data has no rows to evaluate, and what to do about it."""

import os
from collections.abc import Sequence
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import TrainConfig
from ..errors import DataError
from .load_data import load_data
from .sources import SPLITS, SplitName, describe_sources, find_sources, is_from_python
from .split_report import SplitReport


def no_rows_to_evaluate(
    config: TrainConfig, tokenizer: TokenizerWrapper, split: SplitName
) -> DataError:
    """Return the error for data that has no rows in the split to evaluate."""
    names = config.data.data
    tables = [table.name for source in find_sources(names) for table in source.get(split, ())]
    found = load_data(config, tokenizer, strict=False)
    what = f"{describe_sources(names)} has no {split} rows"
    advice = _advise_adding(names, split)
    if tables:
        what += f" in {', '.join(tables)}"
        advice = _advise_mending(found.reports[split])

    # Other splits can be evaluated only in Python.
    others = [other for other in SPLITS if len(found.examples[other])]
    if others:
        quoted = " or ".join(f'"{other}"' for other in others)
        advice += f", or evaluate other rows (in Python, split={quoted})"
    return DataError(f"{what}: {advice}")


def _advise_mending(report: SplitReport) -> str:
    """Return what to do about a split whose rows are all left out, or that is empty."""
    reasons = "; ".join(report.dropped_rows())
    if not reasons:
        return "add some"
    if report.dropped + report.equal:
        return f"raise --max-seq-length ({reasons})"
    return f"correct them ({reasons})"


def _advise_adding(names: Sequence[str], split: SplitName) -> str:
    """Return how to add rows of a split to data that has none."""
    if any(map(is_from_python, names)):
        return f'give data={{"{split}": rows}}, because rows without a split are train rows'

    # A saved data set is a folder, too, but no files are read from it.
    for name in names:
        folder = Path(os.path.expanduser(name))  # noqa: PTH111  (Path's raises for unknown users)
        if folder.is_dir() and not (folder / "dataset_dict.json").is_file():
            return f"add {split}.jsonl to {name}"
    return f"give a folder that holds train.jsonl and {split}.jsonl"
