"""The order of rows: a pure function of (seed, epoch, index), the same on one machine or several."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_loraplus.config import TrainConfig
from mlx_loraplus.data.batches import Batches, in_order, one_per_row
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.settings import configure
from mlx_loraplus.training.make_batches import plan_batches


def examples(count: int) -> list[Example]:
    lengths = np.random.default_rng(0).integers(2, 40, count)
    return [
        Example(np.full(n, row + 1, np.int32), np.arange(n) > 0, str(row))
        for row, n in enumerate(lengths)
    ]


def planned(count: int, *, pack: bool, seed: int = 0, batch_size: int = 4) -> Batches:
    config = configure(TrainConfig, {"pack": pack, "batch_size": batch_size, "max_seq_length": 64})
    return plan_batches(examples(count), config.data, seed)


@settings(max_examples=40, deadline=None)
@given(
    pack=st.booleans(),
    seed=st.integers(0, 3),
    order=st.permutations(range(12)),
    count=st.integers(1, 40),
)
def test_a_batch_is_a_function_of_its_number(pack, seed, order, count):
    """So a number is all that a checkpoint has to hold, whatever was read before."""
    one, other = planned(count, pack=pack, seed=seed), planned(count, pack=pack, seed=seed)
    straight = [one[n] for n in range(12)]
    for n in order:
        np.testing.assert_array_equal(other[n].tokens, straight[n].tokens)
        np.testing.assert_array_equal(other[n].targets, straight[n].targets)


@pytest.mark.parametrize("pack", [False, True])
def test_an_epoch_uses_every_example_once_and_the_next_has_another_order(pack: bool):
    batches = planned(101, pack=pack)
    epochs = [
        [int(i) for n in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
         for row in batches.rows_of(n) for i in row]
        for epoch in range(3)
    ]  # fmt: skip
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = planned(101, pack=pack, seed=1)
    assert [row.tolist() for row in other.rows_of(0)] != [
        row.tolist() for row in batches.rows_of(0)
    ]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("machines", [2, 4])
def test_four_machines_see_together_what_one_sees(pack: bool, machines: int):
    """Each takes every fourth row of a batch: together they learn the batch's targets, each once."""
    one, ours = planned(50, pack=pack), [planned(50, pack=pack) for _ in range(machines)]
    for n in range(2 * one.per_epoch):
        whole = one[n]
        parts = [
            batches.collate(rows)
            for m, batches in enumerate(ours)
            if (rows := batches.rows_of(n)[m::machines])
        ]
        assert sum(part.target_count for part in parts) == whole.target_count
        together = np.concatenate([part.targets[: part.target_count] for part in parts])
        np.testing.assert_array_equal(
            np.sort(together), np.sort(whole.targets[: whole.target_count])
        )


def test_shapes_are_known_without_reading_rows():
    for pack in (False, True):
        batches = planned(60, pack=pack)
        for n in range(batches.per_epoch):
            batch = batches[n]
            shape = (*batch.tokens.shape, batch.targets.size)
            assert batches.shape_of(batches.rows_of(n)) == shape
        assert batches.largest()[1] == max(
            batches[n].tokens.shape[1] for n in range(batches.per_epoch)
        )


def test_evaluation_sees_all_rows_in_any_order():
    rows = examples(30)
    seen = [batch.targets[: batch.target_count] for batch in in_order(rows, 4)]
    assert np.bincount(np.concatenate(seen))[1:].tolist() == [len(row.tokens) - 1 for row in rows]
    assert one_per_row(rows[:1]).target_count == len(rows[0].tokens) - 1
