"""mlx-lm's own training, on the rows and from the adapters that ours has."""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner import trainer as stock
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_loraplus.adapters.target_modules import find_targets
from mlx_loraplus.adapters.base_layers import blocks_of
from mlx_loraplus.data.tokenize import Example
from scripts.bench.cases import SEED, TARGETS
from scripts.bench.rival_trainers.common import start_adapters

RANK, ALPHA, RATE = 8, 16.0, 1e-3


def attach_stock(model: nn.Module) -> optim.Optimizer:
    """Put mlx-lm's own LoRA layers on the modules that ours would have, from the same start; return its optimizer."""
    paths = set(find_targets(model, TARGETS, -1))
    model.freeze()
    options = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": paths}
    linear_to_lora_layers(model, len(blocks_of(model)), options)
    start_adapters(model, SEED)
    optimizer = optim.Adam(RATE, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)
    return optimizer


class _Report(TrainingCallback):
    def __init__(self, losses: list[float]):
        self.moments: list[float] = []
        self.losses = losses

    def on_train_loss_report(self, train_info: dict) -> None:
        self.moments.append(time.perf_counter())
        self.losses.append(train_info["train_loss"])


class _Rows:
    """Rows as mlx_lm.lora's data sets hold them: dictionaries, processed on demand into (tokens, offset)."""

    def __init__(self, examples: list[Example]):
        self.rows = [{"tokens": e.tokens.tolist(), "offset": _offset(e)} for e in examples]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]

    def process(self, row: dict) -> tuple[list[int], int]:
        return row["tokens"], row["offset"]


def _offset(example: Example) -> int:
    """Return where a row's supervised part begins; stock knows rows supervised from there to their end only."""
    first = int(np.flatnonzero(example.supervised)[0])
    if not example.supervised[first:].all():
        raise ValueError(
            f"{example.place} is not supervised from {first} to its end, which stock can't do"
        )
    return first


def run_stock(
    model: nn.Module,
    optimizer: optim.Optimizer,
    examples: list[Example],
    batch_size: int,
    updates: int,
    losses: list[float],
    batches: Callable[..., Iterator] = stock.iterate_batches,
) -> list[float]:
    """Call mlx-lm's train(); append each update's loss to ``losses`` and return the moments of the reports."""
    report = _Report(losses)
    with tempfile.TemporaryDirectory() as folder:
        arguments = stock.TrainingArgs(
            batch_size=batch_size,
            iters=updates,
            steps_per_report=1,
            steps_per_save=updates + 1,
            max_seq_length=2048,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        rows: Any = CacheDataset(_Rows(examples))
        stock.train(
            model,
            optimizer,
            rows,
            args=arguments,
            iterate_batches=batches,
            training_callback=report,
        )
    return report.moments
