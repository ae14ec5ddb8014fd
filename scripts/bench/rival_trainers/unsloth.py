"""Unsloth's MLX trainers."""

from scripts.bench.rival_trainers import fast_blas  # noqa: F401  # isort: skip  before mlx

import os
from typing import Any

# Its way to be imported without a GPU and without torch, where it finds no Metal either.
os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")

from unsloth_zoo.mlx.loader import FastMLXModel
from unsloth_zoo.mlx.trainer import MLXDPOConfig, MLXDPOTrainer, MLXTrainer, MLXTrainingConfig
from unsloth_zoo.mlx.utils import create_batches

from scripts.bench.rival_trainers.common import BETA, Clock, Task, run, start_adapters, text_pairs

IGNORED = -100  # the label of a token that is not supervised


def train(task: Task, clock: Clock) -> None:
    """Train with the trainer of the task's objective."""
    model, tokenizer = FastMLXModel.from_pretrained(
        task.model,
        max_seq_length=task.max_length,
        dtype="float32",
        load_in_4bit=False,
        text_only=True,
        random_state=task.seed,
    )
    model = FastMLXModel.get_peft_model(
        model,
        r=task.rank,
        target_modules=task.target_names,
        lora_alpha=task.rank * task.scale,
        use_gradient_checkpointing=task.checkpoint,
        random_state=task.seed,
        max_seq_length=task.max_length,
    )
    start_adapters(model, task.seed)
    clock.start(model)

    settings: dict[str, Any] = {
        "per_device_train_batch_size": task.batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": task.steps,
        "warmup_steps": 0,
        "learning_rate": task.rate,
        "lr_scheduler_type": "constant",
        "optim": "adam",
        "weight_decay": 0.0,
        "max_grad_leaf_norm": 0.0,
        "seed": task.seed,
        "output_dir": task.folder,
        "max_seq_length": task.max_length,
        "gradient_checkpointing": task.checkpoint,
        "append_eos": False,
    }
    if task.objective == "dpo":
        config = MLXDPOConfig(
            beta=BETA, max_length=task.max_length, max_prompt_length=None, **settings
        )
        trainer = MLXDPOTrainer(model, tokenizer, text_pairs(task, tokenizer), args=config)
    else:
        rows = [labeled(row) for row in task.rows]
        for batch in create_batches(
            rows, tokenizer, task.batch_size, task.max_length, task.steps, task.seed
        ):
            clock.padded.append(batch[0].shape[0] * (batch[0].shape[1] - 1))
        trainer = MLXTrainer(model, tokenizer, rows, args=MLXTrainingConfig(**settings))
    trainer.add_step_callback(lambda _step, _steps, loss, *_: clock.tick(loss))
    trainer.train()


def labeled(row: dict[str, Any]) -> dict[str, list[int]]:
    """Return a row with a label for each token."""
    tokens, offset = row["tokens"], row["offset"]
    return {"input_ids": tokens, "labels": [IGNORED] * offset + tokens[offset:]}


if __name__ == "__main__":
    run(train, "unsloth-zoo", "mlx-vlm")
