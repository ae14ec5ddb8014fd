"""Every adapter on one model, after equal updates: what trains, what a step costs, what is learned.

Each method runs in a process of its own, on the same rows and from the same seed, at the package's
default rates for it; only what its name says is set. Seconds are the median of the updates after
the first. Memory is MLX's peak while training, above what is alive when model, adapters and
optimizer are ready. The losses are those of held-out rows.

Where MLX has no GPU a quantized base is some fifty times slower than the same numbers in float32,
so there the methods with one train over its dequantized weights: the same losses, and no time or
memory of their own.

``python -m scripts.bench.adapters METHOD UPDATES [DATA]`` runs one method and prints one JSON line.
"""

from scripts.bench.cases import SEED, Case, prepare  # isort: skip  before mlx

import json
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_loraplus import LoRAPlus
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.base_layers import QUANTIZED, full_weight, plain_layer
from mlx_loraplus.adapters.target_modules import find_targets
from mlx_loraplus.adapters.trainable import TrainableParams, find_adapters
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.batches import Batches, arrays_of
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.device import on_gpu
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.patch import memory_efficient
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.settings import configure
from mlx_loraplus.training.compiled import should_compile
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.training.validation import score
from scripts.bench.trainers import seconds, settled_memory

MODEL, BATCH, UPDATES = "smollm2-135m", 8, 60
BITS = {"group_size": 64, "bits": 4}  # what LoftQ quantizes to by default
OVER_BITS = "LoRA+ over 4 bits"
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"lr_ratio": 1},
    "LoRA+": {},
    "LoRA+ from Init[2]": {"init": "init2"},
    "rsLoRA+": {"rslora": True},
    "PiSSA+": {"init": "pissa"},
    "DoRA+": {"adapter": "dora"},
    "VeRA+": {"adapter": "vera"},
    OVER_BITS: {},
    "LoftQ+ over 4 bits": {"init": "loftq"},
    "PiSSA+ over 4 bits": {"init": "pissa", "quantize": "4"},
}


def measure(method: str, updates: int, data: str | None) -> dict[str, Any]:
    """Train the model with one method and measure it."""
    task = prepare(Case(MODEL, MODEL, "completion", BATCH, updates, ()), data, updates)
    return train(
        task.model,
        task.examples,
        task.held_out,
        METHODS[method],
        updates,
        quantized=method == OVER_BITS,
    )


def train(
    model: nn.Module,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    settings: dict[str, Any],
    updates: int,
    *,
    quantized: bool = False,
) -> dict[str, Any]:
    """Attach adapters with these settings, train for ``updates`` updates, and return the measurements.

    Args:
        model: Without adapters; it is changed.
        examples: To learn from, enough for one pass.
        held_out: To judge by.
        settings: Of ``TrainConfig``; all others have their defaults.
        updates: How many.
        quantized: Quantize the targeted layers first.
    """
    config = configure(TrainConfig, {"batch_size": BATCH, "seed": SEED, **settings})
    mx.random.seed(SEED)
    targets = find_targets(model, config.adapter.target_modules, config.adapter.num_layers)
    if quantized:
        nn.quantize(model, **BITS, class_predicate=lambda path, _: path in targets)
    started = time.perf_counter()
    trainable = attach_adapters(model, config.adapter)
    mx.eval(model.parameters())
    attach_seconds = time.perf_counter() - started
    dequantized = dequantize_bases(model)
    trunk_and_head = find_trunk_and_head(model)
    optimizer = LoRAPlus(config.optimizer, updates)
    optimizer.init(model, trainable.groups)
    batches = Batches(examples, config.data.batch_size, config.seed)
    before = score(model, trunk_and_head, held_out, config.data.batch_size).loss
    accumulate, learn = make_step(
        model, make_loss(trunk_and_head), optimizer, compiled=should_compile(config)
    )
    model.train()
    alive = settled_memory()
    mx.reset_peak_memory()

    def update(n: int) -> Any:
        batch = batches[n]
        return (
            *learn(*accumulate(arrays_of(batch), None), mx.array(float(batch.target_count))),
            optimizer.state,
            parameters(model),
        )

    with memory_efficient(model):
        spent = [seconds(lambda n=n: update(n)) for n in range(updates)]
    peak = mx.get_peak_memory()
    return {
        **counts(trainable),
        "learning_rate": config.optimizer.learning_rate,
        "lr_ratio": config.optimizer.lr_ratio,
        "attach_seconds": attach_seconds,
        "seconds": None if dequantized else median(spent[1:]),
        "peak_above_weights": None if dequantized else peak - alive,
        "loss_before": before,
        "loss_after": score(model, trunk_and_head, held_out, config.data.batch_size).loss,
    }


def dequantize_bases(model: nn.Module) -> bool:
    """Without a GPU, dequantize the bases of adapters; return whether that was done."""
    over = [
        adapter for adapter in find_adapters(model).values() if isinstance(adapter.base, QUANTIZED)
    ]
    if not over or on_gpu():
        return False
    for adapter in over:
        adapter.replace_base(plain_layer(adapter.base, full_weight(adapter.base, mx.float32)))
        adapter.base.freeze()
    return True


def counts(trainable: TrainableParams) -> dict[str, Any]:
    """Return what trains, and what quantizing has lost of the weights' norm on average."""
    lost = [after for _, after in trainable.residuals.values()]
    return {
        "trainable": trainable.trainable,
        "total": trainable.total,
        "residual": sum(lost) / len(lost) if lost else None,
    }


def parameters(model: nn.Module) -> list[mx.array]:
    """Return what trains."""
    return [array for _, array in tree_flatten(model.trainable_parameters())]


HEADINGS = (
    "method",
    "η",
    "λ",
    "trainable",
    "s/step",
    "to LoRA+",
    "peak above weights",
    "held-out loss",
)


LEGEND = """\
*Trainable*: the number of trained parameters. *s/step*: seconds for a step; *to LoRA+*: divided by those of LoRA+.
*Peak above weights*: the highest memory, without the weights. *Held-out loss*: after the run, in nats per token. Lower
is better in all of them. A dash means that time and memory were not measured."""


def markdown(result: dict[str, Any]) -> str:
    """Return the table in docs/adapters.md."""
    methods = result["methods"]
    lora = methods["LoRA+"]["seconds"]
    lines = [
        (
            f"{result['model']}, {result['updates']} steps of {result['batch_size']}"
            f" {result['data']} rows; held-out loss before: {methods['LoRA+']['loss_before']:.3f}"
        ),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" + "|--:" * (len(HEADINGS) - 1) + "|",
    ]
    for name, row in methods.items():
        timed = row["seconds"] is not None
        cells = [
            name,
            f"{row['learning_rate']:g}",
            f"{row['lr_ratio']:g}",
            f"{row['trainable']:,}",
            f"{row['seconds']:.2f}" if timed else "-",
            f"{row['seconds'] / lora:.2f}x" if timed else "-",
            f"{row['peak_above_weights'] / 1e6:,.0f} MB" if timed else "-",
            f"{row['loss_after']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", LEGEND]) + "\n"


def main() -> None:
    """Measure what the arguments say and print it as one JSON line."""
    method, updates, *data = sys.argv[1:]
    print("\n" + json.dumps(measure(method, int(updates), data[0] if data else None)))


if __name__ == "__main__":
    main()
