"""The data of a run: its examples, with a report on how their rows were used, and its batches."""

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import TrainConfig
from ..data.batches import Batches
from ..data.dataset import Examples
from ..data.overlaps import find_overlaps
from ..data.packing import PackedBatches, plan_batches
from ..data.sources import SplitName
from ..data.splits import load_data
from ..kernels.packed_rows import check_packing
from ..runs.progress import Log


def load_examples(
    config: TrainConfig, tokenizer: TokenizerWrapper, log: Log
) -> dict[SplitName, Examples]:
    """Return the examples, "train" and "valid", and report how their rows were used."""
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


def make_batches(
    model: nn.Module,
    examples: Examples,
    config: TrainConfig,
    log: Log,
    shards: int = 1,
    *,
    packable: bool = False,
) -> Batches:
    """Divide the training examples into batches, packed if ``pack`` is on.

    Args:
        model: The model that trains.
        examples: The training examples.
        config: The run's settings.
        log: Called with a line about packing.
        shards: The number of processes that share a batch.
        packable: Whether the model is known to work with packed rows; otherwise this is tested.

    Raises:
        ConfigError: The model does not work with packed rows.
    """
    if config.data.pack and not packable:
        check_packing(model)

    batches = plan_batches(examples, config.data, config.seed, shards)
    if isinstance(batches, PackedBatches):
        log(f"train: {batches}")
    return batches
