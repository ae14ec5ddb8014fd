"""What a compiled step's trace takes: the law against the heap, and when the plan counts it."""

import ctypes
import gc
import sys
from dataclasses import replace

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import numpy as np
import pytest

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig, TrainConfig
from mlx_loraplus.data.batches import arrays_of, lay_out
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.device import Machine, simulate_mac
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.memory.model_shapes import measure
from mlx_loraplus.memory.plan import memory_plan_of
from mlx_loraplus.memory.trace_memory import MAX_TRACES, trace_bytes
from mlx_loraplus.settings import configure
from mlx_loraplus.training.compiled import CompiledByShape
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.training.optimizer import LoRAPlus
from tests.conftest import make_model

assert ml


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def heap() -> int:
    """Return the bytes that are allocated on the heap, without MLX's arrays."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    gc.collect()
    mx.clear_cache()
    info = mallinfo2()
    return info.uordblks + info.hblkhd - mx.get_active_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_trace_takes_what_the_law_says(kind: str):
    model = make_model(kind)
    trainable = attach_adapters(model, AdapterConfig(rank=4))
    sizes = measure(model, AdapterConfig(rank=4))
    optimizer = LoRAPlus(configure(TrainConfig, {"warmup": 0}).optimizer, 1000)
    optimizer.init(model, trainable.groups)
    accumulate, update = make_step(
        model, make_loss(find_trunk_and_head(model)), optimizer, compiled=True
    )

    taken: list[int] = []
    for length in (16, 32, 600):
        row = Example(np.arange(length + 1, dtype=np.int32) % 9, np.arange(length + 1) > 0)
        batch = lay_out([[row]])
        sizes_before = 0
        for _ in range(3):  # eagerly, traced, and again with the trace
            sums = accumulate(arrays_of(batch), None)
            total, _ = update(*sums, mx.array(float(batch.target_count)))
            mx.eval(model.trainable_parameters(), optimizer.state, total)
            del sums, total
            sizes_before, before = heap(), sizes_before
            taken.append(sizes_before - before)

    # The first length also traces the update.
    for traced, targets in ((4, 32), (7, 600)):
        predicted = trace_bytes(sizes, targets, checkpoint=False)
        assert taken[traced] == pytest.approx(predicted, rel=0.3)
        assert abs(taken[traced + 1]) < 0.05 * predicted


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_a_trace_that_is_replaced_gives_its_memory_back():
    model = make_model("llama")
    trainable = attach_adapters(model, AdapterConfig(rank=4))
    sizes = measure(model, AdapterConfig(rank=4))
    optimizer = LoRAPlus(configure(TrainConfig, {"warmup": 0}).optimizer, 1000)
    optimizer.init(model, trainable.groups)
    accumulate, update = make_step(
        model, make_loss(find_trunk_and_head(model)), optimizer, compiled=True
    )

    def heap_after(times: int, shapes: range) -> int:
        for shape in shapes:
            row = Example(np.arange(8 * shape, dtype=np.int32) % 9, np.arange(8 * shape) > 0)
            arrays = arrays_of(lay_out([[row]]))
            for _ in range(times):
                total, _ = update(*accumulate(arrays, None), mx.array(1.0))
                mx.eval(model.trainable_parameters(), optimizer.state, total)
        return heap()

    # Fill the traces. A further shape replaces one when it occurs for the fourth time.
    heap_after(2, range(1, MAX_TRACES + 1))
    before = heap_after(3, range(20, 24))
    assert isinstance(accumulate, CompiledByShape)
    kept = set(accumulate.traces._kept)
    grown = heap_after(2, range(20, 24)) - before
    assert len(set(accumulate.traces._kept) - kept) == 4
    assert grown < 0.5 * trace_bytes(sizes, 192, checkpoint=False), "four traces were made"


def test_the_plan_counts_traces_where_the_step_is_compiled():
    without = {"mac": ("off",), "cpu": ("off", "auto"), "cuda": ("off", "auto", "on")}
    mac = simulate_mac("16GB")
    other = Machine("cpu", 16 << 30, 14 << 30, 14 << 30)
    for name, machine in (("mac", mac), ("cpu", other), ("cuda", replace(other, backend="cuda"))):
        for setting in ("off", "auto", "on"):
            config = configure(TrainConfig, {"model": "gemma-3-1b", "compile": setting})
            memory = memory_plan_of(config, machine=machine).memory(4, 512, checkpoint=False)
            assert (memory.traces == 0) == (setting in without[name])
            assert memory.total == memory.arrays + memory.traces
            assert memory.traces < MAX_TRACES * 30e6
