"""Which array of a model is blamed for logits that can't be used."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_loraplus.models.damaged_weights import describe_damage


class Small(nn.Module):
    """Two layers, a norm, and a mask that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = mx.full((4, 4), -mx.inf)
        self.norm = nn.RMSNorm(64)
        self.linear = nn.Linear(64, 64)
        self.head = nn.Linear(64, 64, bias=False)


def test_an_array_that_may_be_so_is_not_blamed():
    model = Small()
    model.norm.weight = mx.zeros(64)  # multiplies by 1 + weight, as in Gemma
    model.linear.bias = mx.zeros(64)
    assert describe_damage(model).startswith("its weights are damaged, too large")
    model.head.weight = mx.zeros((64, 64))
    assert describe_damage(model).startswith("its array head.weight holds only zeros: get")
    model.linear.bias = mx.full(64, mx.nan)
    assert describe_damage(model).startswith("its array linear.bias holds NaN: get")


def test_the_scales_of_a_quantized_layer_are_blamed():
    model: Any = Small()
    nn.quantize(model, 64, 4)
    model.head.scales = mx.zeros_like(model.head.scales)
    assert describe_damage(model).startswith("its array head.scales holds only zeros: get")


def test_an_adapter_is_not_blamed_as_the_model():
    model: Any = Small()
    model.linear.lora_a = mx.zeros((64, 4))  # as init2 starts
    model.linear.lora_b = mx.ones((4, 64))
    assert describe_damage(model).startswith("its weights or those of its adapter are damaged")
    model.linear.lora_b = mx.full((4, 64), 1e30)
    assert describe_damage(model) == (
        "its array linear.lora_b holds values above 1e+12: train the adapter again with a lower"
        " learning rate"
    )


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (1, "layers.0.weight holds infinite values: get"),
        (2, "layers.0.weight holds infinite values, as 1 other array does: get"),
        (4, "layers.0.weight holds infinite values, as 3 other arrays do: get"),
    ],
)
def test_arrays_that_are_damaged_alike_are_counted(count: int, told: str):
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(count)))
    for layer in model.layers:
        layer.weight = mx.full((4, 4), mx.inf)
    assert told in describe_damage(model)


def test_a_module_that_is_called_linear_keeps_its_name(tmp_path: Path):
    """The base of an adapter is called so too, but not in the file."""
    outer: Any = nn.Module()
    outer.block, outer.q_proj = Small(), nn.Module()
    outer.q_proj.linear = nn.Linear(4, 4, bias=False)
    outer.origin = SimpleNamespace(folder=tmp_path)
    arrays = {"block.linear.weight": mx.ones(1), "q_proj.weight": mx.ones(1)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)

    outer.block.linear.weight = mx.full((64, 64), mx.nan)
    assert f"block.linear.weight in {tmp_path}/model.safetensors" in describe_damage(outer)
    outer.block.linear.weight = mx.ones((64, 64))
    outer.q_proj.linear.weight = mx.full((4, 4), mx.nan)
    assert f"array q_proj.weight in {tmp_path}/model.safetensors" in describe_damage(outer)
