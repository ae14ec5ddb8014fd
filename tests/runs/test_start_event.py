"""The norms are those of the matrices written out in full, on every kind of layer and adapter."""

import mlx.core as mx
import pytest

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.base_layers import full_weight
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.runs.start_event import measure_norms
from tests.conftest import TinyModel, randomize_adapters


@pytest.mark.parametrize(
    ("kind", "bits", "settings"),
    [
        ("llama", None, {}),
        ("llama", 4, {"init": "pissa"}),
        ("gemma3", None, {"target_modules": ("embed_tokens", "q_proj"), "adapter": "dora"}),
        ("mixtral", 8, {"rslora": True}),
        ("mixtral", None, {"adapter": "vera", "rank": 16}),
    ],
)
def test_norms_are_those_of_the_full_matrices(
    tiny: TinyModel, kind: str, bits: int | None, settings: dict
):
    model = tiny(kind, bits=bits)
    if settings.get("adapter") == "vera":
        settings = settings | {"alpha": 16.0}
    attach_adapters(model, AdapterConfig(**{"rank": 4} | settings))
    measure = measure_norms(model)
    assert max(measure()["norm_change"]) < 1e-3, "nothing has changed yet"
    randomize_adapters(model)
    found = measure()
    for row, adapter in enumerate(find_adapters(model).values()):
        weight = mx.linalg.norm(full_weight(adapter.base, mx.float32).flatten()).item()
        change = mx.linalg.norm(adapter.delta().flatten()).item()
        assert found["norm_change"][row] == pytest.approx(change / weight, rel=2e-3)
        for name, parameter in zip(("norm_a", "norm_b"), list(adapter.groups)[:2], strict=True):
            assert found[name][row] == pytest.approx(
                mx.linalg.norm(adapter[parameter].flatten()).item(), rel=1e-3
            )
    assert found["norm_change"][0] > 1e-3
