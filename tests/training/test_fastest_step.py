"""The search for the fastest way to compute a step."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx_loraplus  # noqa: F401  # isort: skip  before mlx
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.batches import Batches
from mlx_loraplus.kernels.choices import StepChoices
from mlx_loraplus.kernels.trunk_and_head import Head, TrunkAndHead
from mlx_loraplus.settings import configure
from mlx_loraplus.training.fastest_step import (
    SECONDS,
    OpenChoices,
    StepTiming,
    StepWay,
    largest_batch,
    search_ways,
    time_step,
    tune_step,
    way_of,
)
from mlx_loraplus.training.model_probes import probe_model
from mlx_loraplus.training.optimizer import LoRAPlus
from mlx_loraplus.training.schedule import schedule_of
from mlx_loraplus.training.trainer import TrainState
from tests.conftest import TinyModel, same
from tests.training.test_failures import HELD_UP, OUT_OF_MEMORY, TOO_LONG
from tests.training.tiny_runs import examples

MIB = 2**20
START = StepWay(StepChoices("chunked", 4 * MIB), False, False)
ALL = OpenChoices((True, False), (True, False))


def costs(
    seconds: Callable[[StepWay], float], peak: Callable[[StepWay], int] = lambda _: 50
) -> Callable[[StepWay], StepTiming]:
    """Time a way by a formula."""
    return lambda way: StepTiming(way, seconds(way), peak(way))


def found(
    measure: Any, freedom: OpenChoices = ALL, budget: int = 100, clock: Any = lambda: 0.0
) -> Any:
    return search_ways(START, freedom, measure, budget, clock)


def test_each_choice_is_varied_and_the_fastest_is_kept():
    def seconds(way: StepWay) -> float:
        return (
            1.0
            - 0.3 * (way.choices.attention == "native")
            - 0.2 * (way.choices.slice_bytes == 16 * MIB)
            + 0.3 * way.grad_checkpoint
            - 0.1 * way.compiled
        )

    best, timings, is_complete = found(costs(seconds))
    assert best.way == StepWay(StepChoices("native", 16 * MIB), False, True)
    assert is_complete
    assert len(timings) == len({timing.way for timing in timings}) == 7


def test_the_delta_rule_is_timed_where_a_model_has_one():
    seconds = lambda way: 0.5 if way.choices.delta_rule == "native" else 1.0  # noqa: E731
    best, timings, _ = found(costs(seconds), OpenChoices(delta_rule=True))
    assert best.way.choices.delta_rule == "native"
    assert len({str(timing.way) for timing in timings}) == len(timings) == 6


def test_only_what_is_open_is_varied():
    _, timings, _ = found(costs(lambda _: 1.0), OpenChoices())
    assert {timing.way.compiled for timing in timings} == {False}
    assert {timing.way.grad_checkpoint for timing in timings} == {False}
    assert {timing.way.choices.delta_rule for timing in timings} == {"loop"}


def test_noise_changes_nothing():
    best, _, _ = found(costs(lambda way: 1.0 if way == START else 0.99))
    assert best.way == START


def test_a_way_that_does_not_fit_is_not_chosen():
    peak = lambda way: 150 if way.choices.slice_bytes == 64 * MIB else 50  # noqa: E731
    best, _, _ = found(costs(lambda way: 1 / way.choices.slice_bytes, peak))
    assert best.way.choices.slice_bytes == 16 * MIB


def test_checkpointing_is_chosen_where_nothing_else_fits():
    best, _, _ = found(
        costs(lambda way: 1.0 + way.grad_checkpoint, lambda way: 50 if way.grad_checkpoint else 150)
    )
    assert best.way.grad_checkpoint


def test_checkpointing_can_only_seem_to_be_faster():
    best, timings, _ = found(costs(lambda way: 1.0 - 0.5 * way.grad_checkpoint))
    assert any(timing.way.grad_checkpoint for timing in timings)
    assert best.way == START


def test_ways_that_fail_are_recorded_and_skipped():
    def measure(way: StepWay) -> StepTiming:
        if way.choices.attention == "chunked":
            return StepTiming(way, failure="out of memory")
        return StepTiming(way, 1.0, 50)

    best, timings, _ = found(measure)
    assert best.way.choices.attention == "native"
    assert timings[0].failure == "out of memory"
    assert str(timings[0]).endswith("failed (out of memory)")


def test_no_new_way_is_tried_when_the_time_is_used():
    times = iter([0.0, 0.0, SECONDS + 1])
    best, timings, is_complete = found(costs(lambda _: 1.0), clock=lambda: next(times))
    assert len(timings) == 2
    assert not is_complete
    assert best.way == START


def state_of(model: nn.Module, config: TrainConfig) -> TrainState:
    trainable = attach_adapters(model, config.adapter)
    batches = Batches(examples(30), 4, 0)
    schedule = schedule_of(config, batches.per_epoch)
    optimizer = LoRAPlus(config.optimizer, schedule.steps)
    optimizer.init(model, trainable.groups)
    probes = probe_model(model, pack=False)
    return TrainState(
        model, probes.trunk_and_head(model), optimizer, batches, schedule, probes=probes
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_tuning_leaves_everything_as_it_was(tiny: TinyModel, optimizer: str):
    config = configure(TrainConfig, {"model": "tiny", "dropout": 0.3, "optimizer": optimizer})
    state = state_of(tiny("llama", bits=4), config)
    model = state.model
    model.eval()
    mx.random.seed(5)
    random = mx.random.state[0].tolist()
    before, moments = model.parameters(), dict(state.optimizer.arrays())

    batch = largest_batch(state.batches, slice(None))
    result = tune_step(state, batch, way_of(state, config), OpenChoices((True,)), 10**12)
    assert result.is_complete
    assert len(result.timings) == 6
    assert all(timing.seconds and timing.peak for timing in result.timings)
    assert (result.rows, result.length) == state.batches.largest()

    assert same(model.parameters(), before)
    assert same(state.optimizer.arrays(), moments)
    assert mx.random.state[0].tolist() == random
    assert not model.training
    assert state.optimizer.state["step"].item() == 0


def test_the_peak_is_that_of_a_run(tiny: TinyModel):
    """What is kept to restore it does not count, and the gradients that a run carries do."""
    config = configure(TrainConfig, {"model": "tiny", "rank": 16})
    state = state_of(tiny("llama"), config)
    batch = largest_batch(state.batches, slice(None))
    way = StepWay(StepChoices(), False, False)
    trained: Any = tree_flatten(state.model.trainable_parameters())
    gradients = sum(array.nbytes for _, array in trained)

    def peak(batches_per_step: int) -> int:
        schedule = replace(state.schedule, batches_per_step=batches_per_step)
        now = replace(state, schedule=schedule)
        found = tune_step(now, batch, way, OpenChoices(), 10**12).timings[0].peak
        assert found is not None
        return found

    # The second step is one whose arrays are those of a step before, as in a run.
    time_step(state, batch, way)
    gc.collect()
    alone = time_step(state, batch, way).peak
    gc.collect()
    assert peak(1) == pytest.approx(alone, abs=gradients), "without what is kept, 3 gradients"
    assert peak(8) - peak(1) == pytest.approx(gradients, abs=0.8 * gradients)


def test_a_compiled_way_is_timed(tiny: TinyModel):
    config = configure(TrainConfig, {"model": "tiny", "dropout": 0.3})
    state = state_of(tiny("llama"), config)
    before = state.model.parameters()
    batch = largest_batch(state.batches, slice(None))
    way = StepWay(StepChoices("native"), False, True)
    result = tune_step(state, batch, way, OpenChoices(), 10**12)
    assert result.timings[0].seconds is not None
    assert same(state.model.parameters(), before)


def test_a_lack_of_memory_is_recorded(tiny: TinyModel):
    def trunk(*_: Any, **__: Any) -> mx.array:
        raise RuntimeError("[malloc_or_wait] Unable to\n allocate 9 bytes.")

    config = configure(TrainConfig, {"model": "tiny"})
    state = state_of(tiny("llama"), config)
    assert state.trunk_and_head is not None
    broken = TrunkAndHead(trunk, Head(state.trunk_and_head.head.layer))
    batch = largest_batch(state.batches, slice(None))
    failing = TrainState(
        state.model, broken, state.optimizer, state.batches, state.schedule, probes=state.probes
    )
    timing = time_step(failing, batch, START)
    assert timing.seconds is None
    assert timing.failure == "[malloc_or_wait] Unable to allocate 9 bytes."


def test_a_gpu_that_failed_times_no_other_way(tiny: TinyModel):
    """MLX raises the error of a failed command buffer again and again."""
    config = configure(TrainConfig, {"model": "tiny"})
    state = state_of(tiny("llama"), config)
    batch = largest_batch(state.batches, slice(None))
    calls: list[int] = []

    for text in (OUT_OF_MEMORY, HELD_UP, TOO_LONG):

        def trunk(*_: Any, text: str = text, **__: Any) -> mx.array:
            calls.append(1)
            raise RuntimeError(text)

        assert state.trunk_and_head is not None
        broken = replace(
            state, trunk_and_head=TrunkAndHead(trunk, Head(state.trunk_and_head.head.layer))
        )
        with pytest.raises(RuntimeError, match="Command buffer execution failed"):
            tune_step(broken, batch, START, ALL, 10**12)
    assert len(calls) == 3


def test_the_largest_batch_of_a_share():
    batches = Batches(examples(30), 4, 0, 2)
    batch = largest_batch(batches, slice(0, None, 2))
    assert batch.tokens.shape[0] == 2
    sizes = [batches.shape_of(batches.rows_of(n)[::2])[1] for n in range(batches.per_epoch)]
    assert batch.tokens.shape[1] == max(sizes)
