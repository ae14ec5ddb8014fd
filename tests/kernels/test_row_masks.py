"""Packed rows: nothing lost, nobody sees the neighbour, and the same logits and gradients as without packing."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import _get_classes

import mlx_loraplus.kernels.row_masks as packing_module
from mlx_loraplus import ConfigError, LoRAPlus
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import trainable_summary
from mlx_loraplus.config import AdapterConfig, TrainConfig
from mlx_loraplus.data.batches import arrays_of, inputs_of, lay_out, one_per_row, round_up
from mlx_loraplus.data.packing import PackedBatches, best_fit, choose_length
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.patch import grad_checkpointing
from mlx_loraplus.kernels.row_masks import RowCache, check_packing, row_caches
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.settings import configure
from mlx_loraplus.training.make_batches import make_batches
from mlx_loraplus.training.schedule import schedule_of
from mlx_loraplus.training.trainer import TrainState, train
from tests.conftest import CONFIGS, TinyModel, randomize_adapters, same
from tests.training.tiny_runs import assert_same_step, examples

FAMILIES = ["llama", "gemma3", "qwen3", "cohere"]  # gemma3: a sliding window of 8
NOT_PACKED: dict[str, dict[str, Any]] = {
    "mamba": {
        "model_type": "mamba", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "state_size": 8,
        "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
    },
    "lfm2": {
        "model_type": "lfm2", "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "norm_eps": 1e-5, "conv_bias": False,
        "conv_L_cache": 3, "block_dim": 64, "block_ff_dim": 96, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1], "rope_theta": 10000.0,
    },
    "gpt2": {
        "model_type": "gpt2", "n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64,
        "layer_norm_epsilon": 1e-5, "vocab_size": 128,
    },
}  # fmt: skip


def packed(rows: list[list[Example]]) -> Any:
    """Lay rows out with a few tokens of padding and an empty row."""
    return lay_out([*rows, []], packed=round_up(max(sum(map(inputs_of, row)) for row in rows) + 3))


def relative(one: mx.array, other: mx.array) -> float:
    return (mx.linalg.norm((one - other).flatten()) / mx.linalg.norm(other.flatten())).item()  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("kind", [*FAMILIES, "mixtral"])
def test_packed_logits_are_those_of_each_example_alone(tiny: TinyModel, kind: str):
    model, rows = tiny(kind), examples(7, longest=24)
    batch = packed([rows[:3], rows[3:5], rows[5:]])
    logits = model(mx.array(batch.tokens), cache=row_caches(model, mx.array(batch.segments)))
    assert mx.isfinite(logits).all(), "padding and empty rows"
    for row, group in enumerate((rows[:3], rows[3:5], rows[5:])):
        start = 0
        for example in group:
            end = start + inputs_of(example)
            alone = model(mx.array(example.tokens[None, : end - start]))
            assert relative(logits[row, start:end], alone[0]) < 1e-5
            start = end


def leak(model: nn.Module, cache: list[Any] | None) -> float:
    """Return how far the second example's logits move when a token of the first one changes."""
    tokens = mx.array(
        [[5, 9, 3, 7, 2, 8, 4, 6, 1, 11, 12, 13], [5, 9, 3, 77, 2, 8, 4, 6, 1, 11, 12, 13]]
    )
    logits = model(tokens, cache=cache)[:, 5:]
    return mx.abs(logits[0] - logits[1]).max().item()  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_example_sees_another(tiny: TinyModel, kind: str):
    model = tiny(kind)
    segments = mx.array([[1] * 5 + [2] * 7] * 2)
    assert leak(model, row_caches(model, segments)) == 0
    assert leak(model, None) > 1e-2, "a plain causal mask leaks, and this test sees it"
    assert leak(model, row_caches(model, mx.ones_like(segments))) > 1e-2


def test_the_mask_is_causal_block_diagonal_and_windowed():
    segments = [[1, 1, 1, 1, 2, 2, 0, 0], [0] * 8]
    for window in (None, 1, 3, 8):
        mask = np.array(RowCache(mx.array(segments)).make_mask(8, window_size=window))
        assert mask.shape == (2, 1, 8, 8)
        for row, i, j in np.ndindex(2, 8, 8):
            together = segments[row][i] == segments[row][j]
            assert mask[row, 0, i, j] == (together and 0 <= i - j < (window or 8))


def gradients_of(
    model: nn.Module, loss: Any, batches: list[Any]
) -> tuple[float, dict[str, mx.array]]:
    """Return the loss and gradients summed over batches."""
    total, sums = 0.0, {}
    for batch in batches:
        value, gradients = nn.value_and_grad(model, loss)(model, *arrays_of(batch))
        total += value.item()
        for name, gradient in tree_flatten(gradients):
            sums[name] = sums[name] + gradient if name in sums else gradient
    return total, sums


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_gradients_are_the_unpacked_ones(
    tiny: TinyModel, kind: str, split: bool, checkpoint: bool
):
    model, rows = tiny(kind), examples(9, longest=20)
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(
        model, size=0.02
    )  # larger ones make Gemma 3's gradient of rounding larger than 1e-5
    loss = make_loss(find_trunk_and_head(model) if split else None)
    expected, slopes = gradients_of(model, loss, [one_per_row([row]) for row in rows])
    batches = PackedBatches(rows, 2, seed=0, max_length=48)
    together = [batches[n] for n in range(batches.per_epoch)]
    if checkpoint:
        with grad_checkpointing(model):
            value, gradients = gradients_of(model, loss, together)
    else:
        value, gradients = gradients_of(model, loss, together)
    assert value == pytest.approx(expected, rel=1e-5)
    for name, slope in slopes.items():
        assert relative(gradients[name], slope) < 1e-5, name


@given(
    st.lists(st.integers(2, 200), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(200, 600),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_an_epoch_has_each_example_once_in_one_shape(
    lengths: list[int], batch_size: int, longest: int, epoch: int, random: Any
):
    rows = []
    for number, length in enumerate(lengths):
        supervised = np.array([False, *(random.random() < 0.5 for _ in range(length - 2)), True])
        tokens = np.array(
            [number + 1, *(random.randrange(1, 99) for _ in range(length - 1))], np.int32
        )
        rows.append(Example(tokens, supervised, str(number)))
    batches = PackedBatches(rows, batch_size, 3, longest)
    first = epoch * batches.per_epoch
    picked = [batches[first + n] for n in range(batches.per_epoch)]
    assert {batch.tokens.shape for batch in picked} == {(batches.batch_size, batches.row_length)}
    assert batches.row_length <= round_up(longest)
    seen = []
    for batch in picked:
        assert batch.segments is not None
        inputs, segments = batch.tokens.flatten(), batch.segments
        real = batch.weights > 0
        learned = dict(
            zip(batch.positions[real].tolist(), batch.targets[real].tolist(), strict=True)
        )
        assert len(learned) == real.sum() == batch.target_count
        assert batch.token_count == (segments > 0).sum()
        for row in range(batches.batch_size):
            for segment in range(1, segments[row].max() + 1):
                places = row * batches.row_length + np.flatnonzero(segments[row] == segment)
                example = rows[inputs[places[0]] - 1]
                seen.append(int(example.place))
                assert np.array_equal(inputs[places], example.tokens[: len(places)])
                assert len(places) == inputs_of(example)
                for i in range(len(places)):  # what follows the last input is learned, but no input
                    assert learned.pop(int(places[i]), None) == (
                        example.tokens[i + 1] if example.supervised[i + 1] else None
                    )
        assert not learned, "every target belongs to an example"
    assert sorted(seen) == list(range(len(rows)))
    useful = sum(batch.token_count for batch in picked)
    assert batches.fill == pytest.approx(useful / sum(batch.tokens.size for batch in picked))


def test_the_order_is_a_function_of_seed_and_epoch():
    rows = examples(60)
    batches = PackedBatches(rows, 2, 5, 64)
    last = 3 * batches.per_epoch - 1
    third = [batches[n].tokens for n in range(2 * batches.per_epoch, last + 1)]
    again = PackedBatches(rows, 2, 5, 64)
    assert np.array_equal(again[last].tokens, third[-1]), "without the batches before it"
    assert not all(np.array_equal(again[n].tokens, tokens) for n, tokens in enumerate(third))
    other = PackedBatches(rows, 2, 6, 64)
    assert not all(
        np.array_equal(other[2 * batches.per_epoch + n].tokens, tokens)
        for n, tokens in enumerate(third)
    )


def test_examples_of_one_length_change_rows():
    rows = [
        Example(np.full(12, number, np.int32), np.arange(12) > 0, "") for number in range(1, 41)
    ]
    batches = PackedBatches(rows, 2, 0, 32)
    assert batches.row_length == 24
    groups = [
        {
            frozenset(row.tolist())
            for n in range(batches.per_epoch)
            for row in batches[first + n].tokens
        }
        for first in (0, batches.per_epoch)
    ]
    assert groups[0] != groups[1]


def test_rows_of_the_demo_set_are_full():
    # How many rows of the demo set have so many inputs in Gemma's tokens.
    counts = {
        28: 5, 29: 40, 30: 85, 31: 80, 32: 110, 33: 121, 34: 238, 35: 131, 36: 79, 37: 74, 38: 33, 39: 11, 40: 26,
        41: 24, 42: 20, 43: 49, 44: 30, 45: 19, 46: 18, 47: 1, 48: 4, 49: 2,
    }  # fmt: skip
    descending = -np.sort(-np.repeat(list(counts), list(counts.values())))
    rows = best_fit(descending, 512)
    assert descending.sum() / (512 * len(rows)) > 0.95
    length = choose_length(descending, 8, 512)
    batches = -(-len(best_fit(descending, length)) // 8)
    assert descending.sum() / (batches * 8 * length) > 0.95


def test_the_row_is_no_longer_than_it_needs_to_be():
    assert choose_length(np.full(512, 128), 8, 2048) == 128, "rows that fit as they are"
    assert choose_length(np.full(8, 2), 8, 2048) == 8, (
        "a small set does not become one long row and seven empty ones"
    )
    assert choose_length(np.repeat([90, 30], 512), 8, 2048) == 120


def trained(
    tiny: TinyModel, kind: str = "llama", *, grad_checkpoint: bool = False, **settings: Any
) -> tuple[nn.Module, list[dict]]:
    config = configure(
        TrainConfig, {"batch_size": 2, "warmup": 0, "steps_per_report": 1, "pack": True} | settings
    )
    model, rows = tiny(kind), examples(24, longest=20)
    mx.random.seed(5)
    attach_adapters(model, AdapterConfig(rank=4, dropout=config.adapter.dropout))
    batches = PackedBatches(rows, config.data.batch_size, config.seed, 48)
    length = schedule_of(config, batches.per_epoch)
    optimizer = LoRAPlus(config.optimizer, length.steps)
    optimizer.init(model, trainable_summary(model).groups)
    events: list[dict] = []
    state = TrainState(
        model,
        find_trunk_and_head(model),
        optimizer,
        batches,
        length,
        grad_checkpoint=grad_checkpoint,
    )
    train(state, rows[:3], config, report=events.append, save=lambda: None)
    return model, events


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_compiled_packed_run_is_the_eager_one(tiny: TinyModel, kind: str):
    settings = {"iters": 4, "grad_accumulation_steps": 2, "dropout": 0.1, "grad_checkpoint": True}
    (eager, first), (compiled, second) = (
        trained(tiny, kind, compile=mode, **settings) for mode in ("off", "on")
    )
    losses = [[event["loss"] for event in events if "loss" in event] for events in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one: dict[str, mx.array] = dict(tree_flatten(eager.trainable_parameters()))
    other: dict[str, mx.array] = dict(tree_flatten(compiled.trainable_parameters()))
    for name, value in one.items():
        assert mx.abs(value - other[name]).max() < 2e-5, name


def test_a_packed_epoch_learns_every_supervised_token(tiny: TinyModel):
    _, events = trained(tiny, epochs=2, grad_accumulation_steps=3)
    rows = examples(24, longest=20)
    supervised = 2 * sum(int(row.supervised.sum()) for row in rows)
    assert sum(event["supervised_tokens"] for event in events if "loss" in event) == supervised


def test_accumulating_packed_batches_is_one_batch_by_tokens(tiny: TinyModel):
    model, rows = tiny("llama"), examples(8)
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    groups = [rows[:3], rows[3:5], rows[5:]]
    assert_same_step(model, [[packed(groups)], [packed([group]) for group in groups]])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_that_can_be_packed_passes_the_check_unchanged(
    tiny: TinyModel, kind: str, dtype: mx.Dtype
):
    model = tiny(kind)
    model.set_dtype(dtype)
    attach_adapters(model, AdapterConfig(rank=4, dropout=0.5))
    model.train()
    before = dict(tree_flatten(model.parameters()))
    check_packing(model)
    assert model.training
    assert same(before, dict(tree_flatten(model.parameters())))


@pytest.mark.parametrize("kind", ["llama4", "gemma2", *NOT_PACKED])
def test_a_model_that_cannot_be_packed_is_told(
    tiny: TinyModel, kind: str, monkeypatch: pytest.MonkeyPatch
):
    if kind in NOT_PACKED:
        monkeypatch.setitem(CONFIGS, kind, NOT_PACKED[kind])
    model = tiny(kind)
    with pytest.raises(
        ConfigError, match=rf"pack does not work with this model \({kind}.*leave --pack off"
    ):
        check_packing(model)
    assert not model.training


def test_the_pack_setting_packs_or_refuses(tiny: TinyModel):
    told: list[str] = []
    config = configure(TrainConfig, {"pack": True, "batch_size": 2, "max_seq_length": 64})
    batches = make_batches(tiny("llama"), examples(50), config, told.append)
    assert told == [f"train: {batches}"]
    assert batches[0].segments is not None
    assert batches[0].tokens.shape == (2, batches[1].tokens.shape[1])
    assert make_batches(tiny("llama"), examples(50), TrainConfig(), told.append)[0].segments is None
    with pytest.raises(ConfigError, match="leave --pack off"):
        make_batches(tiny("llama4"), examples(50), config, told.append)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_check_finds_a_mask_that_leaks(
    tiny: TinyModel, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        packing_module, "row_caches", lambda model, _: [KVCache() for _ in range(len(model.layers))]
    )
    with pytest.raises(ConfigError, match="leave --pack off"):
        check_packing(tiny(kind))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("family", ["hunyuan_v1_dense", "hunyuan"])
def test_keys_that_are_normalized_behind_their_rotation_are_refused(family: str, dtype: mx.Dtype):
    """A weighted norm of rotated keys depends on the place in the row, a little: half precision would hide it."""
    config = json.loads((Path(__file__).parents[1] / "families" / "configs.json").read_text())[
        family
    ]
    mx.random.seed(0)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    for path, module in model.named_modules():
        if path.endswith(("query_layernorm", "key_layernorm")):
            module.weight = mx.random.uniform(0.5, 1.5, module.weight.shape)
    model.set_dtype(dtype)
    model.eval()
    with pytest.raises(ConfigError, match="pack does not work with this model"):
        check_packing(model)


def test_the_check_disturbs_nothing(tiny: TinyModel):
    model = tiny("gemma3")
    model.train()
    mx.random.seed(5)
    before, arrays = mx.random.state[0].tolist(), dict(tree_flatten(model.parameters()))
    check_packing(model)
    assert mx.random.state[0].tolist() == before
    assert model.training
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == arrays.keys()
    assert all(after[name] is array for name, array in arrays.items())
