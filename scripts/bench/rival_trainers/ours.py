"""This package's trainer, on the same task as the others."""

import mlx_loraplus  # noqa: F401, I001  before mlx

from scripts.bench.rival_trainers.common import Clock, Task, run, start_adapters

import time
from pathlib import Path
from typing import Any

import numpy as np
from mlx_loraplus import LoRAPlus
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.batches import Batches, trimmed
from mlx_loraplus.data.dataset import SPAN, EncodedTable
from mlx_loraplus.data.stored_rows import ROW
from mlx_loraplus.data.pairs import PairBatches, Pairs
from mlx_loraplus.data.row_problems import RowProblems
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.models.loading import load_base
from mlx_loraplus.settings import configure
from mlx_loraplus.training.compiled import should_compile
from mlx_loraplus.training.preferences import answer_log_probs
from mlx_loraplus.training.schedule import Schedule
from mlx_loraplus.training.trainer import TrainState, train as train_adapters


def train(task: Task, clock: Clock) -> None:
    """Train with this package's loop. The reference of DPO is computed before, once."""
    model, _ = load_base(Path(task.model))
    config = settings_of(task)
    trainable = attach_adapters(model, config.adapter)
    start_adapters(model, task.seed)
    optimizer = LoRAPlus(config.optimizer, task.steps)
    optimizer.init(model, trainable.groups)
    clock.start(model)

    trunk_and_head = find_trunk_and_head(model)
    batches = batches_of(task)
    if isinstance(batches, PairBatches):
        pairs, started = batches.pairs, time.perf_counter()
        for column, answers in enumerate(pairs.both):
            pairs.reference[:, column] = answer_log_probs(
                model, trunk_and_head, answers, task.batch_size
            )
        clock.reference_seconds = time.perf_counter() - started
    state = TrainState(
        model,
        trunk_and_head,
        optimizer,
        batches,
        Schedule(steps=task.steps, batches=task.steps, batches_per_step=1),
        grad_checkpoint=task.checkpoint,
        objective=config.objective,
    )
    train_adapters(
        state, [], config, report=lambda event: clock.tick(event["loss"]), save=lambda: None
    )
    made = [batches[step] for step in range(task.steps)]
    if not should_compile(config):  # as the loop does
        made = [trimmed(batch) for batch in made]
    clock.padded += [batch.tokens.size for batch in made]


def settings_of(task: Task) -> TrainConfig:
    """Return the settings under which this trainer does what the others do."""
    settings: dict[str, Any] = {
        "rank": task.rank, "alpha": task.rank * task.scale, "target_modules": tuple(task.target_names),
        "optimizer": "adam", "learning_rate": task.rate, "lr_ratio": 1.0, "schedule": "constant", "warmup": 0,
        "max_grad_norm": 0.0, "batch_size": task.batch_size, "steps_per_report": 1, "seed": task.seed,
        "objective": task.objective,
    }  # fmt: skip
    return configure(TrainConfig, settings)


def batches_of(task: Task) -> Batches:
    """Return the task's rows in batches."""
    if task.objective == "dpo":
        return PairBatches(pairs_of(task), task.batch_size, task.seed)
    rows = [
        Example(np.array(row["tokens"], np.int32), np.arange(len(row["tokens"])) >= row["offset"])
        for row in task.rows
    ]
    return Batches(rows, task.batch_size, task.seed)


def pairs_of(task: Task) -> Pairs:
    """Return the task's pairs as a table's table has them."""
    spans, start = np.zeros(len(task.rows), SPAN), 0
    for index, row in enumerate(task.rows):
        stop = start + len(row["tokens"])
        targets = len(row["tokens"]) - row["offset"]
        spans[index] = (index // 2, start, stop, len(row["tokens"]) - 1, targets, 0, 0)
        start = stop
    tokens = np.concatenate([np.array(row["tokens"], np.int32) for row in task.rows])
    supervised = np.concatenate(
        [np.arange(len(row["tokens"])) >= row["offset"] for row in task.rows]
    )
    rows = np.zeros(len(task.rows) // 2, ROW)
    table = EncodedTable(
        "pairs", False, tokens, supervised, rows, spans, RowProblems(), int(tokens.max())
    )
    return Pairs([table], spans.reshape(-1, 2))


if __name__ == "__main__":
    run(train, "mlx_loraplus")
