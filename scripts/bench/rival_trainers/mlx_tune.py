"""mlx-tune's ``SFTTrainer``, which calls mlx-lm's ``train()``, and its ``DPOTrainer``."""

from scripts.bench.rival_trainers import fast_blas  # noqa: F401  # isort: skip  before mlx

import io
import re
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.optimizers as optim
from mlx_lm.tuner.trainer import iterate_batches
from mlx_tune import (
    DPOConfig,
    DPOTrainer,
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    rl_trainers,
    sft_trainer,
)

from scripts.bench.rival_trainers.common import (
    BETA,
    Clock,
    Task,
    TokenRows,
    run,
    start_adapters,
    text_pairs,
)

STEP = re.compile(r"Step \d+/\d+ \| Loss: (\S+)")


class StepLines(io.TextIOBase):
    """Standard output, which tells the clock what DPOTrainer prints: it has no callback."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.screen = sys.stdout
        self.started = 0.0

    def write(self, text: str) -> int:
        """Print, and note what it means."""
        if found := STEP.search(text):
            self.clock.tick(float(found[1]))
        elif "Pre-computing reference" in text:
            self.started = time.perf_counter()
        elif "Reference log-probs cached" in text:
            self.clock.reference_seconds = time.perf_counter() - self.started
        return self.screen.write(text)


def train(task: Task, clock: Clock) -> None:
    """Train with the trainer of the task's objective."""
    sft_trainer.optim = rl_trainers.optim = SimpleNamespace(
        AdamW=adam, cosine_decay=lambda rate, *_, **__: rate
    )
    model, tokenizer = FastLanguageModel.from_pretrained(
        task.model, max_seq_length=task.max_length, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=task.rank,
        lora_alpha=task.rank * task.scale,
        lora_dropout=0.0,
        target_modules=task.target_names,
        use_gradient_checkpointing=task.checkpoint,
    )
    model._apply_lora()
    start_adapters(model.model, task.seed)
    clock.start(model.model)

    common: dict[str, Any] = {
        "output_dir": task.folder,
        "per_device_train_batch_size": task.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": task.rate,
        "max_steps": task.steps,
        "max_seq_length": task.max_length,
        "logging_steps": 1,
        "save_steps": task.steps + 1,
        "warmup_steps": 0,
    }
    if task.objective == "dpo":
        config = DPOConfig(beta=BETA, **common)
        trainer = DPOTrainer(model, text_pairs(task, tokenizer), tokenizer=tokenizer, args=config)
        with redirect_stdout(StepLines(clock)):
            trainer.train()
        return

    # What it calls of mlx-lm gets the rows as tokens, and a callback.
    rows = TokenRows(task.rows)
    sft_trainer.mlx_load_dataset = lambda **_: (rows, rows, rows)
    sft_trainer.mlx_train = partial(
        sft_trainer.mlx_train,
        training_callback=clock,
        iterate_batches=clock.counted(iterate_batches),
    )
    config = SFTConfig(
        lr_scheduler_type="constant",
        weight_decay=0.0,
        val_batches=0,
        grad_checkpoint=task.checkpoint,
        **common,
    )
    trainer = SFTTrainer(model, [{"text": "-"}], tokenizer=tokenizer, args=config)
    trainer._train_subprocess = stop
    trainer.train()


def adam(learning_rate: float, **_: Any) -> optim.Adam:
    """Return the optimizer of the other trainers; theirs is without bias correction and has decay."""
    return optim.Adam(learning_rate, bias_correction=True)


def stop() -> None:
    """Replace its second attempt by mlx_lm's command, which it makes when training fails."""
    raise RuntimeError("mlx-tune's training failed; its message is above")


if __name__ == "__main__":
    run(train, "mlx-tune")
