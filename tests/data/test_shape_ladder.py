"""Few shapes and little padding, for any lengths; and eager steps without the padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_loraplus.data.batches import Batches, in_order, trimmed
from mlx_loraplus.data.packing import PackedBatches
from mlx_loraplus.data.shape_ladder import MAX_SHAPES, ShapeLadder, multiple_of_8
from mlx_loraplus.data.tokenize import Example


def example(length: int, supervised: int, source: int) -> Example:
    tokens = np.arange(length + 1, dtype=np.int32) + source
    return Example(tokens, np.arange(length + 1) > length - supervised, str(source))


def some_examples(kind: str, count: int) -> list[Example]:
    chance = np.random.default_rng(1)
    if kind == "chat":
        lengths = np.clip(350 * np.exp(0.9 * chance.standard_normal(count)), 16, 2047).astype(int)
    else:
        lengths = np.clip(chance.normal(80, 25, count), 30, 250).astype(int)
    supervised = np.maximum(1, (lengths * chance.uniform(0.15, 0.85, count)).astype(int))
    return [
        example(int(n), int(m), row)
        for row, (n, m) in enumerate(zip(lengths, supervised, strict=True))
    ]


@pytest.mark.parametrize(("kind", "batch_size", "most"), [("chat", 4, 48), ("short", 8, 24)])
def test_a_thousand_steps_have_few_shapes_and_little_padding(kind: str, batch_size: int, most: int):
    batches = Batches(some_examples(kind, 3001), batch_size, seed=0)
    shapes: set[tuple[int, int, int]] = set()
    useful, padded = 0, 0
    for number in range(1000):
        batch = batches[number]
        shapes.add((*batch.tokens.shape, batch.targets.size))
        assert batches.shape_of(batches.rows_of(number)) == (
            *batch.tokens.shape,
            batch.targets.size,
        )
        useful += batch.token_count
        padded += batch.tokens.size
    assert len(shapes) <= most
    assert 1 - useful / padded <= 0.08


def counts_of(batches: Batches, share: slice = slice(None)) -> tuple[int, float]:
    """Return the number of shapes in a thousand steps, and the share of padding."""
    shapes: set[tuple[int, int, int]] = set()
    useful, padded = 0, 0
    for number in range(1000):
        rows = batches.rows_of(number)[share]
        if rows:
            rows_padded, length, targets = batches.shape_of(rows)
            shapes.add((rows_padded, length, targets))
            useful += sum(int(batches.lengths[row].sum()) for row in rows)
            padded += rows_padded * length
    return len(shapes), 1 - useful / padded


@pytest.mark.parametrize("count", [200, 3001])
@pytest.mark.parametrize(("kind", "batch_size", "most"), [("chat", 4, 48), ("short", 8, 24)])
def test_all_ways_to_train_and_validate_have_few_shapes_and_little_padding(
    kind: str, batch_size: int, most: int, count: int
):
    rows = some_examples(kind, count)

    # Small sets; each of two processes; packed rows.
    found = {
        "alone": counts_of(Batches(rows, batch_size, 0)),
        "first of two": counts_of(Batches(rows, batch_size, 0, processes=2), slice(0, None, 2)),
        "second of two": counts_of(Batches(rows, batch_size, 0, processes=2), slice(1, None, 2)),
        "packed": counts_of(PackedBatches(rows, batch_size, 0, max_length=2048)),
        "packed, one row": counts_of(PackedBatches(rows, 1, 0, max_length=2048)),
    }

    # Validation.
    batches = list(in_order(rows, batch_size))
    shapes = {(*batch.tokens.shape, batch.targets.size) for batch in batches}
    useful, padded = (
        sum(sizes) for sizes in zip(*((b.token_count, b.tokens.size) for b in batches), strict=True)
    )
    found["validation"] = len(shapes), 1 - useful / padded

    assert {name: shapes for name, (shapes, _) in found.items() if shapes > most} == {}
    assert {name: padding for name, (_, padding) in found.items() if padding > 0.08} == {}


def test_trimming_drops_only_what_is_padding():
    for number, batch in enumerate(
        map(Batches(some_examples("chat", 41), 4, seed=0).__getitem__, range(22))
    ):
        small = trimmed(batch)
        rows, length = small.tokens.shape
        assert length == multiple_of_8(int(batch.row_lengths.max()))
        assert small.token_count == np.count_nonzero(small.row_lengths[:, None] > np.arange(length))
        assert (rows == 4) == (number % 11 != 10) or rows == np.count_nonzero(batch.row_lengths)
        real = small.weights > 0
        states = small.tokens.reshape(-1)[small.positions[real]]
        before = batch.tokens.reshape(-1)[batch.positions[batch.weights > 0]]
        assert np.array_equal(states, before)
        assert np.array_equal(small.targets[real], batch.targets[batch.weights > 0])


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=200))
def test_every_batch_fits_and_shapes_stay_few(pairs: list[tuple[int, int]]):
    lengths, targets = (np.array(side) for side in zip(*pairs, strict=True))
    ladder = ShapeLadder.fit(lengths, lengths, targets, 3000)
    shapes = {ladder.shape(int(n), int(m)) for n, m in pairs}
    assert len(shapes) <= MAX_SHAPES
    for (length, count), (n, m) in zip(map(ladder.shape, lengths, targets), pairs, strict=True):
        assert length >= n
        assert count >= m
    assert ladder.shape(3000, 10**6) == (3000, 10**6)
