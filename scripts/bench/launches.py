"""Count a training step's GPU launches at real sizes, ours and stock mlx_lm's, without running it.

    scripts/bench/launches            every case, with its JSON; scripts/readme.py writes the table
    scripts/bench/launches --kinds    also the kinds of operations in which the two differ most

A GPU needs 5 to 10 microseconds to launch a kernel, so a step of many small operations waits for
launches. In every case, ours may have at most 1.5 times the launches of stock; if one has more, the
script exits with code 1. The step's graph is made from a Gemma whose weights are never computed,
with 4-bit weights and bfloat16 activations, as on a Mac. It is counted after ``mx.compile`` has
fused operations, as both trainers compile their step. Every position is supervised. Both have LoRA
of the same rank on the same layers, and Adam; ours also clips the gradients.

An operation that only returns a view of an array is not counted. A concatenation is counted once
for each of its parts, which a GPU copies one by one, and padding twice: it fills, then copies.
Without a GPU, MLX expands its own attention into several operations, for both trainers alike; so
the counts are upper bounds.
"""

import argparse
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer as stock
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_loraplus.adapters.attach import adapt, put_adapters
from mlx_loraplus.adapters.base_layers import blocks_of
from mlx_loraplus.adapters.target_modules import find_targets
from mlx_loraplus.adapters.trainable import trainable_summary
from mlx_loraplus.config import OptimizerConfig
from mlx_loraplus.files import write_atomically
from mlx_loraplus.kernels import elementwise
from mlx_loraplus.kernels.choices import StepChoices, default_choices
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.patch import memory_efficient
from mlx_loraplus.kernels.trunk_and_head import head_candidates
from mlx_loraplus.models.skeleton import config_of, make_skeleton
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.training.optimizer import LoRAPlus
from scripts.provenance import provenance

RESULT = Path(__file__).parent / "results" / "launches.json"
CASES = (
    ("gemma-3-4b", 8, 512),
    ("gemma-3-4b", 4, 2048),
    ("gemma-3-4b", 1, 8192),
    ("gemma-3-270m", 8, 512),
)
"""(model, rows, tokens in a row)."""
LIMIT = 1.5
"""The most launches that ours may have for each launch of stock."""
FOUR_BITS = {"quantization": {"group_size": 64, "bits": 4}}
TARGETS = ("all-linear",)
RANK, SCALE = 8, 2.0
VIEWS = {
    "AsStrided", "Broadcast", "Contiguous", "CustomTransforms", "Depends", "ExpandDims", "Flatten",
    "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
"""Operations that usually launch nothing."""
_NODE = re.compile(r'\{ (\d+) \[label ="(\w+)", shape=rectangle\]; \}')
_INPUT = re.compile(r'"\w+" -> (\d+)')


@dataclass(frozen=True)
class Step:
    """A training step that has not run.

    Attributes:
        function: Takes ``arrays``, and returns what has to be computed.
        arrays: The batch.
        state: The trees of arrays that the function reads and changes.
    """

    function: Callable[..., Any]
    arrays: list[mx.array]
    state: list[Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Count every case, print the counts and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", action="store_true", help="print where the two differ most")
    options = parser.parse_args(arguments)

    choices = default_choices(gpu=True)
    counts, missed = [], 0
    for name, rows, length in CASES:
        config = config_of(name) | FOUR_BITS
        ours = launches(our_step(make_model(config), rows, length, choices))
        theirs = launches(stock_step(make_model(config), rows, length))
        found = {"ours": ours.total(), "stock": theirs.total()}
        counts.append({"model": name, "rows": rows, "length": length, **found})

        ratio = found["ours"] / found["stock"]
        is_met = ratio <= LIMIT
        if not is_met:
            missed += 1
        print(
            f"{name} {rows} x {length}: {found['ours']} / {found['stock']} = {ratio:.2f}"
            f" (at most {LIMIT}: {'met' if is_met else 'missed'})"
        )
        if options.kinds:
            print_differences(ours, theirs)

    result = provenance() | {"choices": asdict(choices), "counts": counts}
    write_atomically(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    if missed:
        raise SystemExit(1)


def print_differences(ours: Counter[str], theirs: Counter[str], most: int = 40) -> None:
    """Print the kinds of operations whose numbers differ most."""
    kinds = sorted(ours.keys() | theirs.keys(), key=lambda kind: -abs(ours[kind] - theirs[kind]))
    for kind in kinds[:most]:
        print(f"{ours[kind]:8} {theirs[kind]:8}  {kind[:120]}")


def make_model(config: dict[str, Any]) -> nn.Module:
    """Return a model in bfloat16 whose weights are never computed, quantized as its config says."""
    model = make_skeleton(config)
    model.set_dtype(mx.bfloat16)
    model.train()
    return model


def our_step(model: nn.Module, rows: int, length: int, choices: StepChoices) -> Step:
    """Return our step on a Gemma 3, whose gates and head are known without a trial."""
    # ``attach_adapters`` would try the model, and so compute its weights.
    adapters = {
        path: adapt("lora", module, RANK, SCALE, 0.0, None)
        for path, module in find_targets(model, TARGETS, -1).items()
    }
    put_adapters(model, adapters, {})
    optimizer = LoRAPlus(OptimizerConfig(learning_rate=1e-4, lr_ratio=1.0), total_steps=100)
    optimizer.init(model, trainable_summary(model).groups)

    trunk_and_head = replace(next(head_candidates(model)), takes_caches=True)
    gates = {path: "gelu_approx" for path, _ in model.named_modules() if path.endswith(".mlp")}
    loss = make_loss(trunk_and_head, choices)
    accumulate, update = make_step(model, loss, optimizer, compiled=False)

    def function(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        with memory_efficient(model, gates, choices):
            total, gradients = accumulate(arrays, None)
            return update(total, gradients, mx.array(float(targets)))

    targets = rows * length
    tokens = mx.zeros((rows, length), mx.int32)
    positions, ids = mx.zeros(targets, mx.int32), mx.zeros(targets, mx.int32)
    arrays = [tokens, positions, ids, mx.ones(targets)]
    return Step(function, arrays, [model.state, optimizer.state, mx.random.state])


def stock_step(model: nn.Module, rows: int, length: int) -> Step:
    """Return the step of mlx_lm's train()."""
    paths = set(find_targets(model, TARGETS, -1))
    model.freeze()
    options = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": paths}
    linear_to_lora_layers(model, len(blocks_of(model)), options)
    optimizer = optim.Adam(1e-4, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    loss_and_gradients = nn.value_and_grad(model, stock.default_loss)

    def function(*batch: mx.array) -> mx.array:
        (loss, _), gradients = loss_and_gradients(model, *batch)
        optimizer.update(model, gradients)
        return loss

    arrays = [mx.zeros((rows, length + 1), mx.int32), mx.zeros((rows, 2), mx.int32)]
    return Step(function, arrays, [model.state, optimizer.state, mx.random.state])


def launches(step: Step) -> Counter[str]:
    """Return the number of launches of each kind of operation in a compiled step."""
    inputs = [array for _, array in tree_flatten([step.arrays, step.state])]
    before = operations(inputs)
    with gpu_kernels():
        compiled = mx.compile(step.function, inputs=step.state, outputs=step.state)
        made = compiled(*step.arrays)

    # The operations that make the inputs, such as the weights, are not part of the step.
    outputs = [array for _, array in tree_flatten([made, step.state])]
    found = operations([*inputs, *outputs])
    found.subtract(before)
    return +found


def operations(arrays: list[mx.array]) -> Counter[str]:
    """Return the number of operations of each kind that the arrays depend on, without views."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    kind_of: dict[str, str] = {}
    inputs_of: Counter[str] = Counter()
    for line in text.getvalue().splitlines():
        node, edge = _NODE.fullmatch(line), _INPUT.fullmatch(line)
        if node:
            kind_of[node[1]] = node[2]
        elif edge:
            inputs_of[edge[1]] += 1

    found: Counter[str] = Counter()
    for node, kind in kind_of.items():
        if kind not in VIEWS:
            found[kind] += inputs_of[node] if kind in ("Concatenate", "Pad") else 1
    return found


@contextmanager
def gpu_kernels() -> Generator[None]:
    """Inside the context, use one operation where a GPU launches one kernel and a CPU several.

    The results would be wrong, but nothing is computed.
    """

    def cross_entropy(logits: mx.array, _: mx.array) -> mx.array:
        return mx.argmax(logits, axis=-1).view(mx.float32)

    exp_on_cpu, native = elementwise._exp_on_cpu, mx.fast.cross_entropy
    elementwise._exp_on_cpu, mx.fast.cross_entropy = mx.exp, cross_entropy
    try:
        yield
    finally:
        elementwise._exp_on_cpu, mx.fast.cross_entropy = exp_on_cpu, native


if __name__ == "__main__":
    main()
