"""The choices of a step change its speed, but its loss and gradients only by rounding."""

import io
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.data.batches import arrays_of, lay_out
from mlx_loraplus.data.tokenize import Example
from mlx_loraplus.kernels.attention import CausalMask, attention
from mlx_loraplus.kernels.choices import StepChoices, default_choices
from mlx_loraplus.kernels.cross_entropy import make_loss, make_score, slice_width
from mlx_loraplus.kernels.delta_rule import (
    choices_for,
    delta_rule,
    equals_loop,
    has_delta_rule,
    loop_in_pieces,
)
from mlx_loraplus.kernels.log_probs import make_log_probs
from mlx_loraplus.kernels.patch import memory_efficient, replaced_attention
from mlx_loraplus.kernels.trunk_and_head import find_trunk_and_head
from mlx_loraplus.kernels.window_attention import window_attention
from tests.conftest import make_model, randomize_adapters
from tests.training.test_self_consistency import family

GPU = default_choices(gpu=True)
TINY = 4 * 5 * 23  # bytes: five tokens of the vocabulary for 23 targets
CHOICES = {
    "gpu": GPU,
    "native attention": StepChoices(attention="native"),
    "one slice": StepChoices(slice_bytes=64 * 2**20),
    "tiny slices": StepChoices(slice_bytes=TINY),
    "native cross-entropy": StepChoices(slice_bytes=TINY, cross_entropy="native"),
}


def adapted(kind: str, bits: int | None = None) -> nn.Module:
    model = make_model(kind, bits=bits)
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    return model


def row(length: int) -> Example:
    tokens = np.random.default_rng(length).integers(1, 128, length).astype(np.int32)
    return Example(tokens, np.arange(length) > length // 3)


def learn(
    model: nn.Module, choices: StepChoices, *, packed: bool = False, compiled: bool = False
) -> tuple[float, mx.array]:
    """The loss of a batch, and the gradients of the adapters in one array."""
    batch = lay_out([[row(17)], [row(21)]])
    if packed:
        batch = lay_out([[row(9), row(12)], [row(21)]], packed=24)
    loss_and_gradients = nn.value_and_grad(model, make_loss(find_trunk_and_head(model), choices))

    def call(*arrays: mx.array) -> tuple[mx.array, dict]:
        return loss_and_gradients(model, *arrays)

    with memory_efficient(model, choices=choices):
        state = [model.state]
        function = mx.compile(call, inputs=state, outputs=state) if compiled else call
        loss, gradients = function(*arrays_of(batch))
    flat = [array.astype(mx.float32).flatten() for _, array in tree_flatten(gradients)]
    return loss.item(), mx.concatenate(flat)  # pyright: ignore[reportReturnType]


def close(one: tuple[float, mx.array], other: tuple[float, mx.array], tolerance: float) -> None:
    (loss, gradients), (expected, slopes) = one, other
    assert loss == pytest.approx(expected, rel=tolerance)
    assert (mx.linalg.norm(gradients - slopes) <= 10 * tolerance * mx.linalg.norm(slopes)).item()


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2"])
def test_results_are_the_default_ones(kind: str, name: str):
    model = adapted(kind)
    close(learn(model, CHOICES[name]), learn(model, StepChoices()), 1e-6)


WITH_WINDOWS = [
    "afmoe", "cohere2", "exaone4", "exaone_moe", "gear", "gemma3", "gemma4", "iquestloopcoder",
    "laguna", "mellum", "ministral3", "olmo3", "plamo3", "spark2_5", "step3p5",
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_WINDOWS)
def test_every_family_with_a_sliding_window_takes_it_in_blocks(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    windows: list[int | None] = []

    def counted(*arguments: Any) -> mx.array:
        windows.append(arguments[-1].window)
        return window_attention(*arguments)

    monkeypatch.setattr("mlx_loraplus.kernels.patch.window_attention", counted)
    model = family(name)
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model, size=0.02)
    in_blocks = learn(model, StepChoices(attention="native"))
    assert set(windows) == {9 if name == "plamo3" else 8}
    close(in_blocks, learn(model, StepChoices()), 1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_gpus_choices_compiled_and_quantized(kind: str, packed: bool):
    """The rows are longer than the sliding window of Gemma 3."""
    model = adapted(kind, 4)
    expected = learn(model, StepChoices(), packed=packed)
    close(learn(model, GPU, packed=packed), expected, 1e-6)
    close(learn(model, GPU, packed=packed, compiled=True), expected, 1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_gpus_choices_round_in_bfloat16_as_a_cpus_do(kind: str):
    """Both are compared with float32; eager and compiled steps round alike."""
    model = adapted(kind, 4)
    model.set_dtype(mx.bfloat16)
    model.set_dtype(mx.float32)
    right, slopes = learn(model, StepChoices())
    model.set_dtype(mx.bfloat16)

    def rounding(choices: StepChoices) -> float:
        loss, gradients = learn(model, choices)
        assert loss == pytest.approx(right, rel=1e-2)
        close(learn(model, choices, compiled=True), (loss, gradients), 1e-6)
        return (mx.linalg.norm(gradients - slopes) / mx.linalg.norm(slopes)).item()  # pyright: ignore[reportReturnType]

    allowed = 1.5 * rounding(StepChoices())
    assert rounding(StepChoices(attention="native")) <= allowed
    assert rounding(GPU) <= allowed


def test_scores_do_not_depend_on_the_choices():
    model = adapted("gemma2")
    trunk_and_head, arrays = find_trunk_and_head(model), arrays_of(lay_out([[row(17)], [row(21)]]))
    expected = make_score(trunk_and_head)(model, *arrays).tolist()
    for choices in CHOICES.values():
        assert make_score(trunk_and_head, choices)(model, *arrays).tolist() == pytest.approx(
            expected, rel=1e-6
        )


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("compiled", [False, True])
def test_log_probabilities_of_answers_do_not_depend_on_the_choices(kind: str, compiled: bool):
    """They are what preference losses are made of."""
    model, arrays = adapted(kind, 4), arrays_of(lay_out([[row(17)], [row(21)]]))

    def gradients(choices: StepChoices, compiled: bool = False) -> tuple[float, mx.array]:
        log_probs = make_log_probs(find_trunk_and_head(model), choices)

        def loss(model: nn.Module, *arrays: mx.array) -> mx.array:
            return mx.sigmoid(log_probs(model, *arrays)[0] / 100).sum()

        function = nn.value_and_grad(model, loss)
        call = lambda *arrays: function(model, *arrays)  # noqa: E731
        with memory_efficient(model, choices=choices):
            state = [model.state]
            call = mx.compile(call, inputs=state, outputs=state) if compiled else call
            value, slopes = call(*arrays)
            flat = [slope.flatten() for _, slope in tree_flatten(slopes)]
            return value.item(), mx.concatenate(flat)

    close(gradients(GPU, compiled), gradients(StepChoices()), 1e-6)


def operations(mask: CausalMask | str, length: int, kind: str, width: int = 16) -> str:
    """The graph of one attention, as text."""
    q = mx.zeros((1, 2, length, width), mx.bfloat16)
    text = io.StringIO()
    with replaced_attention(kind):  # pyright: ignore[reportArgumentType]
        out = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask=mask)  # pyright: ignore[reportArgumentType]
    mx.export_to_dot(text, out)
    return text.getvalue()


def test_native_attention_is_used_only_where_every_token_sees_all_earlier_ones():
    def is_native(mask: CausalMask | str, kind: str = "native") -> bool:
        # Attention in chunks has no softmax, and attention in blocks has strided keys.
        text = operations(mask, 12, kind)
        assert ("AsStrided" in text) == (kind == "native" and is_short(mask))
        return "AsStrided" not in text and ("Softmax" in text or "ScaledDot" in text)

    def is_short(mask: CausalMask | str) -> bool:
        return isinstance(mask, CausalMask) and mask.window is not None and mask.window < 12

    assert is_native("causal")
    assert is_native(CausalMask())
    assert is_native(CausalMask(window=12))
    assert not is_native(CausalMask(window=11))
    assert not is_native(CausalMask(segments=mx.ones((1, 12), mx.int32)))
    assert not is_native(CausalMask(window=11), "chunked")
    assert not is_native("causal", "chunked")


def test_packed_rows_are_the_same_to_the_bit_with_native_attention():
    model = adapted("llama")
    native = learn(model, StepChoices(attention="native"), packed=True)
    chunked = learn(model, StepChoices(), packed=True)
    assert native[0] == chunked[0]
    assert mx.array_equal(native[1], chunked[1])


def test_a_slice_is_a_multiple_of_64_tokens_wide():
    assert slice_width(4 * 2**20, 512, 262_144) == 2048
    assert slice_width(32 * 2**20, 512, 262_144) == 16_384
    assert slice_width(4 * 2**20, 237, 262_144) == 4416
    assert slice_width(TINY, 23, 128) == 5
    assert slice_width(4, 512, 128) == 1


def test_a_small_rest_of_the_vocabulary_needs_no_slice_of_its_own():
    assert slice_width(32 * 2**20, 512, 262_208) == 16_448  # 16 slices, the last of 15,488
    assert slice_width(4 * 2**20, 512, 2148) == 2176  # one
    assert slice_width(4 * 2**20, 512, 2200) == 1152  # two


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next"])
def test_mlxs_delta_rule_is_the_loop_over_tokens(name: str):
    model = family(name)
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    model.train()
    loop = gated_delta.gated_delta_ops
    native = learn(model, StepChoices(delta_rule="native"))
    close(native, learn(model, StepChoices()), 1e-5)
    assert gated_delta.gated_delta_ops is loop


@pytest.mark.parametrize(
    "name", ["qwen3_5", "qwen3_next", "olmo_hybrid", "llama", "kimi_linear", "bailing_moe_v3"]
)
def test_models_with_a_delta_rule_are_recognized(name: str, monkeypatch: pytest.MonkeyPatch):
    """A choice is tried, and told, only where it makes a difference."""
    model = make_model("llama") if name == "llama" else family(name)
    attach_adapters(model, AdapterConfig(rank=4))
    is_used = name.startswith(("qwen", "olmo"))
    assert has_delta_rule(model) is is_used
    monkeypatch.setattr("mlx_loraplus.kernels.choices.on_gpu", lambda: True)
    assert ("native delta rule" in str(choices_for(model))) is is_used
    assert str(GPU.other_delta_rule()) == "native attention, native cross-entropy"


def test_the_delta_rule_with_a_mask_or_other_decays_stays_with_the_loop():
    assert equals_loop(2, 4, 16, 8, mx.float32)
    keys = mx.random.split(mx.random.key(1), 3)
    q = mx.random.normal((2, 6, 2, 16), key=keys[0])
    v = mx.random.normal((2, 6, 4, 8), key=keys[1])
    g = mx.random.uniform(0.5, 1.0, (2, 6, 4), key=keys[2])
    mask = mx.arange(6)[None] < mx.array([[4], [6]])
    for decay, masked in ((g, mask), (mx.broadcast_to(g[..., None], (2, 6, 4, 16)), None)):
        arguments = (q, q, v, decay, g, None, masked)
        found, expected = delta_rule(*arguments), gated_delta.gated_delta_ops(*arguments)
        assert all(map(mx.array_equal, found, expected))


@pytest.mark.parametrize("masked", [False, True])
def test_the_loop_in_pieces_is_the_loop_and_keeps_fewer_states(masked: bool):
    keys = mx.random.split(mx.random.key(1), 3)
    q = mx.random.normal((2, 200, 2, 16), key=keys[0]) / 4
    v = mx.random.normal((2, 200, 4, 8), key=keys[1])
    g = mx.random.uniform(0.5, 1.0, (2, 200, 4), key=keys[2])
    mask = mx.arange(200)[None] < mx.array([[150], [200]]) if masked else None
    mx.eval(q, v, g, mask)

    def learn_with(rule: Any) -> tuple[list[mx.array], int]:
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        results, gradients = mx.vjp(
            lambda q, v, g: rule(q, q, v, g, g, None, mask)[0], [q, v, g], [mx.ones_like(v)]
        )
        mx.eval(results, gradients)
        return [*results, *gradients], mx.get_peak_memory() - before

    ours, small = learn_with(loop_in_pieces)
    loops, large = learn_with(gated_delta.gated_delta_ops)
    assert mx.array_equal(ours[0], loops[0])
    for found, expected in zip(ours, loops, strict=True):
        close_arrays(found, expected)
    assert small < large / 2


def close_arrays(found: mx.array, expected: mx.array) -> None:
    assert mx.abs(found - expected).max() <= 1e-5 * mx.abs(expected).max()


def test_attention_over_shared_keys_keeps_no_scores():
    """Blocks that share the keys of an earlier one each need the scores of one block only."""
    keys = mx.random.split(mx.random.key(2), 3)
    x = mx.random.normal((1, 4, 512, 16), key=keys[0])
    shared = mx.random.normal((1, 1, 512, 16), key=keys[1])
    weight = mx.random.normal((16, 16), key=keys[2]) / 4
    mx.eval(x, shared, weight)

    def peak(blocks: int, kernel: Any, mask: CausalMask) -> int:
        def loss(weight: mx.array) -> mx.array:
            k, h = shared @ weight, x
            for _ in range(blocks):
                h = h + kernel(h, k, k, 0.1, mask)
            return h.sum()

        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(loss)(weight))
        return mx.get_peak_memory() - before

    # Four more blocks kept four more arrays of scores. MLX evaluates ahead, so one may come on top.
    scores = 4 * 4 * 512 * 512
    for kernel, mask in ((attention, CausalMask()), (window_attention, CausalMask(128))):
        assert peak(6, kernel, mask) - peak(2, kernel, mask) < 2 * scores


def test_one_trace_serves_every_step():
    """The kernels depend on no Python value that changes from step to step."""
    model = adapted("gemma3")
    loss = make_loss(find_trunk_and_head(model), GPU)
    traces = 0

    def call(*arrays: mx.array) -> mx.array:
        nonlocal traces
        traces += 1
        return loss(model, *arrays)

    function = mx.compile(call, inputs=[model.state])
    with memory_efficient(model, choices=GPU):
        for number in range(4):
            tokens = row(21).tokens * (number + 1) % 128
            function(*arrays_of(lay_out([[Example(tokens, np.arange(21) > 5)]])))
    assert traces == 1
