"""The batches of a run: plain, packed, of pairs of answers, or of labeled answers."""

from collections.abc import Sequence

import mlx.nn as nn

from ..config import DataConfig, TrainConfig
from ..data.batches import Batches
from ..data.dataset import Examples
from ..data.labeled import LabeledBatches, LabeledExamples
from ..data.packing import PackedBatches
from ..data.pairs import PairBatches, Pairs
from ..data.tokenize import Example
from ..errors import counted
from ..kernels.row_masks import check_packing
from ..runs.progress import Log
from .schedule import schedule_of


def make_batches(
    model: nn.Module,
    examples: Examples,
    config: TrainConfig,
    log: Log,
    processes: int = 1,
    *,
    packable: bool = False,
) -> Batches:
    """Divide the training examples into batches, packed if ``pack`` is on.

    Args:
        model: The model that trains.
        examples: The training examples.
        config: The run's settings.
        log: Called with a line about packing.
        processes: The number of processes that divide a batch.
        packable: Whether the model is known to work with packed rows; otherwise this is tested.

    Raises:
        ConfigError: The model does not work with packed rows.
    """
    if config.data.pack and not packable:
        check_packing(model)

    batches = plan_batches(examples, config.data, config.seed, processes)
    note_short_epoch(batches, config, log)
    if isinstance(batches, PackedBatches):
        log(f"train: {batches}")
    return batches


def note_short_epoch(batches: Batches, config: TrainConfig, log: Log) -> None:
    """Report that an epoch has fewer rows than a batch, or fewer batches than a step."""
    if batches.full_rows < config.data.batch_size:
        _note_few_rows(batches, config, log)
    elif batches.per_epoch < config.grad_accumulation_steps:
        _note_few_batches(batches, config, log)


def _note_few_rows(batches: Batches, config: TrainConfig, log: Log) -> None:
    """Report how many rows a step has."""
    asked, rows = config.data.batch_size, batches.full_rows
    unit = "packed row" if config.data.pack else f"training {config.objective.unit}"
    has = "a step has"
    if config.grad_accumulation_steps > 1:
        has = f"each of the {counted(config.grad_accumulation_steps, 'batch')} of a step has"
    log(
        f"note: --batch-size {asked:,} is more than the {counted(rows, unit)} of an epoch, so {has}"
        f" only {rows:,}"
    )


def _note_few_batches(batches: Batches, config: TrainConfig, log: Log) -> None:
    """Report what it means that a step has more batches than an epoch."""
    asked, per_epoch = config.grad_accumulation_steps, batches.per_epoch
    # A run that is counted in epochs may end before its first step has all batches.
    length = schedule_of(config, per_epoch).batches
    if length <= per_epoch:
        so = f"the run is one step of {counted(length, 'batch')}: for more steps, lower it,"
        so += " --batch-size, or both"
    else:
        so = f"a step repeats its {config.objective.unit}s: to avoid that, give at most"
        so += f" {per_epoch:,}"
    log(
        f"note: --grad-accumulation-steps {asked:,} is more than the"
        f" {counted(per_epoch, 'batch')} of an epoch, so {so}"
    )


def plan_batches(
    examples: Sequence[Example], settings: DataConfig, seed: int, processes: int = 1
) -> Batches:
    """Return a run's batches, packed if ``settings.pack`` is set."""
    if isinstance(examples, LabeledExamples):
        return LabeledBatches(examples, settings.batch_size, seed, processes)
    if isinstance(examples, Pairs):
        return PairBatches(examples, settings.batch_size, seed, processes)
    if settings.pack:
        return PackedBatches(
            examples, settings.batch_size, seed, settings.max_seq_length, processes
        )
    return Batches(examples, settings.batch_size, seed, processes)
