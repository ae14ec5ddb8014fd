"""VeRA is exactly a LoRA of scale 1, and stock mlx-lm refuses it."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.tuner.utils as stock
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_loraplus import AdapterError, load_adapter, save_adapter
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.lora import LoRALinear, LoRASwitchLinear
from mlx_loraplus.adapters.vera import VeRALinear, VeRASwitchLinear, make_projections
from mlx_loraplus.config import AdapterConfig
from tests.conftest import TinyModel, randomize_adapters


def test_it_is_a_lora_of_scale_one():
    mx.random.seed(2)
    projections = make_projections([(24, 16), (10, 30)], rank=5)

    assert [side.shape for side in projections] == [(30, 5), (5, 24)]

    vera = VeRALinear(nn.Linear(16, 24), projections)
    randomize_adapters(vera, size=1.0)
    lora = LoRALinear(vera.base, 5, vera.scale)
    lora.set_lora_matrices(*vera.lora_matrices())
    x = mx.random.normal((3, 16))

    assert mx.allclose(vera(x), lora(x), atol=1e-5)
    assert mx.abs(vera(x) - vera.base(x)).max() > 1

    vera = VeRASwitchLinear(SwitchLinear(30, 10, 4), projections)
    vera.vera_d, vera.vera_b = mx.random.normal((4, 5)), mx.random.normal((4, 10))
    lora = LoRASwitchLinear(vera.base, 5, vera.scale)
    lora.set_lora_matrices(*vera.lora_matrices())
    x, experts = mx.random.normal((3, 1, 1, 30)), mx.array([[0, 2], [1, 1], [3, 0]])

    assert mx.allclose(vera(x, experts), lora(x, experts), atol=1e-5)


@pytest.fixture
def saved(tiny: TinyModel, tmp_path: Path) -> Path:
    model = tiny("llama")
    attach_adapters(model, AdapterConfig(adapter="vera", rank=16))
    return save_adapter(model, tmp_path)


def test_stock_mlx_lm_refuses_it(tiny: TinyModel, saved: Path):
    with pytest.raises(ValueError, match=r"vera_b: not an adapter parameter"):
        stock.load_adapters(tiny("llama"), str(saved))


def test_projections_of_another_size_raise(tiny: TinyModel, saved: Path):
    weights = mx.load(str(saved / "adapters.safetensors"))

    assert isinstance(weights, dict)

    for cut, message in (
        (
            {"projection_a": mx.zeros((80, 16))},
            r"down_proj: projection_a has size 80, the model needs at least 96",
        ),
        ({"projection_b": mx.zeros((16, 40))}, r"projection_b has size 40, the model needs"),
        (
            {"projection_a": mx.zeros((96, 15))},
            "projection_a and projection_b are missing or do not fit",
        ),
        (
            {"model.layers.0.self_attn.q_proj.vera_b": mx.zeros(3)},
            r"q_proj\.vera_b has shape \(3,\), the model needs",
        ),
    ):
        mx.save_safetensors(str(saved / "adapters.safetensors"), weights | cut)
        with pytest.raises(AdapterError, match=message):
            load_adapter(tiny("llama"), saved)
