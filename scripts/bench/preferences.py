"""Measure a preference step against a step on the same tokens without preferences.

    .venv/bin/python -m scripts.bench.preferences --model FOLDER [--pairs 4] [--length 256] [--steps 5]

Both steps read the same rows with the same supervised tokens: the two answers of random pairs. The
step of ``sft`` treats each answer as an example of its own. Each objective runs in this process after
the other, with a fresh adapter; the fastest of the steps and the peak above the weights are printed.
The reference of dpo is not part of a step. kto also runs as many mismatched answers without a
gradient, so it takes about one more forward pass. For the other objectives, the targets are at most
1.1 times the time and 1.15 times the memory.
"""

import argparse
import time
from dataclasses import replace

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import numpy as np

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import ObjectiveConfig, TrainConfig
from mlx_loraplus.data.batches import Batch, arrays_of, lay_out
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.kernels.patch import memory_efficient
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.settings import configure
from mlx_loraplus.training.compiled import should_compile
from mlx_loraplus.training.kto import make_kl_sum
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.training.objectives import make_objective
from mlx_loraplus.training.optimizer import LoRAPlus

OBJECTIVES = ("sft", "dpo", "ipo", "orpo", "simpo", "kto")


def random_batch(pairs: int, length: int, vocabulary: int) -> Batch:
    """Return a batch of pairs whose answers are the second half of their rows."""
    generator = np.random.default_rng(0)
    rows: list[list[Example]] = []
    for _ in range(2 * pairs):
        tokens = generator.integers(1, vocabulary, length + 1).astype(np.int32)
        rows.append([Example(tokens, np.arange(length + 1) > length // 2)])
    batch = lay_out(rows)
    return replace(batch, pairs=pairs, reference=np.zeros(2 * pairs, np.float32))


def measure(folder: str, name: str, pairs: int, length: int, steps: int) -> tuple[float, int]:
    """Return the seconds of the fastest step and the bytes at the peak above the weights."""
    model, _ = ml.load(folder)
    trainable = attach_adapters(model, configure(TrainConfig, {}).adapter)
    trunk_and_head = find_trunk_and_head(model)
    assert trunk_and_head is not None
    config = configure(TrainConfig, {"objective": name})
    optimizer = LoRAPlus(config.optimizer, steps + 2)
    optimizer.init(model, trainable.groups)
    objective: ObjectiveConfig = config.objective
    batch = random_batch(pairs, length, trunk_and_head.head.vocabulary)
    if not objective.has_preferences:
        batch = replace(batch, pairs=0, reference=None)
    kl_arrays = arrays_of(batch)
    if objective.is_labeled:
        labels = np.arange(2 * pairs, dtype=np.float32) % 2
        batch = replace(batch, pairs=2 * pairs, labels=labels)

    count = mx.array(float(batch.pairs or batch.target_count))
    arrays = arrays_of(batch)
    model.train()
    with memory_efficient(model):
        loss = make_objective(trunk_and_head, objective)
        accumulate, update = make_step(model, loss, optimizer, compiled=should_compile(config))
        kl_sum = make_kl_sum(trunk_and_head)
        mx.eval(model.parameters(), optimizer.state)
        mx.clear_cache()
        weights = mx.get_active_memory()
        seconds: list[float] = []
        for number in range(steps + 2):
            if number == 2:
                mx.reset_peak_memory()
            started = time.perf_counter()
            baseline = (kl_sum(model, *kl_arrays) / count,) if objective.is_labeled else ()
            total, norm = update(*accumulate((*arrays, *baseline), None), count)
            mx.eval(model.trainable_parameters(), optimizer.state, total, norm)
            seconds.append(time.perf_counter() - started)
    return min(seconds[2:]), mx.get_peak_memory() - weights


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()

    plain_time, plain_memory = 0.0, 0
    print("| objective | s/step | against sft | MB above the weights | against sft |")
    print("|---|--:|--:|--:|--:|")
    for name in OBJECTIVES:
        taken, memory = measure(given.model, name, given.pairs, given.length, given.steps)
        if name == "sft":
            plain_time, plain_memory = taken, memory
        ratios = taken / plain_time, memory / plain_memory
        print(f"| {name} | {taken:.3f} | {ratios[0]:.2f} | {memory / 1e6:.1f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
