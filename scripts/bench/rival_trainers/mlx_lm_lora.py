"""mlx-lm-lora's ``train_sft`` and ``train_dpo``."""

from scripts.bench.rival_trainers import fast_blas  # noqa: F401  # isort: skip  before mlx

from pathlib import Path
from typing import Any

import mlx.optimizers as optim
from mlx_lm.utils import load_model
from mlx_lm_lora.trainer import dpo_trainer, sft_trainer
from mlx_lm_lora.trainer.datasets import CacheDataset

from scripts.bench.rival_trainers.common import (
    BETA,
    Clock,
    Task,
    TokenRows,
    allow_any_device,
    load_with_lora,
    run,
)


def train(task: Task, clock: Clock) -> None:
    """Train with the loop of the task's objective.

    Each update asks for the first batch of a new shuffle, so some rows come again before others
    come at all. Here it gets the batches of one shuffle after the other.
    """
    allow_any_device()
    model = load_with_lora(task)
    optimizer = optim.Adam(task.rate, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    common = {
        "batch_size": task.batch_size,
        "iters": task.steps,
        "steps_per_report": 1,
        "steps_per_save": task.steps + 1,
        "max_seq_length": task.max_length,
        "grad_checkpoint": task.checkpoint,
        "adapter_file": str(Path(task.folder) / "adapters.safetensors"),
    }
    if task.objective == "dpo":
        reference, _ = load_model(Path(task.model))
        dpo_trainer.iterate_dpo_batches = clock.counted(dpo_trainer.iterate_dpo_batches, 2)
        clock.start(model)
        dpo_trainer.train_dpo(
            model,
            reference.freeze(),
            optimizer,
            pairs_of(task),
            args=dpo_trainer.DPOTrainingArgs(beta=BETA, **common),
            training_callback=clock,
        )
        return

    clock.start(model)
    sft_trainer.train_sft(
        model,
        optimizer,
        CacheDataset(TokenRows(task.rows)),
        args=sft_trainer.SFTTrainingArgs(**common),
        iterate_batches=clock.counted(sft_trainer.iterate_batches),
        training_callback=clock,
    )


def pairs_of(task: Task) -> list[dict[str, Any]]:
    """Return the pairs as its data set for DPO has them."""
    both = zip(task.rows[::2], task.rows[1::2], strict=True)
    return [
        {
            "chosen": chosen["tokens"],
            "rejected": rejected["tokens"],
            "chosen_prompt_length": chosen["offset"],
            "rejected_prompt_length": rejected["offset"],
        }
        for chosen, rejected in both
    ]


if __name__ == "__main__":
    run(train, "mlx-lm-lora")
