"""Check on the loaded model that this machine computes loss and gradients correctly.

A defect of a GPU's kernels, a compiler or one of this package's own gradients does not stop a run;
it makes the run learn worse. Therefore the front of the model, its first blocks and its head,
computes loss and gradients for a few rows in several ways, all with the same weights:

- the reference: in float32 on the CPU, with mlx-lm's layers;
- the stock way: on this device and in the model's type, with mlx-lm's layers and full logits;
- the ways that a run can use: with this package's kernels, and with each kind of attention and
  cross-entropy, eager and compiled.

Sliding windows are made shorter than the rows, so that all kinds of attention are needed.

Let e be the distance from the reference relative to the size of the reference. A way is correct if
for the loss, and for the gradients of each kind of module,

    e <= max(TOLERANCES, FACTOR * e of the stock way)

The stock way shows how much of e is rounding: on the same device and in the same type, correct
kernels round about as much as MLX's own. Known defects exceed the tolerances several times.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..adapters.attach import attach_adapters
from ..adapters.base_layers import QUANTIZED, base_shape, full_weight, plain_layer
from ..adapters.dropout import train_without_dropout
from ..adapters.lora import LoRALinear
from ..adapters.token_tables import TOKEN_TABLES, table_rows
from ..adapters.trainable import find_adapters, trainable_summary
from ..config import AdapterConfig, OptimizerConfig
from ..device import gb, kept_random_state, room_for_copy
from ..errors import LoRAPlusError
from ..failures import is_lost
from ..kernels.choices import SMALLEST_SLICE, StepChoices
from ..kernels.cross_entropy import make_loss
from ..kernels.patch import memory_efficient
from ..kernels.reduced_model import front_of
from ..kernels.trunk_and_head import model_dtype
from ..models.loading import shared_copy
from .make_step import make_step
from .model_probes import ModelProbes
from .optimizer import LoRAPlus

BLOCKS = 2
# Rows of the embeddings and the head. A slice of 4 MiB holds 2,048 of them for 512 targets, so
# that results are summed over four slices.
VOCABULARY = 8192
SLICE = SMALLEST_SLICE
# More than one chunk and several blocks of attention, and longer than the sliding windows. With
# its padding on CUDA, the length has a fused gradient there.
ROWS, LENGTH, TARGETS = 2, 544, 512
WINDOW = 300

# The largest relative distance of (the loss, gradients) that counts as rounding. One operation in
# these types rounds by about 1e-7, 5e-4 and 4e-3.
TOLERANCES: Mapping[mx.Dtype, tuple[float, float]] = {
    mx.float32: (1e-4, 2e-3),
    mx.float16: (2e-3, 2e-2),
    mx.bfloat16: (1e-2, 6e-2),
}
FACTOR = 3
# The largest relative distance of all gradients together that the stock way may have.
STOCK_LIMIT = 0.5

STOCK = "mlx-lm's layers"
Arrays = tuple[mx.array, ...]
Gradients = dict[str, mx.array]


@dataclass(frozen=True)
class Deviation:
    """How far one way of computing is from the reference, relative to the reference.

    Attributes:
        loss: The distance of the loss.
        gradients: The distance of all gradients together.
        parts: The distance of the gradients of each kind of module, such as
            "mlp.down_proj.lora_a".
    """

    loss: float
    gradients: float
    parts: dict[str, float]


@dataclass(frozen=True)
class CheckResult:
    """The result of the check, or the reason why it is not possible.

    Attributes:
        tolerances: The largest deviations of (the loss, gradients) that are always allowed.
        deviations: The deviation of each way, by the way's name; the stock way is ``STOCK``.
        skipped: Why the check is not possible; empty if it was made.
    """

    tolerances: tuple[float, float] = (0.0, 0.0)
    deviations: dict[str, Deviation] = field(default_factory=dict[str, Deviation])
    skipped: str = ""

    @property
    def ours(self) -> dict[str, Deviation]:
        """The deviations of the ways that a run can use."""
        return {name: each for name, each in self.deviations.items() if name != STOCK}

    def problems(self) -> list[str]:
        """Return a phrase with figures for each way that is not correct."""
        if self.skipped:
            return []

        # If MLX's own layers are wrong, the others can't be judged. A nan is wrong, too.
        stock = self.deviations[STOCK]
        if not (stock.loss <= STOCK_LIMIT and stock.gradients <= STOCK_LIMIT):
            return [
                f"{STOCK} are off by {stock.loss:.2g} in the loss and {stock.gradients:.2g} in the"
                f" gradients (allowed: {STOCK_LIMIT:g})"
            ]

        found: list[str] = []
        for name, deviation in self.ours.items():
            allowed = max(self.tolerances[0], FACTOR * stock.loss)
            if not deviation.loss <= allowed:
                found.append(
                    f"{name}: the loss is off by {deviation.loss:.2g} (allowed: {allowed:.2g})"
                )
            part = self._worst_part(deviation)
            if part:
                found.append(f"{name}: {part}")
        return found

    def _worst_part(self, deviation: Deviation) -> str:
        """Return a phrase about the part whose gradients exceed the limit most, or ""."""
        worst, phrase = 1.0, ""
        for part, off in deviation.parts.items():
            allowed = max(self.tolerances[1], FACTOR * self.deviations[STOCK].parts[part])
            excess = off / allowed if np.isfinite(off) else np.inf
            if excess > worst:
                worst = excess
                phrase = f"the gradients of {part} are off by {off:.2g} (allowed: {allowed:.2g})"
        return phrase

    def __str__(self) -> str:
        """Return what was found, for the log."""
        if self.skipped:
            return f"not possible: {self.skipped}"

        stock, ours = self.deviations[STOCK], self.ours.values()
        loss = max(each.loss for each in ours)
        gradients = max(each.gradients for each in ours)
        return (
            f"loss and gradients agree with float32 on the CPU (within {loss:.1g} and"
            f" {gradients:.1g}; {STOCK}: {stock.loss:.1g} and {stock.gradients:.1g})"
        )


def check_step(
    model: nn.Module,
    probes: ModelProbes,
    adapter: AdapterConfig,
    ways: Sequence[tuple[StepChoices, bool]],
) -> CheckResult:
    """Compare loss and gradients of the model's front in several ways.

    The model is not changed.

    Args:
        model: The model. If its front has no adapters, the front gets adapters of its own.
        probes: The verdicts about the model.
        adapter: The settings of the adapters that the front gets if it has none.
        ways: The choices to check, each with whether the step is compiled.
    """
    with kept_random_state():
        front = _front_with_adapters(model, adapter)
        if front is None:
            return CheckResult(skipped="the model's blocks can't be taken apart")
        _narrow_windows(front)
        too_large = _too_large(front)
        if too_large:
            return CheckResult(skipped=too_large)

        # Compute the reference, then each way.
        arrays = _few_rows(front)
        try:
            expected = _reference(front, arrays)
        except Exception as problem:  # a model that needs all of its blocks
            if is_lost(problem):
                raise
            reason = f"the model does not run with its first blocks alone ({problem!s:.80})"
            return CheckResult(skipped=" ".join(reason.split()))

        dtype = model_dtype(model)
        deviations = {STOCK: _deviation(_stock(front, arrays), expected)}
        for choices, compiled in ways:
            name = f"{choices}, {'compiled' if compiled else 'eager'}"
            found = _our_way(front, probes, arrays, choices, compiled=compiled)
            deviations[name] = _deviation(found, expected)
        return CheckResult(TOLERANCES[dtype], deviations)


def refuse_if_wrong(result: CheckResult) -> None:
    """Raise an error if a way of computing is not correct.

    Raises:
        LoRAPlusError: A way is not correct; the message has the figures.
    """
    problems = result.problems()
    if not problems:
        return

    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise LoRAPlusError(
        "this machine computes wrong gradients with these versions: compared with float32 on the"
        f" CPU, {'; '.join(problems[:3])}{more}: {remedy_for(problems)}; please report the output"
        " of mlx_loraplus doctor; --selfcheck off trains nevertheless"
    )


def remedy_for(problems: Sequence[str]) -> str:
    """Return what to do; if only compiled steps are wrong, compilation can be switched off."""
    remedy = "update mlx, mlx-lm and mlx_loraplus, or return to the versions that worked"
    if all(", compiled: " in problem for problem in problems):
        remedy = f"train with --compile off, or {remedy}"
    return remedy


def _front_with_adapters(model: nn.Module, adapter: AdapterConfig) -> nn.Module | None:
    """Return the model's front with adapters whose gradients are not zero, or None.

    It is None if the model has no list of blocks that can be shortened.
    """
    front = front_of(model, blocks=BLOCKS, rows=VOCABULARY)
    if front is None:
        return None

    if not tree_flatten(front.trainable_parameters()) or not find_adapters(front):
        attach_adapters(front, AdapterConfig(adapter.adapter, rank=adapter.rank))
    train_without_dropout(front)

    # New adapters have a factor of zero, so that the gradient of the other factor is zero.
    mx.random.seed(0)
    filled: list[tuple[str, mx.array]] = []
    trained: dict[str, mx.array] = dict(tree_flatten(front.trainable_parameters()))
    for name, array in trained.items():
        is_filled: Any = mx.any(array).item()
        if not is_filled:
            filled.append((name, 0.02 * mx.random.normal(array.shape, array.dtype)))
    front.load_weights(filled, strict=False)
    return front


def _narrow_windows(front: nn.Module) -> None:
    """Make sliding windows shorter than the rows, so that attention has to apply them."""
    for module in front.modules():
        for name, value in vars(module).items():
            if "window" in name and isinstance(value, int) and value > WINDOW:
                setattr(module, name, WINDOW)


def _too_large(front: nn.Module) -> str:
    """Return why there is not enough memory for the front in float32, or ""."""
    elements = 0
    for module in front.modules():
        if isinstance(module, QUANTIZED):
            rows, columns = base_shape(module)
            experts: int = module.weight.shape[0] if module.weight.ndim == 3 else 1
            elements += experts * rows * columns
        else:
            elements += sum(array.size for array in module.values() if isinstance(array, mx.array))

    needed, room = mx.float32.size * elements, room_for_copy()
    if needed <= room:
        return ""
    return (
        f"the first blocks in float32 take {gb(needed)}, the check needs twice that, and"
        f" {gb(2 * room)} are free"
    )


def _few_rows(front: nn.Module) -> Arrays:
    """Return random tokens and targets in the form that losses take, without padding."""
    known = min(table_rows(front, TOKEN_TABLES) or 2, VOCABULARY)
    random = np.random.default_rng(0)
    tokens = random.integers(0, known, (ROWS, LENGTH))
    positions = random.choice(ROWS * LENGTH, TARGETS, replace=False)
    targets = random.integers(0, known, TARGETS)
    return (
        mx.array(tokens.astype(np.int32)),
        mx.array(np.sort(positions).astype(np.int32)),
        mx.array(targets.astype(np.int32)),
        mx.ones(TARGETS),
    )


def _reference(front: nn.Module, arrays: Arrays) -> tuple[float, Gradients]:
    """Return loss and gradients in float32 on the CPU, with mlx-lm's layers."""
    with mx.stream(mx.cpu):
        reference = _with_stock_adapters(front)
        plain: list[tuple[str, Any]] = []
        for path, module in reference.named_modules():
            if isinstance(module, QUANTIZED):
                layer = plain_layer(module, full_weight(module, mx.float32))
                layer.freeze()
                plain.append((path, layer))
        reference.update_modules(tree_unflatten(plain))
        reference.set_dtype(mx.float32)
        return _full_logits(reference, arrays)


def _stock(front: nn.Module, arrays: Arrays) -> tuple[float, Gradients]:
    """Return loss and gradients on this device, with mlx-lm's layers."""
    return _full_logits(_with_stock_adapters(front), arrays)


def _full_logits(model: nn.Module, arrays: Arrays) -> tuple[float, Gradients]:
    """Return loss and gradients of a model, computed from full logits."""
    return _evaluated(nn.value_and_grad(model, make_loss(None))(model, *arrays))


def _our_way(
    front: nn.Module,
    probes: ModelProbes,
    arrays: Arrays,
    choices: StepChoices,
    *,
    compiled: bool,
) -> tuple[float, Gradients]:
    """Return loss and gradients as a training step computes them."""
    paths = {path for path, _ in front.named_modules()}
    gates = {path: gate for path, gate in probes.gated_mlps.items() if path in paths}
    loss = make_loss(probes.trunk_and_head(front), replace(choices, slice_bytes=SLICE))

    # Only ``accumulate`` is used, but a step also needs an optimizer.
    optimizer = LoRAPlus(OptimizerConfig(), total_steps=1)
    optimizer.init(front, trainable_summary(front).groups)
    with memory_efficient(front, gates, choices):
        accumulate, _ = make_step(front, loss, optimizer, compiled=compiled)
        found = _evaluated(accumulate(arrays, None))

        # A step runs eagerly when a shape occurs for the first time, so compute it again.
        if compiled:
            found = _evaluated(accumulate(arrays, None))
    return found


def _with_stock_adapters(front: nn.Module) -> nn.Module:
    """Return a copy of the front whose plain LoRA layers are mlx-lm's, with the same arrays."""
    # The import takes half a second or more, and only this check needs it: mlx_lm.tuner imports
    # the experiment trackers that are installed.
    from mlx_lm.tuner.lora import LoRALinear as StockLoRALinear

    copied = shared_copy(front)
    stock: list[tuple[str, Any]] = []
    for path, adapter in find_adapters(copied).items():
        if type(adapter) is not LoRALinear or adapter.has_start:
            continue
        layer = StockLoRALinear.from_base(adapter.base, adapter.rank, 0.0, adapter.scale)
        layer.lora_a, layer.lora_b = adapter.lora_a, adapter.lora_b
        stock.append((path, layer))
    copied.update_modules(tree_unflatten(stock))
    return copied


def _evaluated(found: Any) -> tuple[float, Gradients]:
    """Evaluate loss and gradients, and return the gradients by the path of their parameter."""
    mx.eval(found)
    loss, tree = found
    gradients: Gradients = dict(tree_flatten(tree))
    return loss.item(), gradients


def _deviation(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> Deviation:
    """Return how far loss and gradients are from the reference."""
    loss, gradients = found
    right_loss, right = expected

    # Sum the squares over the parameters of each kind of module.
    off: dict[str, float] = {}
    size: dict[str, float] = {}
    with mx.stream(mx.cpu):
        for path, gradient in right.items():
            part = re.sub(r"^.*\.\d+\.", "", path)
            difference = gradients[path].astype(mx.float32) - gradient
            squares = mx.stack([mx.square(difference).sum(), mx.square(gradient).sum()])
            values: Any = squares.tolist()
            off[part] = off.get(part, 0.0) + values[0]
            size[part] = size.get(part, 0.0) + values[1]

    # If a part's gradients are tiny, its distance is relative to 1% of the norm of all gradients.
    least = 1e-4 * sum(size.values())
    parts = {part: float(np.sqrt(square / max(size[part], least))) for part, square in off.items()}
    whole = float(np.sqrt(sum(off.values()) / sum(size.values())))
    return Deviation(abs(loss - right_loss) / abs(right_loss), whole, parts)
