"""The loop: accumulation by tokens, compiling, checkpointing, the order of rows, interrupts."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_loraplus import LoRAPlus
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import trainable_summary
from mlx_loraplus.config import AdapterConfig, TrainConfig
from mlx_loraplus.data.batches import Batches, arrays_of, in_order, one_per_row, round_up
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.patch import grad_checkpointing
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.settings import configure
from mlx_loraplus.training import trainer
from mlx_loraplus.training.interrupts import interruptible
from mlx_loraplus.training.schedule import schedule_of
from mlx_loraplus.training.trainer import TrainState, train
from mlx_loraplus.training.validation import score
from tests.conftest import TinyModel, randomize_adapters, same
from tests.training.tiny_runs import assert_same_step, examples


def prepared(tiny: TinyModel, rows: list[Example], kind: str = "llama", **settings):
    """Return what train takes."""
    config = configure(
        TrainConfig,
        {
            "batch_size": 2,
            "warmup": 0,
            "steps_per_report": 1,
            "steps_per_eval": 200,
            "adapter_path": "none",
        }
        | settings,
    )
    model = tiny(kind)
    mx.random.seed(5)
    attach_adapters(model, AdapterConfig(rank=4, dropout=config.adapter.dropout))
    batches = Batches(rows, config.data.batch_size, config.seed)
    length = schedule_of(config, batches.per_epoch)
    optimizer = LoRAPlus(config.optimizer, length.steps)
    optimizer.init(model, trainable_summary(model).groups)
    state = TrainState(model, find_trunk_and_head(model), optimizer, batches, length)
    return state, rows[:3], config


def run(
    tiny: TinyModel, rows: list[Example], *, grad_checkpoint: bool = False, **settings
) -> tuple[nn.Module, list[dict]]:
    parts = prepared(tiny, rows, **settings)
    events: list[dict] = []
    state, valid, config = parts
    state = replace(state, grad_checkpoint=grad_checkpoint)
    train(state, valid, config, report=events.append, save=lambda: None)
    return state.model, events


def test_accumulating_four_batches_of_one_is_one_batch_of_four_by_tokens(tiny: TinyModel):
    model = tiny("llama")
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    rows = examples(4)
    assert_same_step(model, [[one_per_row(rows)], [one_per_row([row]) for row in rows]])


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
def test_compiled_and_eager_steps_agree(tiny: TinyModel, kind: str):
    rows = examples(8)
    (eager, first), (compiled, second) = (
        run(tiny, rows, kind=kind, iters=4, compile=mode) for mode in ("off", "on")
    )
    losses = [[event["loss"] for event in events if "loss" in event] for events in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, one), (_, other) in zip(
        tree_flatten(eager.trainable_parameters()),
        tree_flatten(compiled.trainable_parameters()),
        strict=True,
    ):
        assert mx.abs(one - other).max() < 2e-5, name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_finite_differences(
    tiny: TinyModel, compiled: bool, dropout: float
):
    model = tiny("gemma3")
    attach_adapters(model, AdapterConfig(rank=4, dropout=dropout))
    randomize_adapters(model)
    loss, arrays = make_loss(find_trunk_and_head(model)), arrays_of(one_per_row(examples(2)))
    model.train()
    name = "model.layers.0.mlp.up_proj.lora_b"
    weight = dict(tree_flatten(model.trainable_parameters()))[name]
    direction = mx.random.normal(weight.shape, key=mx.random.key(1))
    classes = [type(block) for block in model.layers]

    def at(shift: float) -> float:
        model.load_weights([(name, weight + shift * direction)], strict=False)
        mx.random.seed(7)
        return loss(model, *arrays).item()

    with grad_checkpointing(model):
        slope = (at(5e-4) - at(-5e-4)) / 1e-3
        model.load_weights([(name, weight)], strict=False)
        call = nn.value_and_grad(model, loss)
        if compiled:
            state = [model.state, mx.random.state]
            step = mx.compile(lambda *arrays: call(model, *arrays), inputs=state, outputs=state)
        else:
            step = lambda *arrays: call(model, *arrays)  # noqa: E731
        mx.random.seed(7)
        _, gradients = step(*arrays)
    gradient = dict(tree_flatten(gradients))[name]
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=2e-3)
    assert [type(block) for block in model.layers] == classes


def test_checkpointing_changes_no_number_without_dropout(tiny: TinyModel):
    rows = examples(6)
    results = [
        run(tiny, rows, iters=3, grad_checkpoint=flag)[0].trainable_parameters()
        for flag in (False, True)
    ]
    for (name, one), (_, other) in zip(
        tree_flatten(results[0]), tree_flatten(results[1]), strict=True
    ):
        assert mx.abs(one - other).max() < 1e-6, name


def test_the_same_seed_gives_the_same_run_to_the_bit(tiny: TinyModel):
    rows = examples(6)
    first, second, other = (
        run(tiny, rows, iters=3, dropout=0.2, seed=seed)[0].trainable_parameters()
        for seed in (1, 1, 2)
    )
    assert same(first, second)
    assert not same(first, other)


def test_validation_is_the_mean_over_tokens_of_the_whole_set(tiny: TinyModel):
    model, rows = tiny("llama"), examples(5)
    trunk_and_head = find_trunk_and_head(model)
    by_row = [score(model, trunk_and_head, [row], 1).loss for row in rows]
    tokens = [int(row.supervised.sum()) for row in rows]
    expected = sum(a * b for a, b in zip(by_row, tokens, strict=True)) / sum(tokens)
    for batch_size in (1, 2, 5, 8):
        assert score(model, trunk_and_head, rows, batch_size).loss == pytest.approx(
            expected, rel=1e-5
        )


def test_events_come_at_their_cadence(tiny: TinyModel):
    _, events = run(tiny, examples(6), iters=7, steps_per_report=3, steps_per_eval=4)
    assert [event["step"] for event in events if "loss" in event] == [1, 3, 6, 7]
    assert [event["step"] for event in events if "valid_loss" in event] == [0, 4, 7]
    assert all(
        event["rate_b"] == pytest.approx(4 * event["rate_a"], rel=1e-6)
        for event in events
        if "loss" in event
    )


def test_saves_come_at_their_cadence_and_at_the_end(tiny: TinyModel):
    saves: list[int] = []
    parts = prepared(tiny, examples(6), iters=5, steps_per_save=2)
    events: list[dict] = []
    train(*parts, report=events.append, save=lambda: saves.append(len(saves)))
    assert len(saves) == 3


def test_a_gpu_gets_a_checkpoint_at_least_every_ten_minutes(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    saves: list[int] = []
    parts = prepared(tiny, examples(6), iters=5, steps_per_save=100, compile="off")
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    train(*parts, report=lambda event: None, save=lambda: saves.append(1))
    assert len(saves) == 1, "a CPU saves at its cadence and at the end only"

    monkeypatch.setattr(trainer, "on_gpu", lambda: True)
    parts = prepared(tiny, examples(6), iters=5, steps_per_save=100, compile="off")
    train(*parts, report=lambda event: None, save=lambda: saves.append(1))
    assert len(saves) == 1 + 5 + 1, "each step, and the last one before its validation too"


def test_a_checkpoint_on_a_gpu_lacks_at_most_ten_minutes_and_one_step(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    """Steps, validations and answers take minutes; a failure in any of them loses little."""
    clock = SimpleNamespace(now=0.0)

    def perf_counter() -> float:
        clock.now += 1e-6
        return clock.now

    clock.perf_counter = perf_counter
    monkeypatch.setattr(trainer, "time", clock)
    monkeypatch.setattr(trainer, "on_gpu", lambda: True)
    state, valid, config = prepared(
        tiny, examples(6), iters=24, steps_per_save=100, steps_per_eval=7, compile="off"
    )
    saved = SimpleNamespace(time=0.0, step=0, early=0)
    lacks: list[float] = []

    def save() -> None:
        saved.time, saved.step = clock.now, state.progress.step
        saved.early += state.progress.owes_validation

    def spend(seconds: float) -> None:
        clock.now += seconds
        if state.progress.step == saved.step:
            saved.time = clock.now  # the checkpoint lacks nothing
        lacks.append(clock.now - saved.time)

    def slow_validate(*_: Any) -> tuple[float, dict]:
        spend(500)
        return 9.0 + state.progress.step, {"valid_loss": 9.0}

    monkeypatch.setattr(trainer, "validate", slow_validate)
    report = lambda event: spend(300 if "valid_loss" in event else 190)  # noqa: E731
    train(state, valid, config, report=report, save=save)
    assert 600 <= max(lacks) <= 600 + 190.1
    assert saved.early
    assert not state.progress.owes_validation


def test_epochs_use_every_row_and_flush_the_last_window(tiny: TinyModel):
    config = configure(TrainConfig, {"epochs": 2, "grad_accumulation_steps": 3})
    length = schedule_of(config, per_epoch=5)
    assert (length.steps, length.batches) == (4, 10)
    _, events = run(tiny, examples(5), epochs=2, grad_accumulation_steps=4)
    rows = examples(5)
    supervised = sum(int(row.supervised.sum()) for row in rows)
    assert sum(event["supervised_tokens"] for event in events if "loss" in event) == 2 * supervised


def test_a_request_to_stop_ends_after_the_update_and_saves(tiny: TinyModel):
    parts = prepared(tiny, examples(6), iters=50)
    events: list[dict] = []
    saves: list[int] = []

    def report(event: dict) -> None:
        events.append(event)
        if event["step"] == 3 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with interruptible() as requested:
        ended = train(*parts, report=report, save=lambda: saves.append(1), stop_requested=requested)
    assert ended == "interrupted"
    assert events[-1]["step"] == 3
    assert saves == [1]
    assert signal.getsignal(signal.SIGINT) is handler


@given(st.lists(st.integers(2, 200), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_uses_every_row_once_in_an_order_of_seed_and_epoch(
    lengths: list[int], batch_size: int, epoch: int
):
    rows = [
        Example(np.full(length, number, np.int32), np.arange(length) > 0, str(number))
        for number, length in enumerate(lengths)
    ]
    batches = Batches(rows, batch_size, seed=3)
    picked = [batches[epoch * batches.per_epoch + i] for i in range(batches.per_epoch)]
    filled = [batch.tokens[batch.row_lengths > 0] for batch in picked]
    seen = [int(row[0]) for rows_of_batch in filled for row in rows_of_batch]
    assert sorted(seen) == list(range(len(rows)))
    assert sum(batch.target_count for batch in picked) == sum(length - 1 for length in lengths)
    again = Batches(rows, batch_size, seed=3)[epoch * batches.per_epoch]
    assert np.array_equal(again.tokens, picked[0].tokens)
    assert sum(batch.target_count for batch in in_order(rows, batch_size)) == sum(
        length - 1 for length in lengths
    )


@given(st.integers(1, 100_000))
def test_the_ladder_is_short_and_close(count: int):
    rung = round_up(count)
    assert rung >= count
    assert rung == round_up(rung)
    assert rung - count < max(8, count / 8 + 1)
    assert len({round_up(i) for i in range(1, 2049)}) <= 49


def test_no_pad_is_supervised_and_the_position_before_predicts():
    rows = examples(3)
    batch = one_per_row(rows)
    flat = batch.tokens.flatten()
    length = batch.tokens.shape[1]
    expected = [
        (row * length + i - 1, int(example.tokens[i]))
        for row, example in enumerate(rows)
        for i in np.flatnonzero(example.supervised)
    ]
    real = batch.weights > 0
    assert list(zip(batch.positions[real], batch.targets[real], strict=True)) == expected
    assert all(
        flat[position] == rows[position // length].tokens[position % length]
        for position, _ in expected
    )


def test_history_reports_padding_and_shapes(tiny: TinyModel):
    rows = examples(40)
    _, events = run(tiny, rows, iters=20, batch_size=4)
    reports = [event for event in events if "loss" in event]
    batches = [Batches(rows, 4, 0)[n] for n in range(20)]
    assert reports[-1]["shapes"] == len(
        {(batch.tokens.shape, batch.targets.shape) for batch in batches}
    )
    assert [event["padding"] for event in reports] == [
        1 - batch.token_count / batch.tokens.size for batch in batches
    ]
