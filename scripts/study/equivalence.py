"""LoRA+ with (eta, lambda eta, s) beside LoRA with (eta, eta, lambda s): where they are one and where they part.

With s' = lambda s and B' = B / lambda both give the same layer, s B A = s' B' A. An update rule
that does not feel the size of a gradient moves B' by eta where LoRA+ moves B by lambda eta: so they
stay the same, if B' starts at B / lambda. A tiny Llama learns a few batches by heart, from the same
start, with the package's own optimizer.
"""

import mlx_loraplus  # noqa: F401, I001  before mlx

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_loraplus import LoRAPlus
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.adapters.base_layers import full_weight
from mlx_loraplus.config import AdapterConfig, OptimizerConfig
from mlx_loraplus.data.batches import one_per_row
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.inference.generate import load
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.data.batches import arrays_of
from mlx_loraplus.training.make_step import make_step
from scripts.tiny_model import write_tiny_model

RATIO, RANK, SCALE, UPDATES = 16.0, 4, 1.0, 200
PLAIN: dict[str, Any] = {
    "learning_rate": 5e-4,
    "schedule": "constant",
    "warmup": 0,
    "max_grad_norm": 0.0,
}


@dataclass(frozen=True)
class Case:
    """One difference from Adam, Init[1], no decay and no clipping.

    Attributes:
        optimizer: Settings of it.
        adapter: Settings of it.
        factor: LoRA's scale / LoRA+'s.
        smaller_start: LoRA's B starts lambda times smaller.
        torch_decay: B decays at its own rate, as torch's AdamW does it.
    """

    optimizer: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    factor: float = RATIO
    smaller_start: bool = False
    torch_decay: bool = False


SGD = {"optimizer": "sgd", "learning_rate": 0.02}
CASES = {
    "Adam": Case(),
    "Adam, weight decay 0.1, the same for A and B (ours)": Case({"weight_decay": 0.1}),
    "Adam, weight decay 0.1, B's λ times A's (torch, PEFT)": Case(
        {"weight_decay": 0.1}, torch_decay=True
    ),
    "Adam, gradients clipped to norm 1": Case({"max_grad_norm": 1.0}),
    "Adam, Init[2]": Case(adapter={"init": "init2"}),
    "Adam, Init[2], LoRA's B starting λ times smaller": Case(
        adapter={"init": "init2"}, smaller_start=True
    ),
    "Adam, PiSSA": Case(adapter={"init": "pissa", "svd": "exact"}),
    "Adam, DoRA": Case(adapter={"adapter": "dora"}),
    "Lion": Case({"optimizer": "lion", "learning_rate": 1e-4}),
    "Adafactor": Case({"optimizer": "adafactor"}),
    "Muon": Case({"optimizer": "muon", "learning_rate": 2e-3}),
    "SGD": Case(SGD),
    "SGD, LoRA's scale √λ s": Case(SGD, factor=RATIO**0.5),
}


def run_equivalence(updates: int = UPDATES) -> tuple[dict[str, Any], None]:
    """Measure every case."""
    result: dict[str, Any] = {
        "lr_ratio": RATIO,
        "rank": RANK,
        "scale": SCALE,
        "updates": updates,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "model", hidden=64)
        for name, case in CASES.items():
            plus, plus_change = learn(model, case, updates, plus=True)
            lora, lora_change = learn(model, case, updates, plus=False)
            apart = np.linalg.norm(plus_change - lora_change) / np.linalg.norm(plus_change)
            result["cases"][name] = {
                "weights": float(apart), "losses": float(np.abs(plus - lora).max()),
                "plus": [float(plus[0]), float(plus[-1])], "lora": [float(lora[0]), float(lora[-1])],
            }  # fmt: skip
            print(name, result["cases"][name], flush=True)
    return result, None


def learn(folder: Path, case: Case, updates: int, *, plus: bool) -> tuple[np.ndarray, np.ndarray]:
    """Train; return the loss of each update and the change of all adapted weights, flat."""
    model, _ = load(str(folder))
    scale = SCALE if plus else SCALE * case.factor
    mx.random.seed(1)
    trainable = attach_adapters(model, AdapterConfig(rank=RANK, alpha=scale * RANK, **case.adapter))
    adapters = find_adapters(model)
    if case.smaller_start and not plus:
        for adapter in adapters.values():
            adapter.lora_b = adapter.lora_b / case.factor
    settings = OptimizerConfig(**PLAIN | case.optimizer, lr_ratio=RATIO if plus else 1.0)
    assert settings.learning_rate is not None
    optimizer = LoRAPlus(settings, total_steps=updates)
    optimizer.init(model, trainable.groups)
    accumulate, update = make_step(
        model, make_loss(find_trunk_and_head(model)), optimizer, compiled=False
    )
    keep_a = 1 - settings.learning_rate * settings.weight_decay
    keep_b = 1 - RATIO * settings.learning_rate * settings.weight_decay
    batches = [one_per_row(random_rows(8, 24, seed)) for seed in range(4)]
    model.train()
    losses = []
    for number in range(updates):
        batch = batches[number % len(batches)]
        total, _ = update(*accumulate(arrays_of(batch), None), mx.array(float(batch.target_count)))
        if (
            case.torch_decay and plus
        ):  # on top of A's, so together B's own; after the step, as good as before it
            for adapter in adapters.values():
                adapter.lora_b = adapter.lora_b * (keep_b / keep_a)
        mx.eval(total, model.trainable_parameters(), optimizer.state)
        losses.append(total.item() / batch.target_count)
    model.eval()
    changes = []
    for adapter in adapters.values():
        weight = full_weight(adapter.base, mx.float32)
        changes.append(np.array(adapter.merged(weight) - weight).ravel())
    return np.array(losses), np.concatenate(changes)


def random_rows(rows: int, length: int, seed: int) -> list[Example]:
    """Return rows of random tokens, all supervised."""
    generator = np.random.default_rng(seed)
    supervised = np.arange(length + 1) > 0
    return [
        Example(generator.integers(3, 98, length + 1).astype(np.int32), supervised, "random")
        for _ in range(rows)
    ]


LEGEND = """\
ΔW is the change of the weights by LoRA+, ΔW' that by LoRA with the λ times larger scale. Values near 0 in the first two
columns mean that both are the same training; values near 1 or above mean that they differ. Neither is better."""


def equivalence_table(result: dict[str, Any]) -> str:
    """Return the differences between the two for each case."""
    lines = [
        "| update rule, start | ‖ΔW - ΔW'‖ / ‖ΔW‖ | largest difference of a loss | last loss, LoRA+"
        " | last loss, LoRA |"
    ]
    lines.append("|---|--:|--:|--:|--:|")
    for name, case in result["cases"].items():
        losses = f"{case['plus'][1]:.3f} | {case['lora'][1]:.3f}"
        lines.append(f"| {name} | {case['weights']:.1e} | {case['losses']:.1e} | {losses} |")
    return "\n".join([*lines, "", LEGEND])
