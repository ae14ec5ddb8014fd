"""Compare the training of all weights with mlx_lm's, and measure what bfloat16 weights lose.

    scripts/bench/full [--updates 6] [--steps 24]

1. ``float32`` and ``bfloat16``: SmolLM2 135M, the weights of all blocks, Adam at one rate, the same
   batches. mlx_lm trains as ``mlx_lm.lora --fine-tune-type full`` does. The losses of each update,
   the seconds and the peak are compared. Each repetition is a process of its own; its first update
   is not timed. In bfloat16, a CPU computes slowly, so batches are small there.
2. ``rounding``: the same run three times with every weight, and the arithmetic in float32. Only the
   weights are kept in float32, in bfloat16, or in bfloat16 with compensation. So the difference is
   what rounding the weights loses.

The results go to ``results/full.json``; ``scripts/readme.py`` makes the table of docs/full.md from it.
"""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS (both trainers profit)

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_loraplus import LoRAPlus
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.base_layers import blocks_of
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.batches import Batches
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.settings import configure
from mlx_loraplus.training.compensation import narrowed, widened
from mlx_loraplus.training.schedule import Schedule
from mlx_loraplus.training.validation import score
from mlx_loraplus.training.trainer import TrainState, train
from scripts.bench.cases import SEED, Case, Task, prepare
from scripts.bench.trainers import run_stock, settled_memory, stock_batch
from scripts.provenance import provenance

RATE = 1e-5
BATCH = {"float32": 8, "bfloat16": 1}
UPDATES = {"float32": 6, "bfloat16": 2}
TYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
KEPT = ("float32", "bfloat16", "bfloat16 with compensation")
MODEL = "smollm2-135m"
RESULT = Path(__file__).parent / "results" / "full.json"


@dataclass
class Repetition:
    """What one process measures; the first update is not timed."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    base_bytes: int = 0
    peak_bytes: int = 0


def task_of(dtype: str, updates: int) -> Task:
    """Return SmolLM2 and its rows."""
    case = Case("SmolLM2 135M, completions", MODEL, "completion", BATCH[dtype], updates, ())
    task = prepare(case, None, updates)
    task.model.set_dtype(TYPES[dtype])
    return task


def settings_of_bench(batch_size: int, **more: Any) -> TrainConfig:
    """Return the settings under which both trainers do the same."""
    same = {
        "adapter": "full", "optimizer": "adam", "learning_rate": RATE, "schedule": "constant", "warmup": 0,
        "max_grad_norm": 0.0, "batch_size": batch_size, "steps_per_report": 1, "seed": SEED, "compile": "on",
    }  # fmt: skip
    return configure(TrainConfig, same | more)


def measure_ours(dtype: str, updates: int) -> Repetition:
    """Train the blocks' weights with this package."""
    task, found = task_of(dtype, updates), Repetition()
    model = task.model
    blocks = len(blocks_of(model))
    config = settings_of_bench(task.batch_size, num_layers=blocks)
    trainable = attach_adapters(model, config.adapter)
    optimizer = LoRAPlus(config.optimizer, updates)
    optimizer.init(model, trainable.groups)
    trunk_and_head = find_trunk_and_head(model)
    mx.eval(model.parameters(), optimizer.state)
    found.base_bytes = settled_memory()
    batches = Batches(task.examples, task.batch_size, SEED)

    def report(event: dict[str, Any]) -> None:
        found.losses.append(event["loss"])
        found.seconds.append(event["seconds"])

    length = Schedule(steps=updates, batches=updates, batches_per_step=1)
    state = TrainState(model, trunk_and_head, optimizer, batches, length)
    train(state, [], config, report=report, save=lambda: None)
    found.peak_bytes = mx.get_peak_memory()
    found.seconds = found.seconds[1:]
    return found


def measure_stock(dtype: str, updates: int) -> Repetition:
    """Train them with mlx_lm, whose ``train_model`` unfreezes the last ``num_layers`` blocks."""
    task, found = task_of(dtype, updates), Repetition()
    model = task.model
    model.freeze()
    for block in blocks_of(model):
        block.unfreeze()
    optimizer = optim.Adam(RATE, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)
    found.base_bytes = settled_memory()
    batches = Batches(task.examples, task.batch_size, SEED)

    def our_batches(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for index in range(updates):
            yield stock_batch(batches[index])

    mx.reset_peak_memory()
    moments = run_stock(
        model, optimizer, task.examples, task.batch_size, updates, found.losses, our_batches
    )
    found.peak_bytes = mx.get_peak_memory()
    found.seconds = [after - before for before, after in pairwise(moments)]
    return found


class RoundingLoRAPlus(LoRAPlus):
    """LoRA+'s optimizer for float32 arrays that only hold numbers that bfloat16 has.

    Args:
        config: As for LoRAPlus.
        total_steps: As for LoRAPlus.
        compensate: Whether to keep what rounding loses.
    """

    def __init__(self, config: Any, total_steps: int, *, compensate: bool):
        super().__init__(config, total_steps)
        self.compensate = compensate
        self.lost: dict[str, mx.array] = {}

    def update(
        self, model: nn.Module, gradients: dict[str, Any], usable: mx.array | None = None
    ) -> mx.array:
        """Step from the exact weights, then round them."""
        before: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
        exact = [
            (name, widened(array.astype(mx.bfloat16), self.lost.get(name)).astype(mx.float32))
            for name, array in before.items()
        ]
        model.load_weights(exact, strict=False)
        norm = super().update(model, gradients, usable)

        after: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
        rounded: list[tuple[str, mx.array]] = []
        for name, array in after.items():
            weight, lost = narrowed(array, mx.bfloat16)
            rounded.append((name, weight.astype(mx.float32)))
            if self.compensate:
                self.lost[name] = lost
        model.load_weights(rounded, strict=False)
        mx.eval(model.parameters(), self.lost)
        return norm


def measure_rounding(kept: str, steps: int) -> list[float]:
    """Return the held-out loss before and after ``steps`` steps, with the weights kept in a type."""
    task = task_of("float32", -(-steps // 2))
    model, size = task.model, task.batch_size // 2

    # All start from the same numbers, which bfloat16 has.
    model.set_dtype(mx.bfloat16)
    model.set_dtype(mx.float32)
    config = settings_of_bench(size, compile="off")
    trainable = attach_adapters(model, config.adapter)
    optimizer = LoRAPlus(config.optimizer, steps)
    if kept != "float32":
        compensate = kept.endswith("compensation")
        optimizer = RoundingLoRAPlus(config.optimizer, steps, compensate=compensate)
    optimizer.init(model, trainable.groups)
    trunk_and_head = find_trunk_and_head(model)
    before = score(model, trunk_and_head, task.held_out, 8).loss

    length = Schedule(steps=steps, batches=steps, batches_per_step=1)
    state = TrainState(model, trunk_and_head, optimizer, Batches(task.examples, size, SEED), length)
    train(state, [], config, report=lambda _: None, save=lambda: None)
    return [before, score(model, trunk_and_head, task.held_out, 8).loss]


def measured(part: str, kind: str, count: int) -> Any:
    """Return what one process measures."""
    words = ["--one", part, kind, "--count", str(count)]
    command = [sys.executable, "-m", "scripts.bench.full", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(part, kind, found, flush=True)
    return found


def difference(both: dict[str, Any]) -> float:
    """Return the largest difference of the losses of an update, relative to mlx_lm's."""
    pairs = zip(both["stock"]["losses"], both["ours"]["losses"], strict=True)
    return max(abs(ours - theirs) / theirs for theirs, ours in pairs)


def main() -> None:
    """Measure, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--one", nargs=2, metavar=("PART", "KIND"), help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()

    # One measurement, in a process of its own.
    if given.one:
        part, kind = given.one
        if part == "rounding":
            print(json.dumps(measure_rounding(kind, given.count)))
        else:
            measure = measure_ours if part == "ours" else measure_stock
            print(json.dumps(asdict(measure(kind, given.count))))
        return

    # All of them.
    training: dict[str, Any] = {}
    for dtype, usual in UPDATES.items():
        count = given.updates or usual
        training[dtype] = {"rows": BATCH[dtype]}
        for trainer in ("stock", "ours"):
            training[dtype][trainer] = measured(trainer, dtype, count)
        off = difference(training[dtype])
        print(f"{dtype}: losses differ by up to {off:.1e}", flush=True)
    rounding = {kept: measured("rounding", kept, given.steps) for kept in KEPT}

    result = {
        **provenance(),
        "model": MODEL,
        "rate": RATE,
        "training": training,
        "steps": given.steps,
        "rounding": rounding,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{RESULT} is written; scripts/readme.py writes the table of docs/full.md")


if __name__ == "__main__":
    main()
