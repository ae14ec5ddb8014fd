"""Chunked attention and gated MLPs compute what the model's own do, with their gradients, and leave nothing behind."""

import gc
import statistics

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

import mlx_loraplus.kernels.attention as attention_module
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig, OptimizerConfig
from mlx_loraplus.kernels.attention import CausalMask, attention
from mlx_loraplus.kernels.cross_entropy import make_loss
from mlx_loraplus.kernels.elementwise import GATES
from mlx_loraplus.kernels.patch import grad_checkpointing, memory_efficient, replaced_attention
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.training.make_step import make_step
from mlx_loraplus.training.optimizer import LoRAPlus
from tests.conftest import CONFIGS, TinyModel, randomize_adapters

NATIVE = mx.fast.scaled_dot_product_attention


def relative(one: mx.array, other: mx.array) -> float:
    return (mx.linalg.norm((one - other).flatten()) / mx.linalg.norm(other.flatten())).item()  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 3, 8, 11])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_and_its_gradients_are_mlxs_own(
    monkeypatch: pytest.MonkeyPatch,
    heads: tuple[int, int],
    window: int | None,
    packed: bool,
    compiled: bool,
):
    monkeypatch.setattr(attention_module, "CHUNK", 8)  # 21 tokens: two whole chunks and a short one
    keys = mx.random.split(mx.random.key(0), 4)
    q = mx.random.normal((2, heads[0], 21, 16), key=keys[0])
    k, v = (
        mx.random.normal((2, heads[1], 21, width), key=key)
        for width, key in ((16, keys[1]), (12, keys[2]))
    )
    segments = mx.array([[1] * 5 + [2] * 9 + [3] * 4 + [0] * 3, [1] * 21]) if packed else None
    mask, whole = CausalMask(window, segments), slice(0, 21)
    weights = mx.random.normal((2, heads[0], 21, 12), key=keys[3])

    def ours(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        out = attention(q, k, v, 0.3, mask)
        return (out * weights).sum(), out

    def native(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        out = NATIVE(q, k, v, scale=0.3, mask=mask.part(whole, whole))
        return (out * weights).sum(), out

    learn = mx.value_and_grad(ours, argnums=(0, 1, 2))
    (_, out), gradients = (mx.compile(learn) if compiled else learn)(q, k, v)
    (_, expected), others = mx.value_and_grad(native, argnums=(0, 1, 2))(q, k, v)
    assert relative(out, expected) < 1e-6  # of the sum less is known: its terms cancel
    for gradient, other in zip(gradients, others, strict=True):
        assert relative(gradient, other) < 1e-5


SEGMENTS = mx.array([[1] * 5 + [2] * 9 + [3] * 4 + [0] * 3, [1] * 21])


@pytest.mark.parametrize("kind", ["native", "chunked"])
@pytest.mark.parametrize(
    ("mask", "has_sinks"),
    [
        ("causal", True),
        (CausalMask(), True),
        (CausalMask(5), True),
        (CausalMask(segments=SEGMENTS), True),
        (CausalMask(5).part(slice(0, 21), slice(0, 21)), False),
        (None, False),
    ],
    ids=["causal sinks", "plain sinks", "window sinks", "packed sinks", "array", "none"],
)
def test_attention_sinks_and_array_masks_are_left_to_mlx(mask, has_sinks: bool, kind):
    keys = mx.random.split(mx.random.key(3), 5)
    q = mx.random.normal((2, 4, 21, 16), key=keys[0])
    k, v = (mx.random.normal((2, 2, 21, 16), key=key) for key in keys[1:3])
    sinks = mx.random.normal((4,), key=keys[3]) if has_sinks else None
    weights = mx.random.normal((2, 4, 21, 16), key=keys[4])

    def learn(attend, mask) -> list[mx.array]:
        def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return (attend(q, k, v, scale=0.3, mask=mask, sinks=sinks) * weights).sum()

        value, gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
        return [value, *gradients]

    with replaced_attention(kind):
        ours = learn(mx.fast.scaled_dot_product_attention, mask)
    whole = slice(0, 21)
    causal = CausalMask() if mask == "causal" else mask
    array = causal.part(whole, whole) if isinstance(causal, CausalMask) else mask
    for found, expected in zip(ours, learn(NATIVE, array), strict=True):
        assert relative(found, expected) < 1e-5


def test_a_chunk_looks_at_no_key_that_its_window_hides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_module, "CHUNK", 8)
    assert [(q.start, q.stop, k.start, k.stop) for q, k in CausalMask(window=8).chunks(28)] == [
        (0, 8, 0, 8), (8, 16, 0, 16), (16, 24, 8, 24), (24, 28, 16, 28)
    ]  # fmt: skip
    assert [(k.start, k.stop) for _, k in CausalMask().chunks(20)] == [(0, 8), (0, 16), (0, 20)]


@pytest.mark.parametrize(("name", "own"), [("silu", nn.silu), ("gelu_approx", nn.gelu_approx)])
def test_gates_and_their_gradients_are_mlxs_own(name: str, own):
    gate, up = (
        mx.random.normal((3, 200), key=key) * 4 for key in mx.random.split(mx.random.key(1))
    )
    gate = mx.concatenate([gate, mx.array([[-100.0, 100.0, 0.0, -30.0] * 50])])
    up = mx.concatenate([up, mx.ones((1, 200))])
    value, gradients = mx.value_and_grad(
        lambda g, u: mx.sin(GATES[name](g, u)).sum(), argnums=(0, 1)
    )(gate, up)
    expected, others = mx.value_and_grad(lambda g, u: mx.sin(own(g) * u).sum(), argnums=(0, 1))(
        gate, up
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(
        relative(gradient, other) < 1e-5 for gradient, other in zip(gradients, others, strict=True)
    )
    half = GATES[name](gate.astype(mx.bfloat16), up.astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16
    assert relative(half.astype(mx.float32), own(gate) * up) < 1e-2


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("bits", [None, 4])
def test_a_lean_model_computes_the_same_and_is_left_as_it_was(
    tiny: TinyModel, kind: str, bits: int | None
):
    model = tiny(kind, bits=bits)
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    tokens = mx.array(
        [[1, 5, 2, 7, 3, 9, 11, 100, 50, 3, 8, 8], [4, 4, 2, 6, 1, 90, 3, 3, 12, 0, 0, 0]]
    )
    classes = [type(module) for _, module in model.named_modules()]
    learn = nn.value_and_grad(model, lambda model, tokens: mx.sin(model(tokens)).sum())
    expected, others = learn(model, tokens)
    mx.eval(expected, others)
    with memory_efficient(model):
        value, gradients = learn(model, tokens)
        mx.eval(value, gradients)
        changed = sum(type(module) not in classes for _, module in model.named_modules())
    assert changed == (
        0 if kind in ("mixtral", "qwen3_moe") else len(model.layers)
    )  # these have experts only
    assert [type(module) for _, module in model.named_modules()] == classes
    assert mx.fast.scaled_dot_product_attention is NATIVE
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    for (name, gradient), (_, other) in zip(
        tree_flatten(gradients), tree_flatten(others), strict=True
    ):
        assert relative(gradient, other) < 2e-5, name


def test_an_mlp_that_computes_something_else_stays_as_it_is(tiny: TinyModel):
    model = tiny("llama")
    own = type(model.layers[0].mlp)

    class Doubled(own):
        def __call__(self, x: mx.array) -> mx.array:
            return 2 * super().__call__(x)

    model.layers[0].mlp.__class__ = Doubled
    with memory_efficient(model):
        assert type(model.layers[0].mlp) is Doubled
        assert type(model.layers[1].mlp) is not own


@pytest.mark.parametrize("limit", [16.0, 100.0])
def test_an_mlp_that_clamps_far_out_stays_as_it_is(tiny: TinyModel, limit: float):
    model = tiny("llama")
    own = type(model.layers[0].mlp)

    class Clamped(own):
        def __call__(self, x: mx.array) -> mx.array:
            gate, up = nn.silu(self.gate_proj(x)), self.up_proj(x)
            return self.down_proj(mx.minimum(gate, limit) * mx.clip(up, -limit, limit))

    model.layers[0].mlp.__class__ = Clamped
    with memory_efficient(model):
        assert type(model.layers[0].mlp) is Clamped
        assert type(model.layers[1].mlp) is not own


def test_exact_gelu_is_not_taken_for_gelu_by_tanh(tiny: TinyModel):
    model = tiny("llama")
    own = type(model.layers[0].mlp)

    class Gelu(own):
        def __call__(self, x: mx.array) -> mx.array:
            return self.down_proj(nn.gelu(self.gate_proj(x)) * self.up_proj(x))

    model.layers[0].mlp.__class__ = Gelu
    with memory_efficient(model):
        assert type(model.layers[0].mlp) is Gelu


def peak_of_a_checkpointed_step(layers: int, *, compiled: bool) -> int:
    """Return the bytes of a step of a Llama of so many blocks, above what is alive before it."""
    config = {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": 64,
        "intermediate_size": 256, "num_attention_heads": 1, "num_key_value_heads": 1,
        "vocab_size": 128, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    model = llama.Model(llama.ModelArgs.from_dict(config))
    groups = attach_adapters(model, AdapterConfig(rank=4)).groups
    optimizer = LoRAPlus(OptimizerConfig(learning_rate=1e-4), total_steps=10)
    optimizer.init(model, groups)
    accumulate, update = make_step(
        model, make_loss(find_trunk_and_head(model)), optimizer, compiled=compiled
    )
    tokens, targets = mx.zeros((8, 128), mx.int32), mx.arange(16)
    mx.eval(model.parameters(), optimizer.state)

    gc.collect()  # what other tests have left must not be freed while the peak is measured
    peaks = []
    with memory_efficient(model), grad_checkpointing(model):
        for _ in range(6):  # the second compiles
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            sums = accumulate((tokens, targets, targets, mx.ones(16)), None)
            mx.eval(update(*sums, mx.array(16.0)), model.state, optimizer.state)
            peaks.append(mx.get_peak_memory() - before)

    # On a busy CPU, MLX allocates ahead of what it computes, so a peak varies by some scores of
    # attention: short rows and one head keep these small beside the input of a block.
    return int(statistics.median(peaks[2:]))


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_keeps_the_input_of_each_block_and_no_more(compiled: bool):
    few, many = (peak_of_a_checkpointed_step(layers, compiled=compiled) for layers in (4, 12))
    block_input = 8 * 128 * 64 * 4
    assert (many - few) / 8 < 1.2 * block_input
