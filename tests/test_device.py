"""What each kind of machine gives to a run, from what MLX says of it; and the branches of a GPU, forced on a CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta
from mlx_lm.utils import _get_classes

from mlx_loraplus import device
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig, TrainConfig
from mlx_loraplus.device import (
    Machine,
    bounded_memory,
    machine_from,
    room_for_copy,
    simulate_mac,
    this_machine,
)
from mlx_loraplus.inference.generate import answer_all
from mlx_loraplus.kernels import patch
from mlx_loraplus.kernels.attention import CausalMask
from mlx_loraplus.kernels.choices import AttentionKind, default_choices, fused_length
from mlx_loraplus.memory.plan import memory_plan_of
from mlx_loraplus.models import find_model as find_model_module
from mlx_loraplus.models.find_model import is_embedded
from mlx_loraplus.models.gguf.convert import weight_format
from mlx_loraplus.models.known_models import CHOSEN_BY_MEMORY, MODELS, gemma_for
from mlx_loraplus.settings import configure
from mlx_loraplus.training.compiled import should_compile
from mlx_loraplus.training.model_probes import probe_model
from mlx_loraplus.training.self_consistency import is_checkpoint_sound
from mlx_loraplus.training.selfcheck import check_step
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import CONFIGS, make_model
from tests.kernels.test_choices import operations

GIB = 2**30

# What ``mx.device_info()`` returns, by the keys in MLX's source.
METAL = {"device_name": "Apple M2", "max_recommended_working_set_size": 11 * GIB, "memory_size": 16 * GIB,
         "max_buffer_length": 8 * GIB, "resource_limit": 499000}  # fmt: skip
CUDA = {"device_name": "NVIDIA H200", "architecture": "sm_90", "total_memory": 150 * 10**9,
        "free_memory": 120 * 10**9, "compute_capability_major": 9, "compute_capability_minor": 0}  # fmt: skip
CPU = {"device_name": "AMD EPYC", "architecture": "x86_64"}


def test_a_mac_gets_what_metal_recommends():
    machine = machine_from("metal", METAL, 16 * GIB, 5 * GIB, GIB)
    assert machine == Machine("metal", 16 * GIB, 11 * GIB, 6 * GIB)
    assert machine.has_gpu
    assert machine.budget == 11 * GIB  # macOS makes room for it
    assert machine.cache(0) == 11 * GIB // 8
    assert str(machine) == "a Mac with 16 GB: 11.8 GB for a run, of which 6.4 GB are free now"


def test_cuda_gets_its_own_memory_and_not_the_systems():
    machine = machine_from("cuda", CUDA, 16 * GIB, 5 * GIB, 2 * 10**9)
    assert machine == Machine("cuda", 150 * 10**9, 135 * 10**9, 122 * 10**9, "NVIDIA H200")
    assert machine.has_gpu
    assert machine.budget == 122 * 10**9
    assert machine.cache(0) == 135 * 10**9 // 8
    assert str(machine) == (
        "NVIDIA H200 with 150.0 GB: 135.0 GB for a run, of which 122.0 GB are free now"
    )


def test_a_cpu_gets_most_of_the_systems_memory():
    machine = machine_from("cpu", CPU, 16 * GIB, 15 * GIB, 0)
    assert machine == Machine("cpu", 16 * GIB, int(0.9 * 16 * GIB), 15 * GIB)
    assert not machine.has_gpu
    assert machine.cache(0) == 0
    assert str(machine) == "17.2 GB of memory: 15.5 GB for a run"


@pytest.mark.parametrize("info", [METAL, CUDA])
def test_a_gpu_of_either_kind_gets_the_gemma_for_its_memory(info: dict[str, Any]):
    backend = "cuda" if info is CUDA else "metal"
    machine = machine_from(backend, info, 16 * GIB, 16 * GIB, 0)
    fitting = memory_plan_of(configure(TrainConfig, {"model": "gemma-3"}), machine=machine)
    assert fitting.config.model == gemma_for(machine.working_set)
    assert fitting.config.model == ("gemma-3-27b-it" if info is CUDA else "gemma-3-4b-it")


def test_a_busy_gpu_of_nvidia_gets_the_gemma_for_what_is_free():
    """A Mac makes room for a run, and CUDA does not: only the budget says what a run may use."""
    busy = machine_from("cuda", CUDA | {"free_memory": 12 * 10**9}, 16 * GIB, 16 * GIB, 0)
    assert busy.budget == 12 * 10**9 < busy.working_set
    for family in CHOSEN_BY_MEMORY:
        fitting = memory_plan_of(configure(TrainConfig, {"model": family}), machine=busy)
        assert fitting.config.model == gemma_for(busy.budget, family)
        assert fitting.config.model != gemma_for(busy.working_set, family)
        assert fitting.fits(8, 512), "what is chosen passes the check"


def test_cuda_plans_what_a_mac_of_its_working_set_plans():
    """Activations keep the model's type on both."""
    config = configure(TrainConfig, {"model": "gemma-3-4b-it", "batch_size": 4})
    mac = simulate_mac("24GB")
    cuda = Machine("cuda", mac.memory, mac.working_set, mac.free, "a GPU")
    cpu = Machine("cpu", mac.memory, mac.working_set, mac.free)
    on_mac, on_cuda, on_cpu = (
        memory_plan_of(config, machine=each).memory(4, 512, checkpoint=False).total
        for each in (mac, cuda, cpu)
    )
    # The memory of traces was measured on the host, which is the GPU's only on a Mac.
    traces = memory_plan_of(config, machine=mac).memory(4, 512, checkpoint=False).traces
    assert on_mac - traces == on_cuda < on_cpu


@pytest.fixture(params=["metal", "cuda"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """MLX answers as on a GPU, and computes on the CPU."""
    is_metal = request.param == "metal"
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx, "device_info", lambda: METAL if is_metal else CUDA)
    monkeypatch.setattr(mx.metal, "is_available", lambda: is_metal)
    return request.param


def test_every_branch_takes_the_gpu(gpu: str):
    assert device.backend() == gpu
    assert this_machine().backend == gpu
    assert weight_format() == "stored"
    assert should_compile(configure(TrainConfig, {}))
    assert not is_embedded("gemma-3-270m")


@pytest.mark.parametrize("family", CHOSEN_BY_MEMORY)
def test_a_run_loads_the_gemma_that_is_planned(
    gpu: str, family: str, monkeypatch: pytest.MonkeyPatch
):
    """On a busy GPU too: 3 GB of it are free."""
    info = METAL if gpu == "metal" else CUDA | {"free_memory": 3 * 10**9}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    planned = memory_plan_of(configure(TrainConfig, {"model": family})).config.model
    repository, chosen, note = find_model_module._repository_of(family)
    assert chosen == planned
    assert repository == MODELS[planned]
    assert note is not None
    assert note.startswith(f"{family} is {MODELS[planned]} on ")
    assert (planned == gemma_for(this_machine().working_set, family)) is (gpu == "metal")


def test_a_copy_takes_at_most_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch):
    """On a Mac, a run may use more than is free now, but a copy for a check may not."""
    monkeypatch.setattr(mx, "get_active_memory", lambda: 10**9)
    mac = replace(simulate_mac("16GB"), free=5 * 10**9)
    for machine, room in (
        (mac, 2 * 10**9),
        (replace(mac, free=mac.memory), (mac.budget - 10**9) // 2),
        (replace(mac, free=10**8), 0),
    ):
        monkeypatch.setattr(device, "this_machine", lambda machine=machine: machine)
        assert room_for_copy() == room


def test_the_limits_are_set_on_a_gpu_and_restored(gpu: str):
    working_set = 11 * GIB if gpu == "metal" else 135 * 10**9
    before = (mx.set_cache_limit(12345), mx.set_memory_limit(54321))
    try:
        with bounded_memory():
            assert mx.set_cache_limit(working_set // 8) == working_set // 8
            assert mx.set_memory_limit(working_set) == working_set
        assert (mx.set_cache_limit(0), mx.set_memory_limit(0)) == (12345, 54321)
    finally:
        mx.set_cache_limit(before[0])
        mx.set_memory_limit(before[1])


def test_answers_wire_no_more_memory_than_training(
    gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """mlx-lm would wire all that Metal recommends, also within a run's limits."""
    limits: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: limits.append(limit) or 7)
    model, tokenizer = ml.load(str(write_tiny_model(tmp_path)))
    answer_all(model, tokenizer, [[5, 6, 7], [5, 6]], max_tokens=2)
    during = list(limits)
    assert ml.complete(model, tokenizer, "1 + 1", max_tokens=2) is not None
    if gpu == "cuda":
        assert not limits
    else:
        assert during == limits[2:] == [int(0.9 * 11 * GIB), 7]


def test_mlx_s_attention_is_taken_where_it_has_a_fused_gradient(
    gpu: str, monkeypatch: pytest.MonkeyPatch
):
    """The limits are those in MLX's source; Gemma 3's heads are 256 wide."""

    def is_fused(length: int, width: int, dtype: mx.Dtype) -> bool:
        return fused_length(length, (width, width), dtype.size, device.backend()) == length

    assert default_choices().attention == "native"
    assert is_fused(256, 128, mx.bfloat16)
    assert is_fused(256, 64, mx.bfloat16)
    assert is_fused(256, 32, mx.bfloat16) is (gpu == "cuda")
    assert not is_fused(256, 320, mx.bfloat16)
    assert is_fused(256, 256, mx.bfloat16) is (gpu == "metal")
    assert is_fused(200, 128, mx.bfloat16) is (gpu == "metal")
    assert is_fused(256, 128, mx.float32) is (gpu == "metal")
    assert is_fused(256, 100, mx.bfloat16) is (gpu == "metal"), "a multiple of 8 for cuDNN"
    if gpu == "cuda":
        monkeypatch.setattr(mx, "device_info", lambda: CUDA | {"compute_capability_major": 7})
        assert not is_fused(256, 128, mx.bfloat16), "cuDNN's attention needs an Ampere GPU"


def test_attention_without_a_fused_gradient_is_computed_in_chunks(gpu: str):
    def is_mlxs(width: int) -> bool:
        # Attention in chunks has no softmax.
        text = operations("causal", 256, "native", width)
        return "Softmax" in text or "ScaledDot" in text

    assert is_mlxs(128)
    assert not is_mlxs(320)
    assert is_mlxs(256) is (gpu == "metal")
    assert is_mlxs(32) is (gpu == "cuda")


@pytest.mark.parametrize(("length", "computed"), [(256, 256), (513, 640), (448, 512), (200, 0)])
def test_attention_on_cuda_pads_rows_to_what_has_a_fused_gradient(
    length: int, computed: int, monkeypatch: pytest.MonkeyPatch
):
    """The tokens of a batch stay as they are, so the limit on padding holds."""
    lengths: list[int] = []
    native = patch._native

    def counted(q: mx.array, *arguments: Any, **keywords: Any) -> mx.array:
        lengths.append(q.shape[2])
        return native(q, *arguments, **keywords)

    keys = mx.random.split(mx.random.key(0), 3)
    shapes = [(2, 4, length, 64), (2, 2, length, 64), (2, 2, length, 64)]
    arrays = [mx.random.normal(s, mx.float16, key=k) for s, k in zip(shapes, keys, strict=True)]

    def learn(kind: AttentionKind) -> list[mx.array]:
        def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            masks: Any = {"mask": CausalMask()}
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, **masks)

        with patch.replaced_attention(kind):
            results, gradients = mx.vjp(attend, arrays, [arrays[0]])
        return [*results, *gradients]

    expected = learn("chunked")
    monkeypatch.setattr(patch, "_native", counted)
    monkeypatch.setattr(patch, "backend", lambda: "cuda")
    monkeypatch.setattr(mx, "device_info", lambda: CUDA)
    found = learn("native")
    assert lengths == ([computed] if computed else [])
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert mx.abs(one - other).max() <= 1e-2 * mx.abs(other).max()


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("metal", "qwen3_5"), ("metal", "qwen3_next"), ("metal", "kimi_linear"), ("metal", "olmo_hybrid"),
        ("cuda", "qwen3_5"),
    ],
    indirect=["gpu"],
)  # fmt: skip
def test_kernels_without_a_gradient_are_for_answers_only(
    gpu: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    """mlx-lm's kernel of the gated delta rule for Metal has no gradient."""
    called: list[str] = []

    @mx.custom_function
    def kernel(*arrays: mx.array) -> Any:
        called.append("kernel")
        return gated_delta.gated_delta_ops(*arrays)

    @kernel.vjp
    def _(*_: Any) -> Any:
        raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")

    monkeypatch.setattr(gated_delta, "gated_delta_kernel", lambda *all_: kernel(*all_[:6]))
    # It takes keys whose width is a multiple of 32.
    text = (Path(__file__).parent / "families" / "configs.json").read_text()
    text = text.replace('"linear_key_head_dim": 16', '"linear_key_head_dim": 32')
    text = text.replace('"head_dim": 16, "kda_layers"', '"head_dim": 32, "kda_layers"')
    facts = json.loads(text)[name]
    mx.random.seed(0)
    model_class, args_class = _get_classes(facts)
    model = model_class(args_class.from_dict(facts))
    config = AdapterConfig(rank=4, dropout=0.1)
    attach_adapters(model, config)
    assert is_checkpoint_sound(model)
    probes = probe_model(model, pack=False)
    result = check_step(model, probes, config, [(default_choices(), False)])
    assert not result.skipped
    assert not result.problems()

    # Answers are computed by the kernel.
    called.clear()
    model.eval()
    mx.eval(model(mx.array([[1, 2, 3]])))
    assert bool(called) is (gpu == "metal")


def write_four_bits(folder: Path, kind: str) -> Path:
    """Write a tiny model as the hub has models for Macs: 4 bits, all else in bfloat16."""
    write_tiny_model(folder)  # for its tokenizer
    model = make_model(kind)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=4)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = CONFIGS[kind] | {"quantization": {"group_size": 32, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("gpu", "kind"), [("cuda", "llama"), ("metal", "gemma3")], indirect=["gpu"]
)
def test_a_run_on_a_gpu_keeps_bfloat16_and_compiles_to_what_eager_computes(
    tmp_path: Path, gpu: str, kind: str
):
    """The rows are longer than the sliding window of Gemma 3."""
    folder = write_four_bits(tmp_path / "model", kind)
    losses: dict[str, list[float]] = {}
    for compiled in ("auto", "off"):
        model, tokenizer = ml.load(str(folder))
        types = {array.dtype for _, array in tree_flatten(model.parameters())}
        assert types == {mx.bfloat16, mx.uint32}
        run = ml.finetune(
            model, tokenizer, data=str(write_sums(tmp_path / "data")), iters=6, warmup=0, batch_size=4,
            learning_rate=1e-3, steps_per_report=1, sample_rows=0, compile=compiled, seed=1,
            adapter_path=str(tmp_path / compiled), selfcheck="off",
        )  # fmt: skip
        losses[compiled] = [event["loss"] for event in run.history if "loss" in event]
    assert len(losses["auto"]) == 6
    assert losses["auto"] == pytest.approx(losses["off"], rel=0.02)
    assert losses["auto"][-1] < losses["auto"][0]
