"""One repetition, in a process of its own: ``python -m scripts.bench.trainers CASE TRAINER UPDATES [DATA]``.

It prints one JSON line. Both trainers start from the same adapters and train on the same rows with
Adam at one constant rate (lambda = 1). The first batch is trained on twice and its first time is
not measured: MLX allocates, and stock compiles, in it. So what is timed is one epoch over the same
rows on both sides, from one update's report to the next.
"""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS (both trainers profit)

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner import trainer as stock

from mlx_loraplus import LoRAPlus
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.batches import Batch, Batches
from mlx_loraplus.data.packing import PackedBatches
from mlx_loraplus.kernels.cross_entropy import head_loss, make_loss
from mlx_loraplus.kernels.trunk_and_head import TrunkAndHead, find_trunk_and_head
from mlx_loraplus.settings import configure
from mlx_loraplus.training.make_batches import make_batches
from mlx_loraplus.data.batches import arrays_of
from mlx_loraplus.training.schedule import Schedule
from mlx_loraplus.training.trainer import TrainState, train
from mlx_loraplus.training.validation import score
from scripts.bench.cases import (
    CASES,
    SEED,
    TARGETS,
    Sizes,
    Task,
    prepare,
    sizes_of,
)  # isort: skip  before mlx
from scripts.bench.rival_trainers.common import start_adapters
from scripts.bench.stock import ALPHA, RANK, RATE, attach_stock, run_stock

PACKED = 4  # a packed row may be this many times as long as the longest example
MATMUL = 2048  # side of the matrices that this machine's rate is taken from


@dataclass
class Measured:
    """What one repetition gives; all but ``losses`` leaves the untimed first update out."""

    trainer: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    useful_tokens: int = 0
    supervised_tokens: int = 0
    supervised_pads: int = 0
    padded_tokens: int = 0
    shapes: list[list[int]] = field(default_factory=list)
    flops: float = 0.0
    base_bytes: int = 0
    peak_bytes: int = 0
    held_out_loss: float = math.nan
    matmul_flops_per_second: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)

    def add_batch(
        self, shape: list[int], useful: int, supervised: int, pads: int, flops: float
    ) -> None:
        """Count a timed batch; ``shape`` starts with its rows and length."""
        self.shapes.append(shape)
        self.padded_tokens += shape[0] * shape[1]
        self.useful_tokens += useful
        self.supervised_tokens += supervised
        self.supervised_pads += pads
        self.flops += flops

    def timed(self, moments: list[float]) -> None:
        """Keep the seconds between the updates' reports, which leaves the first update out."""
        self.seconds = [after - before for before, after in pairwise(moments)]


def measure(trainer: str, task: Task, updates: int) -> Measured:
    """Train the task's model with one trainer and measure it; the model is changed."""
    sizes = sizes_of(task.model)
    measured = (
        measure_stock(task, sizes, updates)
        if trainer == "stock"
        else measure_ours(trainer, task, sizes)
    )
    measured.matmul_flops_per_second = matmul_rate()
    return measured


class _FirstTwice(Batches):
    """Other batches, the first one twice."""

    def __init__(self, batches: Batches):
        super().__init__(batches.examples, batches.batch_size, batches.seed)
        self.per_epoch = batches.per_epoch
        self._batches = batches

    def rows_of(self, index: int) -> list[np.ndarray]:
        return self._batches.rows_of(max(index - 1, 0))

    def collate(self, rows: Sequence[np.ndarray]) -> Batch:
        return self._batches.collate(rows)


def measure_ours(trainer: str, task: Task, sizes: Sizes) -> Measured:
    """Train one epoch with this package's loop: ``ours``, ``ours+checkpoint``, ``ours+pack``.

    The packed rows' examples are the same; how many updates they make is their own.
    """
    model, measured, checkpoint = task.model, Measured(trainer), "checkpoint" in trainer
    config = packed_config(task) if "pack" in trainer else our_config(task.batch_size)
    trainable = attach_adapters(model, config.adapter)
    start_adapters(model, SEED)
    trunk_and_head = find_trunk_and_head(model)
    batches = make_batches(model, task.examples, config, lambda _: None)
    updates = batches.per_epoch
    optimizer = LoRAPlus(config.optimizer, updates + 1)
    optimizer.init(model, trainable.groups)
    mx.eval(model.parameters(), optimizer.state)
    measured.base_bytes = settled_memory()
    moments: list[float] = []

    def report(event: dict) -> None:
        moments.append(time.perf_counter())
        measured.losses.append(event["loss"])

    length = Schedule(steps=updates + 1, batches=updates + 1, batches_per_step=1)
    rows = _FirstTwice(batches)
    state = TrainState(model, trunk_and_head, optimizer, rows, length, grad_checkpoint=checkpoint)
    train(state, [], config, report=report, save=lambda: None)
    measured.peak_bytes = mx.get_peak_memory()
    measured.timed(moments)
    timed = [batches[n] for n in range(updates)]
    for batch in timed:
        rows, width = batch.tokens.shape
        flops = sizes.step_flops(RANK, rows, width, batch.targets.size, grad_checkpoint=checkpoint)
        measured.add_batch(
            [rows, width, batch.targets.size], batch.token_count, batch.target_count, 0, flops
        )
    measured.held_out_loss = score(model, trunk_and_head, task.held_out, task.batch_size).loss
    if (
        trainer == "ours" and trunk_and_head is not None
    ):  # last, since it updates the model once more
        typical = sorted(timed, key=lambda batch: batch.tokens.size)[len(timed) // 2]
        measured.phases = phases(model, trunk_and_head, optimizer, typical)
    return measured


def our_config(batch_size: int, **settings: Any) -> TrainConfig:
    """Return the settings under which both trainers do the same, with those given."""
    same = {
        "rank": RANK, "alpha": ALPHA, "target_modules": TARGETS, "optimizer": "adam", "learning_rate": RATE,
        "lr_ratio": 1.0, "schedule": "constant", "warmup": 0, "max_grad_norm": 0.0, "batch_size": batch_size,
        "steps_per_report": 1, "seed": SEED, "compile": "on",  # as stock always does
    }  # fmt: skip
    return configure(TrainConfig, same | settings)


def packed_config(task: Task) -> TrainConfig:
    """Return the settings for packed rows, of which a batch holds the tokens of the largest batch without packing."""
    longest = max(len(example.tokens) for example in task.examples)
    length = PackedBatches(task.examples, 1, SEED, PACKED * longest).row_length
    return our_config(max(1, task.batch_size * longest // length), pack=True, max_seq_length=length)


def measure_stock(task: Task, sizes: Sizes, updates: int) -> Measured:
    """Train with mlx_lm.tuner.trainer.train as mlx_lm.lora calls it, on the rows' tokens as we encoded them.

    Its own completion rows need a chat template, which Gemma's base model does not have.
    """
    measured = Measured("stock")

    def counted(**options: Any) -> Iterator[tuple[mx.array, mx.array]]:
        source = stock.iterate_batches(**options)
        first = next(source)
        yield first
        for batch, spans in chain([first], source):
            count_stock_batch(measured, sizes, batch.shape, np.array(spans))
            yield batch, spans

    np.random.seed(SEED)  # what iterate_batches draws from  # noqa: NPY002
    model = task.model
    optimizer = attach_stock(model)
    measured.base_bytes = settled_memory()
    mx.reset_peak_memory()
    moments = run_stock(
        model, optimizer, task.examples, task.batch_size, updates + 1, measured.losses, counted
    )
    measured.peak_bytes = mx.get_peak_memory()
    measured.timed(moments)
    measured.held_out_loss = score(
        model, find_trunk_and_head(model), task.held_out, task.batch_size
    ).loss
    return measured


def count_stock_batch(
    measured: Measured, sizes: Sizes, shape: tuple[int, ...], spans: np.ndarray
) -> None:
    """Count what default_loss makes of a batch: its mask, which includes one pad a row, and all logits.

    Args:
        measured: Where to add it.
        sizes: The model's.
        shape: (rows, length + 1).
        spans: (rows, 2), each row's offset and length.
    """
    rows, length = shape[0], shape[1] - 1
    steps = np.arange(1, length + 1)
    mask = (steps >= spans[:, :1]) & (steps <= spans[:, 1:])  # (rows, length)
    pads = int(
        (mask & (steps >= spans[:, 1:])).sum()
    )  # the target at step s is token s, and tokens end before spans[1]
    useful = int((spans[:, 1] - 1).sum())  # the row's last token predicts nothing
    flops = sizes.step_flops(RANK, rows, length, rows * length, grad_checkpoint=False)
    measured.add_batch([rows, length], useful, int(mask.sum()) - pads, pads, flops)


def settled_memory() -> int:
    """Return the bytes in use once all work is finished."""
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


def matmul_rate() -> float:
    """Return the FLOP/s of the best of five large float32 matrix products."""
    a, b = mx.random.normal((MATMUL, MATMUL)), mx.random.normal((MATMUL, MATMUL))
    mx.eval(a, b)
    return 2 * MATMUL**3 / min(seconds(lambda: a @ b) for _ in range(5))


def seconds(work: Callable[[], Any]) -> float:
    """Return the wall time of ``work`` and of evaluating what it returns."""
    started = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - started


def phases(
    model: nn.Module, trunk_and_head: TrunkAndHead, optimizer: LoRAPlus, batch: Batch
) -> dict[str, float]:
    """Return the seconds of each part of an uncompiled step, each measured separately on one batch.

    ``head_loss`` includes the gradient of the hidden states, which is computed with it.
    ``backward`` is the time of loss and gradients minus the other two.
    """
    model.train()
    arrays = arrays_of(batch)
    tokens, positions, targets, weights = arrays
    hidden = trunk_and_head.trunk(tokens).flatten(0, 1)[positions]  # (targets, hidden)
    learn = nn.value_and_grad(model, make_loss(trunk_and_head))
    gradients = learn(model, *arrays)[1]
    mx.eval(hidden, gradients)
    head = mx.value_and_grad(
        lambda hidden: head_loss(trunk_and_head.head, hidden, targets, weights)
    )

    def update() -> Any:
        optimizer.update(model, gradients)
        return model.trainable_parameters(), optimizer.state

    trunk_forward = seconds(lambda: trunk_and_head.trunk(tokens))
    head_and_loss = seconds(lambda: head(hidden))
    both = seconds(lambda: learn(model, *arrays))
    return {
        "trunk_forward": trunk_forward,
        "head_loss": head_and_loss,
        "backward": both - trunk_forward - head_and_loss,
        "optimizer": seconds(update),
    }


def measure_parity(task: Task, updates: int) -> dict[str, list[float]]:
    """Train twice from one start on our batches: by our loop, and by stock's train() with its own default_loss.

    default_loss supervises the steps from one number to another in each row. It is stock's
    unchanged; only the batches are ours, and the second number is the row's last real token, so
    that no pad is supervised. Then both see the same tokens, and the two curves may differ by
    rounding only.

    Returns:
        ``ours`` and ``stock``: the loss of each update.
    """
    model, curves = task.model, {"ours": [], "stock": []}
    batches = Batches(task.examples, task.batch_size, SEED)
    base = model.leaf_modules()

    def our_batches(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for index in range(updates):
            yield stock_batch(batches[index])

    optimizer = attach_stock(model)
    run_stock(
        model, optimizer, task.examples, task.batch_size, updates, curves["stock"], our_batches
    )
    model.update_modules(base)

    config = our_config(task.batch_size)
    trainable = attach_adapters(model, config.adapter)
    start_adapters(model, SEED)
    ours = LoRAPlus(config.optimizer, updates)
    ours.init(model, trainable.groups)
    length = Schedule(steps=updates, batches=updates, batches_per_step=1)
    trunk_and_head = find_trunk_and_head(model)
    state = TrainState(model, trunk_and_head, ours, batches, length)
    train(
        state,
        [],
        config,
        report=lambda event: curves["ours"].append(event["loss"]),
        save=lambda: None,
    )
    return curves


def stock_batch(batch: Batch) -> tuple[mx.array, mx.array]:
    """Return one of our batches as default_loss takes it: (rows, length + 1) and each row's first and last step."""
    rows, length = batch.tokens.shape
    tokens = np.zeros((rows, length + 1), np.int32)
    tokens[:, :length] = batch.tokens
    positions = batch.positions[: batch.target_count]
    row, step = positions // length, positions % length + 1
    tokens[row, step] = batch.targets[: batch.target_count]
    spans = [(step[row == r].min(), step[row == r].max()) for r in range(rows)]
    if sum(last - first + 1 for first, last in spans) != batch.target_count:
        raise ValueError("a row is supervised in several places, which stock can't do")
    return mx.array(tokens), mx.array(np.array(spans, np.int32))


def main() -> None:
    """Run one repetition, as the arguments say, and print it as one JSON line."""
    name, trainer, updates, *data = sys.argv[1:]
    case, count = CASES[name], int(updates)
    task = prepare(case, data[0] if data else None, count)
    if trainer == "parity":
        result: dict[str, Any] = dict(measure_parity(task, count))
    else:
        result = vars(measure(trainer, task, count))
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
