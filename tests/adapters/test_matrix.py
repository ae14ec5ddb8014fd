"""What holds for every adapter, base and init: attaching, saving, fusing, gradients and types."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_loraplus import fuse_adapter, load_adapter, save_adapter
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.base_layers import full_weight
from mlx_loraplus.adapters.dora import DoRA
from mlx_loraplus.adapters.trainable import TrainableParams, find_adapters
from mlx_loraplus.config import AdapterConfig
from tests.conftest import randomize_adapters, same

BASES = [
    (None, "affine"),
    *((bits, "affine") for bits in (2, 3, 4, 5, 6, 8)),
    (4, "mxfp4"),
    (4, "nvfp4"),
    (8, "mxfp8"),
]
STARTS = [(adapter, init) for adapter in ("lora", "dora") for init in ("init1", "init2", "pissa")]
QUANTIZING = [
    (adapter, *how) for adapter in ("lora", "dora") for how in (("pissa", "3"), ("loftq", "3"))
]
CASES = [(*start, None, *base) for start in [*STARTS, ("vera", "init1")] for base in BASES]
CASES += [(*start, None, "affine") for start in QUANTIZING]


def over(cases: list[tuple]) -> pytest.MarkDecorator:
    names = ("adapter", "init", "quantize", "bits", "mode")
    return pytest.mark.parametrize(
        names, cases, ids=["-".join(str(part) for part in case) for case in cases]
    )


TOKENS = mx.array([[1, 5, 2, 39, 3, 9, 0, 21]])
EXPERTS = mx.array([[[0, 2], [1, 3], [3, 0], [2, 1], [0, 1], [0, 3], [1, 2], [3, 2]]])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.experts = SwitchLinear(96, 64, 4)

    def __call__(self, x: mx.array) -> mx.array:
        hidden = mx.tanh(self.up(x))  # (batch, seq, 96)
        return self.experts(hidden[..., None, None, :], EXPERTS).sum(
            axis=(-2, -3)
        )  # (batch, seq, 64)


class Tiny(nn.Module):
    """Every kind of base, none of them square, with biases where the kind has them; the head is tied."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.layers = [Block()]

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.embed.as_linear(self.layers[0](self.embed(tokens)))  # (batch, seq, 40)


def tiny(
    bits: int | None,
    mode: str,
    dtype: mx.Dtype = mx.float32,
) -> Tiny:
    model = Tiny()
    mx.random.seed(5)
    model.update(
        tree_unflatten(
            [(n, 0.2 * mx.random.normal(a.shape)) for n, a in tree_flatten(model.parameters())]
        )
    )
    model.embed.weight[7] = 0.0  # as the padding of a vocabulary
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, group_size=16 if mode == "nvfp4" else 32, bits=bits, mode=mode)
    return model


def attach(
    model: nn.Module, adapter: str, init: str, quantize: str | None, **settings
) -> TrainableParams:
    targets = ("up", "experts") if adapter == "vera" else ("up", "experts", "embed")
    settings = {
        "rank": 4,
        "target_modules": targets,
        "svd": "exact" if init == "pissa" else "randomized",
    } | settings
    if quantize is not None:
        settings |= {"quantize": quantize, "quantize_group_size": 32}
    mx.random.seed(6)
    return attach_adapters(model, AdapterConfig(adapter=adapter, init=init, **settings))


def learn(model: nn.Module, size: float = 0.1) -> None:
    """Give every adapter random parameters; magnitudes stay near their initial values."""
    starts = {
        path: found.m for path, found in find_adapters(model).items() if isinstance(found, DoRA)
    }
    randomize_adapters(model, size=size)
    for path, found in find_adapters(model).items():
        if isinstance(found, DoRA):
            found.m = starts[path] * (1 + found.m)


def error(found: mx.array, wanted: mx.array) -> float:
    return (
        mx.linalg.norm((found - wanted).astype(mx.float32))
        / mx.linalg.norm(wanted.astype(mx.float32))
    ).item()


@over(CASES)
def test_attaching_changes_outputs_only_by_the_quantization_error(
    adapter: str,
    init: str,
    quantize: str | None,
    bits: int | None,
    mode: str,
):
    model, plain = tiny(bits, mode), tiny(bits, mode)
    trainable = attach(model, adapter, init, quantize)
    if quantize is None:
        assert trainable.residuals == {}
        changed = error(model(TOKENS), plain(TOKENS))
        assert changed <= (2e-6 if init == "pissa" or adapter == "dora" else 0)  # rounding of sums
        return
    for path, found in find_adapters(model).items():
        weight = full_weight(dict(plain.named_modules())[path], mx.float32)
        before, after = trainable.residuals[path]
        assert after < 0.98 * before
        assert after == pytest.approx(
            error(found.merged(full_weight(found.base, mx.float32)), weight), rel=1e-4
        )


@over(CASES)
def test_fused_equals_unfused_and_loaded_equals_saved_bit_exactly(
    tmp_path: Path,
    adapter: str,
    init: str,
    quantize: str | None,
    bits: int | None,
    mode: str,
):
    model = tiny(bits, mode)
    attach(model, adapter, init, quantize, dropout=0.1)
    learn(model, size=0.5 if adapter == "vera" else 0.1)
    model.eval()
    before = model(TOKENS)

    assert error(before, tiny(bits, mode)(TOKENS)) > 0.02

    loaded = load_adapter(tiny(bits, mode), save_adapter(model, tmp_path / "one"))
    loaded.eval()

    assert mx.array_equal(loaded(TOKENS), before)
    assert same(loaded.trainable_parameters(), model.trainable_parameters())

    save_adapter(loaded, tmp_path / "two")
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    fuse_adapter(loaded, dequantize=True)

    assert not find_adapters(loaded)
    # A microscaling embedding returns bfloat16, so the unfused model rounds to that.
    assert error(loaded(TOKENS), before) < (2e-5 if mode == "affine" else 3e-2)


# A microscaling embedding returns bfloat16, too coarse for differences; the gradients are the same
# code.
@over([case for case in CASES if case[-1] == "affine"])
def test_gradients_equal_finite_differences(
    adapter: str,
    init: str,
    quantize: str | None,
    bits: int | None,
    mode: str,
):
    model = tiny(bits, mode)
    attach(model, adapter, init, quantize)
    learn(model)
    weights = mx.random.normal((1, 8, 40), key=mx.random.key(1))

    def loss() -> mx.array:
        return (mx.tanh(model(TOKENS)) * weights).mean()

    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)()[1]))
    start = dict(tree_flatten(model.trainable_parameters()))
    lengths = {
        path: found.row_norms()
        for path, found in find_adapters(model).items()
        if isinstance(found, DoRA)
    }

    def at(step: float, direction: Mapping[str, mx.array]) -> float:
        model.update(
            tree_unflatten([(n, start[n] + step * direction.get(n, mx.array(0.0))) for n in start])
        )
        for path, found in find_adapters(model).items():
            if isinstance(
                found, DoRA
            ):  # its lengths take no gradient: m moves with them, so that m / ‖V‖ stays
                found.m = found.m * (found.row_norms() / lengths[path])
        return loss().item()

    for leaf in {name.rsplit(".", 1)[-1] for name in start}:
        keys = mx.random.split(mx.random.key(2), len(start))
        direction = {
            name: mx.random.normal(array.shape, key=key)
            for (name, array), key in zip(start.items(), keys, strict=True)
            if name.endswith(f".{leaf}")
        }
        slope = sum((gradients[name] * towards).sum().item() for name, towards in direction.items())
        wide, narrow = (
            (at(step, direction) - at(-step, direction)) / (2 * step) for step in (8e-3, 4e-3)
        )
        assert (4 * narrow - wide) / 3 == pytest.approx(
            slope, rel=0.02, abs=1e-4
        )  # exact to the step's fourth power


@over([case for case in CASES if case[3:] in ((None, "affine"), (4, "affine"))])
def test_adapters_stay_float32_over_bfloat16_activations(
    adapter: str,
    init: str,
    quantize: str | None,
    bits: int | None,
    mode: str,
):
    model, exact = tiny(bits, mode, mx.bfloat16), tiny(bits, mode, mx.bfloat16)
    exact.set_dtype(mx.float32)
    for side in (model, exact):
        attach(side, adapter, init, quantize)
        learn(side)
    gradients = nn.value_and_grad(model, lambda: model(TOKENS).astype(mx.float32).sum())()[1]

    assert {array.dtype for _, array in tree_flatten(model.trainable_parameters())} == {mx.float32}
    assert {array.dtype for _, array in tree_flatten(gradients)} == {mx.float32}
    assert model(TOKENS).dtype == mx.bfloat16

    if (
        quantize is None
    ):  # MLX computes no experts in bfloat16 on a CPU; the other layers' numbers are here
        x = mx.random.normal((5, 64), key=mx.random.key(3)).astype(mx.bfloat16)
        pairs = [
            (side.layers[0].up(x), side.embed(TOKENS), side.embed.as_linear(x))
            for side in (model, exact)
        ]
        for rounded, wanted in zip(*pairs, strict=True):
            assert rounded.dtype == mx.bfloat16
            assert error(rounded, wanted) < (
                0.01 if bits is None else 0.03
            )  # a 4-bit embedding alone is 0.02 off
