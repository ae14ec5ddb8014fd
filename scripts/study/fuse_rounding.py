"""How much of a small change survives a fuse at 3 to 8 bits, by how the fused weight is rounded.

    scripts/study/fuse_rounding [--blocks 2] [--updates 16]

A LoRA is trained on SmolLM2 135M's last blocks, on the demo set; each layer's change is then scaled
to a given share of its weight's norm. The base is quantized first, as a user's is: W is on the grid
of its width. What is compared:

- ``drop``: the base without the adapter.
- ``stock``: W + D in bfloat16, quantized by MLX, as stock fuses.
- ``gptq``: ``mlx_loraplus.export.gptq`` on the base's scales, by the layer's inputs for training
  rows.

Scales are bfloat16; all else is float32. Outputs' cosine, loss and KL(base + adapter || fused) are
over rows that nothing else has seen; KL elsewhere is that over the README's prose, which has
nothing to do with what was trained. Every row is kept when it is measured, in
results/rounding.json, and not measured again; scripts/readme.py makes the table in docs/fuse.md of them.
"""

import mlx_loraplus  # noqa: F401, I001  before mlx: it gives MLX a fast BLAS

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_loraplus import LoRAPlus, load
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.settings import configure
from mlx_loraplus.data.batches import Batches, in_order
from mlx_loraplus.data.load_data import load_data
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.export.fuse_quality import LayerChange, gather_inputs
from mlx_loraplus.export.gptq import inverse_factors, quantize
from mlx_loraplus.files import write_atomically
from mlx_loraplus.kernels.patch import memory_efficient
from mlx_loraplus.data.batches import arrays_of
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head

from scripts.provenance import provenance

MODEL, GROUP, BITS, RATIOS = "smollm2-135m", 64, (4, 3, 8, 6), (0.003, 0.01, 0.03, 0.1)
METHODS = ("drop", "stock", "gptq")
OUT = Path(__file__).parent / "results" / "rounding.json"
Layers = dict[str, mx.array]


def main() -> None:
    """Train, scale, round, compare, and keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--updates", type=int, default=16)
    chosen = parser.parse_args()
    config = configure(
        TrainConfig, {"num_layers": chosen.blocks, "iters": chosen.updates, "learning_rate": 5e-4}
    )
    model, tokenizer = load(MODEL)
    data = load_data(config, tokenizer, "train", "valid").examples
    train(model, data["train"], config)
    inputs, unseen = (
        gather_inputs(model, data["train"].take(np.arange(100, 130))),
        gather_inputs(model, data["valid"]),
    )
    adapters = find_adapters(model)
    deltas = {path: adapter.delta() for path, adapter in adapters.items()}
    weights = {path: adapter.base.weight for path, adapter in adapters.items()}
    mx.eval(deltas)
    model.update_modules(
        tree_unflatten([(path, adapter.base) for path, adapter in adapters.items()])
    )
    factors = {path: inverse_factors(found) for path, found in inputs.items()}
    here, elsewhere = (
        list(in_order(data["valid"].take(np.arange(16)), 8)),
        list(in_order(prose(tokenizer), 8)),
    )
    settings = {
        "model": MODEL,
        "blocks": chosen.blocks,
        "updates": chosen.updates,
        "group_size": GROUP,
    }
    stored = json.loads(OUT.read_text()) if OUT.exists() else {}
    results = stored["results"] if settings.items() <= stored.items() else []
    measured = {(row["bits"], row["ratio"], row["method"]) for row in results}
    for bits in BITS:
        grids = {
            path: mx.quantize(weight.astype(mx.bfloat16), GROUP, bits)
            for path, weight in weights.items()
        }
        base = {path: dequantized(*grid, bits) for path, grid in grids.items()}
        for ratio in RATIOS:
            if {(bits, ratio, method) for method in METHODS} <= measured:
                continue
            change = {
                path: delta * (ratio * norm(base[path]) / norm(delta))
                for path, delta in deltas.items()
            }
            wanted = logits(
                model, {path: base[path] + change[path] for path in base}, [*here, *elsewhere]
            )
            for method in METHODS:
                started = time.perf_counter()
                fused = {
                    path: rounded(
                        method, base[path], change[path], grids[path], bits, factors[path]
                    )
                    for path in base
                }
                mx.eval(fused)
                spent = time.perf_counter() - started
                row = {
                    "bits": bits,
                    "ratio": ratio,
                    "method": method,
                    **compare(base, change, fused, unseen),
                }
                found = logits(model, fused, [*here, *elsewhere])
                row |= judge(wanted[: len(here)], found[: len(here)], here)
                row["kl_elsewhere"] = judge(wanted[len(here) :], found[len(here) :], elsewhere)[
                    "kl"
                ]
                results.append(row | {"seconds": round(spent, 1)})
                print(json.dumps(results[-1]), flush=True)
            text = json.dumps({**settings, **provenance(), "results": results}, indent=1)
            write_atomically(OUT, f"{text}\n".encode())


def train(model: nn.Module, examples: Any, config: TrainConfig) -> None:
    """Put an adapter on the last blocks, and train it."""
    mx.random.seed(0)
    trainable = attach_adapters(model, config.adapter)
    optimizer = LoRAPlus(config.optimizer, config.iters or 1)
    optimizer.init(model, trainable.groups)
    accumulate, update = make_step(
        model, make_loss(find_trunk_and_head(model)), optimizer, compiled=False
    )
    batches = Batches(examples, config.data.batch_size, config.seed)
    model.train()
    with memory_efficient(model):
        for n in range(config.iters or 1):
            total, _ = update(
                *accumulate(arrays_of(batches[n]), None), mx.array(float(batches[n].target_count))
            )
            mx.eval(total, model.parameters(), optimizer.state)
            print(f"update {n + 1}: loss {total.item() / batches[n].target_count:.3f}", flush=True)
    model.eval()


def prose(tokenizer: Any) -> list[Example]:
    """Return pieces of the README."""
    tokens = tokenizer.encode((Path(__file__).parents[2] / "README.md").read_text())[:1024]
    return [
        Example(np.array(tokens[start : start + 128], np.int32), np.arange(128) > 0, "README.md")
        for start in range(0, 1024, 128)
    ]


def rounded(
    method: str,
    base: mx.array,
    change: mx.array,
    grid: tuple[mx.array, ...],
    bits: int,
    factors: list[mx.array],
) -> mx.array:
    """Return the weight that a method makes of base + change, as it comes back from its codes."""
    if method == "drop":
        return base
    settings = {"group_size": GROUP, "bits": bits, "mode": "affine"}
    made = quantize(
        base + change, settings, mx.bfloat16, grid[1:], factors if method == "gptq" else ()
    )
    return dequantized(made["weight"], made["scales"], made["biases"], bits)


def dequantized(packed: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """Return a weight from its codes, without rounding on the way."""
    return mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), GROUP, bits)


def norm(array: mx.array) -> float:
    """Return the Frobenius norm."""
    return mx.linalg.norm(array).item()  # pyright: ignore[reportReturnType]


def compare(
    base: Layers, change: Layers, fused: Layers, unseen: dict[str, list[mx.array]]
) -> dict[str, float]:
    """Return the means over layers of what fuse reports."""
    found = [LayerChange(path, "", "") for path in base]
    for one in found:
        weight = base[one.path]
        one.add(weight, weight + change[one.path], fused[one.path], unseen[one.path])
    return {
        name: round(mean(getattr(one, name) for one in found), 4)
        for name in ("cosine", "error", "output_cosine")
    }


def logits(model: nn.Module, weights: Layers, batches: list[Any]) -> list[mx.array]:
    """Return the log-probabilities at each batch's supervised positions, with these weights."""
    model.load_weights(
        [(f"{path}.weight", weight) for path, weight in weights.items()], strict=False
    )
    found = []
    for batch in batches:
        places = mx.array(batch.positions[: batch.target_count])
        found.append(nn.log_softmax(model(mx.array(batch.tokens)).flatten(0, 1)[places]))
        mx.eval(found)
    return found


def judge(wanted: list[mx.array], found: list[mx.array], batches: list[Any]) -> dict[str, float]:
    """Return the loss of the weights wanted and found, and KL(wanted || found), per supervised token."""
    sums = np.zeros(3)
    for good, made, batch in zip(wanted, found, batches, strict=True):
        targets = mx.array(batch.targets[: batch.target_count])[:, None]
        losses = (-mx.take_along_axis(log, targets, axis=-1).sum().item() for log in (good, made))
        sums += [*losses, (mx.exp(good) * (good - made)).sum().item()]
    loss_wanted, loss, divergence = sums / sum(batch.target_count for batch in batches)
    return {
        "loss_wanted": round(loss_wanted, 4),
        "loss": round(loss, 4),
        "kl": round(divergence, 5),
    }


if __name__ == "__main__":
    main()
