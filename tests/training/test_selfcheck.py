"""The check that this machine computes loss and gradients correctly."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import mlx_loraplus  # noqa: F401  # isort: skip  before mlx
import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.errors import LoRAPlusError
from mlx_loraplus.kernels import cross_entropy, elementwise, patch
from mlx_loraplus.kernels.choices import StepChoices, default_choices
from mlx_loraplus.kernels.trunk_and_head import model_dtype
from mlx_loraplus.kernels.window_attention import Blocks
from mlx_loraplus.models.skeleton import make_skeleton
from mlx_loraplus.training import selfcheck
from mlx_loraplus.training.model_probes import probe_model
from mlx_loraplus.training.selfcheck import (
    STOCK,
    CheckResult,
    Deviation,
    _too_large,
    check_step,
    refuse_if_wrong,
)
from tests.conftest import CONFIGS, TinyModel, same

EAGER = [
    (StepChoices("native"), False),
    (StepChoices("chunked"), False),
    (StepChoices(cross_entropy="native"), False),
]
COMPILED = [(StepChoices("chunked"), True)]


def wrong_gate(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Make the gradient of the SiLU gate wrong by a factor, but not its value."""
    right = elementwise.GATES["silu"]

    @mx.custom_function
    def gate(x: mx.array, up: mx.array) -> mx.array:
        return right(x, up)

    @gate.vjp
    def _(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        _, (d_gate, d_up) = mx.vjp(right, list(primals), [cotangent])
        return d_gate * (1 + error), d_up

    monkeypatch.setitem(elementwise.GATES, "silu", gate)


def check(model: Any, ways: Any = EAGER, **adapter: Any) -> CheckResult:
    config = AdapterConfig(rank=4, **adapter)
    attach_adapters(model, config)
    return check_step(model, probe_model(model, pack=False), config, ways)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_family_agrees_with_float32(tiny: TinyModel, kind: str):
    result = check(tiny(kind))
    assert not result.skipped
    assert result.problems() == []
    assert list(result.deviations) == [
        STOCK,
        "native attention, composed cross-entropy, eager",
        "chunked attention, composed cross-entropy, eager",
        "chunked attention, native cross-entropy, eager",
    ]
    assert all(each.gradients < 1e-4 for each in result.deviations.values())
    assert "agree with float32" in str(result)
    refuse_if_wrong(result)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3_moe"])
def test_quantized_weights_are_compared_with_their_float32_values(tiny: TinyModel, kind: str):
    result = check(tiny(kind, bits=4))
    assert result.problems() == []
    assert all(each.gradients < 1e-4 for each in result.deviations.values())


def test_windows_longer_than_the_checks_rows_are_checked_too(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    """A gradient that is wrong only in blocks of a sliding window is found."""
    monkeypatch.setitem(CONFIGS, "gemma3", CONFIGS["gemma3"] | {"sliding_window": 1024})
    model = tiny("gemma3")
    assert check(model).problems() == []
    assert model.model.window_size == 1024

    right = Blocks.sum_keys
    monkeypatch.setattr(Blocks, "sum_keys", lambda self, x: 0.7 * right(self, x))
    result = check_step(model, probe_model(model, pack=False), AdapterConfig(), EAGER)
    (problem,) = result.problems()
    assert problem.startswith("native attention, composed cross-entropy, eager: the gradients of")


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_half_precision_is_allowed_its_rounding(tiny: TinyModel, kind: str):
    model = tiny(kind)
    model.set_dtype(mx.bfloat16)
    result = check(model)
    assert result.problems() == []
    assert 1e-4 < result.deviations[STOCK].gradients < 0.3
    assert all(1e-4 < each.gradients < 0.3 for each in result.ours.values())


def test_the_reference_alone_is_computed_in_float32_on_the_cpu(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    """On a GPU, all else is computed by the default device; here both are the CPU."""
    model = tiny("llama")
    model.set_dtype(mx.bfloat16)
    devices: list[Any] = []  # the devices that are named around a computation
    found: list[tuple[list[Any], mx.Dtype]] = []
    right_stream, right_way = mx.stream, selfcheck._full_logits

    @contextmanager
    def stream(device: Any) -> Generator[None]:
        devices.append(device)
        with right_stream(device):
            yield
        devices.pop()

    def full_logits(front: nn.Module, arrays: Any) -> Any:
        found.append((list(devices), model_dtype(front)))
        return right_way(front, arrays)

    monkeypatch.setattr(mx, "stream", stream)
    monkeypatch.setattr(selfcheck, "_full_logits", full_logits)
    assert check(model).problems() == []
    assert found == [([mx.cpu], mx.float32), ([], mx.bfloat16)]


@pytest.mark.parametrize("adapter", ["dora", "vera"])
def test_other_kinds_of_adapters_are_checked(tiny: TinyModel, adapter: Any):
    result = check(tiny("llama"), adapter=adapter)
    assert result.problems() == []
    assert all(each.gradients < 1e-4 for each in result.deviations.values())


def test_a_compiled_step_is_checked(tiny: TinyModel):
    result = check(tiny("llama"), COMPILED)
    assert list(result.ours) == ["chunked attention, composed cross-entropy, compiled"]
    assert result.problems() == []


def test_a_front_without_adapters_gets_its_own(tiny: TinyModel):
    model = tiny("llama")
    result = check(model, num_layers=1)
    assert any(
        "layers" not in part and "lora_a" in part
        for part in result.ours["native attention, composed cross-entropy, eager"].parts
    )
    assert result.problems() == []


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_wrong_gradient_is_refused_with_figures(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype
):
    model = tiny("llama")
    model.set_dtype(dtype)
    config = AdapterConfig(rank=4)
    attach_adapters(model, config)
    probes = probe_model(model, pack=False)
    assert probes.gated_mlps or dtype == mx.bfloat16
    probes.gated_mlps.update({f"model.layers.{n}.mlp": "silu" for n in range(3)})

    wrong_gate(monkeypatch, 0.3)
    result = check_step(model, probes, config, EAGER)
    with pytest.raises(LoRAPlusError) as caught:
        refuse_if_wrong(result)
    said = str(caught.value)
    assert "\n" not in said
    assert re.search(
        r"chunked attention, composed cross-entropy, eager: the gradients of mlp.gate_proj.lora_. are off by 0.[34]",
        said,
    ), said
    assert "--selfcheck off trains nevertheless" in said
    assert "--compile off" not in said


def test_the_head_is_summed_over_several_slices_whatever_their_size_in_a_run(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    """A gradient that is wrong only from the second slice on is found."""
    monkeypatch.setitem(CONFIGS, "llama", CONFIGS["llama"] | {"vocab_size": 8192})
    model = tiny("llama")
    attach_adapters(model, AdapterConfig(rank=4))
    probes = probe_model(model, pack=False)
    ways = [(default_choices(gpu=True), False)]
    assert check_step(model, probes, AdapterConfig(), ways).problems() == []

    right = cross_entropy._log_of_sum

    def wrong(head: Any, shift: mx.array, *rest: Any) -> mx.array:
        return right(head, mx.minimum(shift, -1e8), *rest)  # forgets the slices before this one

    monkeypatch.setattr(cross_entropy, "_log_of_sum", wrong)
    assert check_step(model, probes, AdapterConfig(), ways).problems()


def test_the_check_on_cuda_takes_mlxs_fused_attention(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    """cuDNN has a gradient for multiples of 128 tokens."""
    lengths: list[int] = []
    native = patch._native_causal

    def counted(q: mx.array, k: mx.array, v: mx.array, padded: int, **rest: Any) -> mx.array:
        lengths.append(padded)
        return native(q, k, v, padded, **rest)

    model = tiny("llama")
    model.set_dtype(mx.bfloat16)
    config = AdapterConfig(rank=4)
    attach_adapters(model, config)
    probes = probe_model(model, pack=False)
    monkeypatch.setattr(patch, "_native_causal", counted)
    monkeypatch.setattr("mlx_loraplus.kernels.patch.backend", lambda: "cuda")
    monkeypatch.setattr(mx, "device_info", lambda: {"compute_capability_major": 8})
    assert check_step(model, probes, config, EAGER[:1]).problems() == []
    assert lengths
    assert all(length % 128 == 0 for length in lengths)


def test_the_model_stays_as_it_was(tiny: TinyModel):
    model = tiny("gemma3", bits=4)
    attach_adapters(model, AdapterConfig(rank=4, dropout=0.5))
    model.train()
    before, kinds = model.parameters(), [type(module) for module in model.modules()]
    state = mx.random.state[0].tolist()
    check_step(model, probe_model(model, pack=False), AdapterConfig(), EAGER)
    assert same(model.parameters(), before)
    assert [type(module) for module in model.modules()] == kinds
    assert mx.random.state[0].tolist() == state
    assert model.training
    assert len(model.layers) == CONFIGS["gemma3"]["num_hidden_layers"]


def result_of(**ours: Deviation) -> CheckResult:
    stock = Deviation(1e-3, 0.04, {"q_proj": 0.08, "v_proj": 0.02})
    return CheckResult((1e-2, 6e-2), {STOCK: stock, **ours})


def test_the_rounding_of_stock_layers_widens_the_tolerance():
    assert result_of(eager=Deviation(9e-3, 0.1, {"q_proj": 0.23, "v_proj": 0.05})).problems() == []
    (found,) = result_of(eager=Deviation(9e-3, 0.1, {"q_proj": 0.25, "v_proj": 0.05})).problems()
    assert found == "eager: the gradients of q_proj are off by 0.25 (allowed: 0.24)"
    (found,) = result_of(eager=Deviation(2e-2, 0.1, {"q_proj": 0.2, "v_proj": 0.05})).problems()
    assert found == "eager: the loss is off by 0.02 (allowed: 0.01)"
    nan = float("nan")
    found = result_of(eager=Deviation(nan, nan, {"q_proj": nan, "v_proj": nan})).problems()
    assert len(found) == 2


def test_only_compiled_steps_wrong_is_told_with_the_remedy():
    right = Deviation(1e-3, 0.04, {"q_proj": 0.08, "v_proj": 0.02})
    wrong = Deviation(1e-3, 0.9, {"q_proj": 0.9, "v_proj": 0.9})
    ways = {
        "native attention, composed cross-entropy, eager": right,
        "native attention, composed cross-entropy, compiled": wrong,
    }
    with pytest.raises(LoRAPlusError, match="train with --compile off, or update"):
        refuse_if_wrong(result_of(**ways))


def test_wrong_stock_layers_are_refused():
    wrong = Deviation(0.5, 0.9, {"q_proj": 0.9})
    result = CheckResult((1e-2, 6e-2), {STOCK: wrong, "eager": wrong})
    with pytest.raises(
        LoRAPlusError, match=r"mlx-lm's layers are off by 0\.5 in the loss and 0\.9"
    ):
        refuse_if_wrong(result)


def test_a_front_that_is_too_large_is_not_computed(monkeypatch: pytest.MonkeyPatch):
    # One GB more than what other tests of this process hold, two thirds of which are for a run.
    memory = 1.5 * (mx.get_active_memory() / 2**30 + 1)
    monkeypatch.setenv("MLX_LORAPLUS_MEMORY", f"{memory:.2f}GB")
    model = make_skeleton(CONFIGS["llama"] | {"hidden_size": 4096, "intermediate_size": 16384})
    assert "the first blocks in float32 take" in _too_large(model)
    assert not _too_large(make_skeleton(CONFIGS["llama"]))


def test_what_can_not_be_checked_is_reported(tiny: TinyModel):
    result = CheckResult(skipped="the model's blocks can't be taken apart")
    assert str(result) == "not possible: the model's blocks can't be taken apart"
    refuse_if_wrong(result)
