"""A function is compiled for shapes that come back, and its memory stays bounded."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import numpy as np
import psutil
import pytest

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig, TrainConfig
from mlx_loraplus.data.batches import arrays_of, lay_out
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.inference.generate import answer_all
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.memory.trace_memory import MAX_TRACES
from mlx_loraplus.settings import configure
from mlx_loraplus.training.compiled import CompiledByShape, Traces
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.training.optimizer import LoRAPlus
from mlx_loraplus.training.validation import score
from scripts.tiny_model import write_tiny_model
from tests.conftest import make_model

assert ml
ROOT = Path(__file__).parents[2]


def test_a_shape_is_compiled_when_it_comes_back():
    calls: list[tuple[int, ...]] = []

    def double(x: mx.array) -> mx.array:
        calls.append(tuple(x.shape))
        return 2 * x

    compiled = CompiledByShape(double, [], Traces(2))
    for size in (3, 3, 3, 3):
        assert compiled(mx.ones(size)).tolist() == [2.0] * size
    assert calls == [(3,), (3,)], "once eagerly, once to trace it"
    for size in (4, 4):
        compiled(mx.ones(size))
    assert compiled.traces.count == 2, "as many as are kept"
    calls.clear()
    for _ in range(8):
        compiled(mx.ones(5))
    assert calls == [(5,)] * 8, "eagerly seven times, as 3 occurred four times, then to trace it"
    assert compiled.traces.count == 2
    calls.clear()
    compiled(mx.ones(4))
    compiled(mx.ones(5))
    assert calls == [], "3 was the least recently used"
    compiled(mx.ones(3))
    assert calls == [(3,)]


def test_many_shapes_are_not_traced_again_and_again():
    calls: list[int] = []

    def double(x: mx.array) -> mx.array:
        calls.append(x.size)
        return 2 * x

    compiled = CompiledByShape(double, [], Traces(4))
    generator = np.random.default_rng(0)
    made = []
    for size in generator.integers(1, 11, 500).tolist():
        before = set(compiled.traces._kept)
        compiled(mx.ones(size))
        made.extend(set(compiled.traces._kept) - before)
    assert compiled.traces.count == 4
    assert len(made) <= 12, "with the least recently used alone, about 300"


def test_functions_share_the_traces_that_are_kept():
    """KTO compiles its gradients and z0."""
    traces = Traces(3)
    functions = [CompiledByShape(lambda x, n=n: n * x, [], traces) for n in (2, 3)]
    for size in (3, 4, 5):
        for _ in range(3):
            assert [function(mx.ones(size)).tolist() for function in functions] == [
                [2.0] * size,
                [3.0] * size,
            ]
    assert traces.count == 3


def test_the_update_is_compiled_however_many_shapes_the_batches_have():
    """With accumulation, shapes come far more often than updates."""
    model = make_model("llama")
    trainable = attach_adapters(model, AdapterConfig(rank=4))
    optimizer = LoRAPlus(configure(TrainConfig, {"warmup": 0}).optimizer, 1000)
    optimizer.init(model, trainable.groups)
    loss = make_loss(find_trunk_and_head(model))
    accumulate, update = make_step(model, loss, optimizer, compiled=True)
    assert isinstance(accumulate, CompiledByShape)
    assert isinstance(update, CompiledByShape)

    sums = mx.array(0.0), model.trainable_parameters()
    for _ in range(3):
        for length in range(1, 2 * MAX_TRACES):
            for _ in range(4):
                accumulate.count_call((mx.zeros((2, length)),), None)
        update.count_call(*sums, mx.array(0.0))
    assert update.traces.count == 1
    assert accumulate.traces.count == MAX_TRACES - 1


def steps(
    compiled: bool, count: int, lengths: list[int], layers: int = 3, rows: Sequence[int] = (2,)
) -> tuple[list[float], list[int]]:
    """The losses, and the resident memory in bytes after each step."""
    model = make_model("llama")
    model.model.layers = model.model.layers[:layers]
    trainable = attach_adapters(model, AdapterConfig(rank=4))
    optimizer = LoRAPlus(configure(TrainConfig, {"warmup": 0}).optimizer, 1000)
    optimizer.init(model, trainable.groups)
    accumulate, update = make_step(
        model, make_loss(find_trunk_and_head(model)), optimizer, compiled=compiled
    )
    losses: list[float] = []
    memory: list[int] = []
    for number in range(count):
        length = lengths[number % len(lengths)]
        row = Example(np.arange(length, dtype=np.int32) % 9, np.arange(length) > 0)
        batch = lay_out([[row]] * rows[number % len(rows)])
        total, _ = update(*accumulate(arrays_of(batch), None), mx.array(float(batch.target_count)))
        mx.eval(model.trainable_parameters(), optimizer.state, total)
        losses.append(total.item())  # pyright: ignore[reportArgumentType]
        memory.append(psutil.Process().memory_info().rss)
    return losses, memory


def test_compiled_steps_are_the_eager_ones():
    lengths = [9, 17, 9, 25]
    assert steps(True, 12, lengths)[0] == pytest.approx(steps(False, 12, lengths)[0], rel=1e-4)


def train_on_many_shapes() -> tuple[int, int]:
    """Return how many functions are compiled in 496 steps, and the growth in the last 400, in bytes.

    Each group of 16 shapes occurs twice as often as the one before it, and so replaces it. The
    largest shapes come first, so that arrays do not grow.
    """
    made = 0
    right = mx.compile

    def counted(function: Any, **state: Any) -> Any:
        nonlocal made
        made += 1
        return right(function, **state)

    shapes = [(rows, 8 * length) for rows in range(8, 0, -1) for length in range(8, 0, -1)]
    order = [shape for n, shape in enumerate(shapes) for _ in range((2, 4, 8, 17)[n // 16])]
    rows, lengths = zip(*order, strict=True)
    mx.compile = counted
    _, memory = steps(True, len(order), list(lengths), layers=1, rows=rows)
    return made, memory[-1] - memory[96]


def test_resident_memory_stays_flat_over_many_shapes():
    """In a process of its own: in memory that other tests have left, traces would not show."""
    code = "from tests.training.test_compiled import train_on_many_shapes; print(*train_on_many_shapes())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    made, grown = map(int, done.stdout.split())
    assert made - MAX_TRACES > 40, "so many were dropped"
    assert grown < 4e6


def test_resident_memory_stays_flat_over_validations_and_answers(tmp_path: Path):
    """They are not compiled: a validation repeats its shapes, and prompts have many."""
    model, tokenizer = ml.load(str(write_tiny_model(tmp_path)))
    chance = np.random.default_rng(0)
    valid = [Example(np.arange(3, n, dtype=np.int32), np.arange(3, n) > 3) for n in range(5, 60)]

    memory: list[int] = []
    for _ in range(30):
        lengths = chance.integers(2, 300, 4)
        prompts = [chance.integers(3, 90, length).tolist() for length in lengths]
        answer_all(model, tokenizer, prompts, max_tokens=2)
        score(model, find_trunk_and_head(model), valid, 4)
        memory.append(psutil.Process().memory_info().rss)
    assert memory[-1] - memory[10] < 8e6


def test_a_model_that_computes_outside_mlx_is_told_to_leave_compiling_out():
    def read(x: mx.array) -> mx.array:
        return mx.array(np.array(x))

    compiled = CompiledByShape(read, [], Traces())
    compiled(mx.ones(3))
    with pytest.raises(ml.ConfigError, match="set --compile off"):
        compiled(mx.ones(3))
