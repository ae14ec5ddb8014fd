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
    note_few_rows(batches, config, log)
    if isinstance(batches, PackedBatches):
        log(f"train: {batches}")
    return batches


def note_few_rows(batches: Batches, config: TrainConfig, log: Log) -> None:
    """Report that an epoch has fewer rows than a batch, or fewer batches than a step."""
    asked, rows = config.data.batch_size, batches.full_rows
    accumulated = config.grad_accumulation_steps
    unit = "packed row" if config.data.pack else f"training {config.objective.unit}"
    if rows < asked:
        has = "a step has"
        if accumulated > 1:
            has = f"each of the {counted(accumulated, 'batch')} of a step has"
        log(
            f"note: --batch-size {asked:,} is more than the {counted(rows, unit)} of an epoch, so"
            f" {has} only {rows:,}"
        )
    elif accumulated > batches.per_epoch:
        log(
            f"note: --grad-accumulation-steps {accumulated:,} is more than the"
            f" {counted(batches.per_epoch, 'batch')} of an epoch, so a step learns the same"
            f" {unit}s more than once"
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
