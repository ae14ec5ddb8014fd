"""mlx-lm's own ``train()``, as ``mlx_lm.lora`` calls it."""

from scripts.bench.rival_trainers import fast_blas  # noqa: F401  # isort: skip  before mlx

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.optimizers as optim
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset

from scripts.bench.rival_trainers.common import Clock, Task, TokenRows, load_with_lora, run


def train(
    task: Task,
    clock: Clock,
    make_loss: Callable[[Any], Callable[..., Any]] = lambda _: trainer.default_loss,
) -> None:
    """Train with mlx-lm's loop, and a loss that may be made for the model."""
    model = load_with_lora(task)
    optimizer = optim.Adam(task.rate, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    clock.start(model)
    trainer.train(
        model,
        optimizer,
        CacheDataset(TokenRows(task.rows)),
        args=trainer.TrainingArgs(
            batch_size=task.batch_size,
            iters=task.steps,
            steps_per_report=1,
            steps_per_save=task.steps + 1,
            max_seq_length=task.max_length,
            grad_checkpoint=task.checkpoint,
            adapter_file=str(Path(task.folder) / "adapters.safetensors"),
        ),
        loss=make_loss(model),
        iterate_batches=clock.counted(trainer.iterate_batches),
        training_callback=clock,
    )


if __name__ == "__main__":
    run(train)
