"""MLX's own gated delta rule is used where a trial shows that it is mlx-lm's loop."""

from collections.abc import Iterator
from typing import Any

import mlx_loraplus  # noqa: F401  # isort: skip  before mlx
import mlx.core as mx
import pytest

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.kernels.choices import StepChoices
from mlx_loraplus.kernels.delta_rule import equals_loop
from tests.conftest import randomize_adapters
from tests.kernels.test_choices import learn
from tests.training.test_self_consistency import family

RIGHT = mx.fast.gated_delta_update
DTYPES = [mx.float32, mx.bfloat16, mx.float16]


@pytest.fixture(autouse=True)
def fresh_trials() -> Iterator[None]:
    """The results of trials with another function are not kept."""
    equals_loop.cache_clear()
    yield
    equals_loop.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlxs_function_is_called_and_tried_in_the_models_type(
    dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
):
    calls: list[tuple[int, mx.Dtype]] = []

    def counted(q: mx.array, *rest: Any) -> Any:
        calls.append((q.shape[1], q.dtype))
        return RIGHT(q, *rest)

    monkeypatch.setattr(mx.fast, "gated_delta_update", counted)
    model = family("qwen3_5")
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    model.set_dtype(dtype)
    model.train()
    learn(model, StepChoices(delta_rule="loop"))
    assert not calls

    # The longest row of the batch has 21 tokens, of which the last is only predicted.
    learn(model, StepChoices(delta_rule="native"))
    assert {found for _, found in calls} == {dtype}
    lengths = [length for length, _ in calls]
    assert lengths.count(70) == 1, "one trial"
    assert len(lengths) > 1
    assert set(lengths) <= {70, 24}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", ["results", "gradients"])
def test_a_function_that_is_wrong_in_the_models_type_is_not_used(
    dtype: mx.Dtype, part: str, monkeypatch: pytest.MonkeyPatch
):
    """It is wrong by a tenth, in one type only."""

    def wrong(q: mx.array, k: mx.array, v: mx.array, *rest: Any) -> Any:
        if q.dtype != dtype:
            return RIGHT(q, k, v, *rest)
        if part == "gradients":
            v = 1.1 * v - 0.1 * mx.stop_gradient(v)
        y, state = RIGHT(q, k, v.astype(dtype), *rest)
        return ((1.1 * y).astype(dtype) if part == "results" else y), state

    assert all(equals_loop(2, 4, 16, 8, each) for each in DTYPES)
    equals_loop.cache_clear()
    monkeypatch.setattr(mx.fast, "gated_delta_update", wrong)
    assert [equals_loop(2, 4, 16, 8, each) for each in DTYPES] == [each != dtype for each in DTYPES]
