"""The cost curve: time and memory of our step against length, batch, rank and vocabulary, on small random Llamas.

Each sweep changes one number and holds the others at ``BASE``; every token is supervised. A point
is the best of up to three steps after a first one that is not measured, and MLX's peak memory in
them above the weights. A sweep's exponent is the slope of log cost against log size: over all of
it, and over its upper half, where fixed costs weigh less.
"""

from scripts.bench.cases import SEED, sizes_of, small_llama  # isort: skip  before mlx

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure

from mlx_loraplus import LoRAPlus
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig, OptimizerConfig
from mlx_loraplus.data.batches import arrays_of, one_per_row
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.files import write_atomically
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.patch import memory_efficient
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.training.make_step import make_step
from scripts.bench.trainers import seconds, settled_memory

MODEL = {"hidden": 256, "layers": 4}
BASE = {"length": 512, "batch": 1, "rank": 8, "vocabulary": 8192}
SWEEPS = {
    "length": (128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16),
    "rank": (2, 4, 8, 16, 32, 64),
    "vocabulary": (2048, 8192, 32768, 131072, 262144),
}
ENOUGH = 4.0  # seconds of measured steps after which a point is not repeated


def write_curve(folder: Path, provenance: dict[str, Any]) -> None:
    """Measure all sweeps; write ``curve.json`` and ``curve.png`` and print the exponents."""
    sweeps = {name: measure_sweep(name, sizes) for name, sizes in SWEEPS.items()}
    result = {"case": "curve", "model": MODEL, "base": BASE, **provenance, "sweeps": sweeps}
    write_atomically(folder / "curve.json", (json.dumps(result, indent=1) + "\n").encode())
    draw(sweeps, folder / "curve.png")


def measure_sweep(name: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Measure one sweep and fit its exponents."""
    points = []
    for size in sizes:
        point = measure_point(**{**BASE, name: size})
        points.append({name: size, **point})
        print(
            f"{name} {size:>7,}: {point['seconds']:8.3f} s,"
            f" {point['peak_above_weights'] / 1e6:8.1f} MB",
            flush=True,
        )
    exponents = {}
    for cost in ("seconds", "peak_above_weights"):
        values = [point[cost] for point in points]
        half = len(sizes) // 2
        exponents[cost] = {
            "all": exponent(sizes, values),
            "upper_half": exponent(sizes[half:], values[half:]),
        }
        print(
            f"{name}: {cost} ~ {name}^{exponents[cost]['all']:.2f}, upper half"
            f" ^{exponents[cost]['upper_half']:.2f}"
        )
    return {"points": points, "exponents": exponents}


def measure_point(*, length: int, batch: int, rank: int, vocabulary: int) -> dict[str, float]:
    """Measure the step of one model and batch: seconds, peak bytes above the weights, matmul FLOPs."""
    model = small_llama(vocabulary=vocabulary, **MODEL)
    sizes = sizes_of(model)
    trainable = attach_adapters(model, AdapterConfig(rank=rank))
    trunk_and_head = find_trunk_and_head(model)
    optimizer = LoRAPlus(OptimizerConfig(), total_steps=100)
    optimizer.init(model, trainable.groups)
    accumulate, learn = make_step(model, make_loss(trunk_and_head), optimizer, compiled=False)
    made = one_per_row(random_rows(batch, length, vocabulary))
    arrays, tokens = arrays_of(made), mx.array(float(made.target_count))
    model.train()

    def update() -> Any:
        return (
            *learn(*accumulate(arrays, None), tokens),
            model.trainable_parameters(),
            optimizer.state,
        )

    mx.eval(model.parameters(), optimizer.state, arrays)
    before = settled_memory()
    mx.reset_peak_memory()
    measured = []
    with memory_efficient(model):
        seconds(update)
        while len(measured) < 3 and sum(measured) < ENOUGH:
            measured.append(seconds(update))
    rows, padded = made.tokens.shape
    flops = sizes.step_flops(rank, rows, padded, made.targets.size, grad_checkpoint=False)
    return {
        "seconds": min(measured),
        "peak_above_weights": mx.get_peak_memory() - before,
        "matmul_flops": flops,
    }


def random_rows(rows: int, length: int, vocabulary: int) -> list[Example]:
    """Return rows with ``length`` inputs of random tokens, all supervised."""
    generator = np.random.default_rng(SEED)
    supervised = np.arange(length + 1) > 0
    return [
        Example(
            generator.integers(0, vocabulary, length + 1).astype(np.int32), supervised, "random"
        )
        for _ in range(rows)
    ]


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Return the slope of log cost against log size, by least squares."""
    return float(
        np.polyfit([math.log(size) for size in sizes], [math.log(cost) for cost in costs], 1)[0]
    )


def draw(sweeps: dict[str, Any], file: Path) -> None:
    """Draw all sweeps, doubly logarithmic and to one scale, time above memory."""
    figure = Figure(figsize=(3.2 * len(sweeps), 5.5), layout="constrained")
    axes = figure.subplots(2, len(sweeps), squeeze=False, sharex="col", sharey="row")
    costs = (
        ("seconds", "seconds a step", 1.0),
        ("peak_above_weights", "peak MB above the weights", 1e6),
    )
    for column, (name, sweep) in enumerate(sweeps.items()):
        sizes = [point[name] for point in sweep["points"]]
        for row, (cost, label, unit) in enumerate(costs):
            axis, slope = axes[row][column], sweep["exponents"][cost]
            axis.loglog(sizes, [point[cost] / unit for point in sweep["points"]], "o-")
            axis.set_title(
                f"exponent {slope['all']:.2f}, upper half {slope['upper_half']:.2f}", fontsize=9
            )
            axis.set_xticks(
                sizes, [f"{size // 1024}k" if size >= 10_000 else str(size) for size in sizes]
            )
            axis.minorticks_off()
            axis.grid(visible=True, alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
            if row == 1:
                axis.set_xlabel(name)
    figure.savefig(file, dpi=110)
