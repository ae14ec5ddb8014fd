"""Measure a preference step against a step on the same tokens without preferences.

    scripts/bench/preferences [--model smollm2-135m] [--pairs 2] [--length 256] [--steps 3] [--rounds 2]

Both steps read the same rows with the same supervised tokens: the two answers of random pairs. The
step of ``sft`` treats each answer as an example of its own. The reference is not part of a step.
kto also runs as many mismatched answers without a gradient, from which z0 is estimated; these
seconds are kept by themselves as well. For the other objectives, the targets are at most 1.1 times
the time and 1.15 times the memory of ``sft``.

Each objective runs in this process after the other, with a fresh adapter, ``--rounds`` times. The
fastest of its steps and its peak above the weights go to ``results/preferences.json``;
``scripts/readme.py`` makes the table of docs/preferences.md from it.
"""

import mlx_loraplus as ml  # isort: skip  before mlx

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import ObjectiveConfig, TrainConfig
from mlx_loraplus.data.batches import Batch, arrays_of, lay_out
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.files import write_atomically
from mlx_loraplus.kernels.choices import default_choices
from mlx_loraplus.kernels.patch import memory_efficient
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.settings import configure
from mlx_loraplus.training.compiled import Traces, should_compile
from mlx_loraplus.training.distributed import ALONE
from mlx_loraplus.training.kto import KLEstimate
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.training.objectives import make_objective
from mlx_loraplus.training.optimizer import LoRAPlus
from scripts.provenance import provenance

RESULT = Path(__file__).parent / "results" / "preferences.json"
WARM_UP = 2  # steps that are not timed; a shape is compiled when it comes for the second time

OBJECTIVES = ("sft", "dpo", "ipo", "orpo", "simpo", "kto")


@dataclass(frozen=True)
class Measured:
    """What a step takes.

    Attributes:
        seconds: Of the whole step.
        kl_seconds: Of the estimate of z0, a part of them; about 0 if the objective needs none.
        peak_bytes: The peak above the weights.
    """

    seconds: float
    kl_seconds: float
    peak_bytes: int


def random_batch(pairs: int, length: int, vocabulary: int) -> Batch:
    """Return a batch of pairs whose answers are the second half of their rows."""
    generator = np.random.default_rng(0)
    rows: list[list[Example]] = []
    for _ in range(2 * pairs):
        tokens = generator.integers(1, vocabulary, length + 1).astype(np.int32)
        rows.append([Example(tokens, np.arange(length + 1) > length // 2)])
    batch = lay_out(rows)
    return replace(batch, pairs=pairs, reference=np.zeros(2 * pairs, np.float32))


def prepare(batch: Batch, objective: ObjectiveConfig) -> Batch:
    """Return the batch as an objective needs it: pairs, labeled answers, or examples."""
    if objective.is_labeled:
        answers = 2 * batch.pairs
        labels = np.arange(answers, dtype=np.float32) % 2
        return replace(batch, pairs=answers, labels=labels, mismatched=batch)
    return batch if objective.is_paired else replace(batch, pairs=0, reference=None)


def measure(folder: str, name: str, pairs: int, length: int, steps: int) -> Measured:
    """Return what ``steps`` steps of an objective take."""
    model, _ = ml.load(folder)
    config = configure(TrainConfig, {"objective": name})
    objective = config.objective
    trainable = attach_adapters(model, config.adapter)
    trunk_and_head = find_trunk_and_head(model)
    assert trunk_and_head is not None
    optimizer = LoRAPlus(config.optimizer, steps + WARM_UP)
    optimizer.init(model, trainable.groups)

    batch = prepare(random_batch(pairs, length, trunk_and_head.head.vocabulary), objective)
    count = mx.array(float(batch.pairs or batch.target_count))
    arrays = arrays_of(batch)
    traces = Traces() if should_compile(config) else None
    model.train()
    with memory_efficient(model):
        loss = make_objective(trunk_and_head, objective)
        accumulate, update = make_step(
            model, loss, optimizer, compiled=traces is not None, traces=traces
        )
        estimate_kl = KLEstimate(model, trunk_and_head, default_choices(), objective, traces)
        mx.eval(model.parameters(), optimizer.state)
        mx.clear_cache()
        weights = mx.get_active_memory()

        found = Measured(float("inf"), float("inf"), 0)
        for number in range(steps + WARM_UP):
            if number == WARM_UP:
                mx.reset_peak_memory()
            started = time.perf_counter()
            baseline = estimate_kl([batch], ALONE)
            mx.eval(baseline)
            estimated = time.perf_counter()
            total, norm = update(*accumulate((*arrays, *baseline), None), count)
            mx.eval(model.trainable_parameters(), optimizer.state, total, norm)
            ended = time.perf_counter()
            if number >= WARM_UP:
                step = Measured(
                    ended - started, estimated - started, mx.get_peak_memory() - weights
                )
                found = best_of(found, step)
    return found


def best_of(one: Measured, other: Measured) -> Measured:
    """Return the fewest seconds of two measurements, and the higher peak."""
    return Measured(
        min(one.seconds, other.seconds),
        min(one.kl_seconds, other.kl_seconds),
        max(one.peak_bytes, other.peak_bytes),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every objective in turn, and write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-json", action="store_true", help="print the numbers alone")
    given = parser.parse_args(arguments)

    best: dict[str, Measured] = {}
    for _ in range(given.rounds):
        for name in OBJECTIVES:
            found = measure(given.model, name, given.pairs, given.length, given.steps)
            best[name] = best_of(best.get(name, found), found)
            print(name, found, flush=True)

    if not given.no_json:
        sizes = {
            key: getattr(given, key) for key in ("model", "pairs", "length", "steps", "rounds")
        }
        objectives = {name: asdict(found) for name, found in best.items()}
        result = {**provenance(), **sizes, "objectives": objectives}
        write_atomically(RESULT, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
