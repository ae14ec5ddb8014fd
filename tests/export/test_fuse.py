"""A fused model does what base and adapter did, within a stated tolerance, and stock mlx-lm loads it."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.mla import MultiLinear
from mlx_lm.utils import load_model

from mlx_loraplus import AdapterError, fuse_adapter, save_adapter
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.export.fuse import quantization_of, save_fused
from mlx_loraplus.export.fused_layer import dequantize_layer
from mlx_loraplus.models.loading import load_folder
from scripts.tiny_model import write_tiny_model
from tests.conftest import CONFIGS, TinyModel, randomize_adapters
from tests.export.test_fuse_command import fused

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])


class Tokenizer:
    """What save_fused asks of a tokenizer."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def adapted(tiny: TinyModel, kind: str, bits: int | None = None, mode: str = "affine") -> nn.Module:
    model = tiny(kind, bits=bits, mode=mode)
    targets = ("all-linear",) if kind == "llama4" else ("all-linear", "embed_tokens")
    attach_adapters(model, AdapterConfig(rank=4, target_modules=targets))
    randomize_adapters(model)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_fused_equals_unfused_in_float32(tiny: TinyModel, kind: str):
    model = adapted(tiny, kind)
    before = model(TOKENS)
    fuse_adapter(model)
    assert not find_adapters(model)
    assert mx.abs(model(TOKENS) - before).max() < 1e-5 * mx.abs(before).max() + 1e-5


@pytest.mark.parametrize(
    (
        "bits",
        "mode",
        "tolerance",
    ),  # a microscaling embedding returns bfloat16, so the unfused model rounds to that
    [*((bits, "affine", 2e-5) for bits in (2, 3, 4, 6, 8)), (4, "mxfp4", 2e-2), (8, "mxfp8", 2e-2)],
)
def test_dequantized_fuse_loses_nothing(tiny: TinyModel, bits: int, mode: str, tolerance: float):
    model = adapted(tiny, "gemma3", bits, mode)
    before = model(TOKENS)
    fuse_adapter(model, dequantize=True)
    assert not any(hasattr(module, "scales") for _, module in model.named_modules())
    assert mx.linalg.norm(model(TOKENS) - before) < tolerance * mx.linalg.norm(before)


def test_more_bits_lose_less(tiny: TinyModel):
    errors = []
    for bits in (4, 6, 8):
        model = adapted(tiny, "llama", 4)
        before = model(TOKENS)
        fuse_adapter(model, bits=bits)
        errors.append((mx.linalg.norm(model(TOKENS) - before) / mx.linalg.norm(before)).item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.03  # 8 bits


def test_experts_fuse_at_their_own_width(tiny: TinyModel):
    model = tiny("mixtral", bits=8)
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    before = model(TOKENS)
    fuse_adapter(model, bits=8)
    assert mx.linalg.norm(model(TOKENS) - before) / mx.linalg.norm(before) < 0.03


@pytest.mark.parametrize(
    ("base", "fuse"),
    [(None, {}), (4, {}), (4, {"bits": 8}), (None, {"bits": 4}), (4, {"dequantize": True})],
)
def test_stock_mlx_lm_loads_what_is_written(
    tiny: TinyModel, tmp_path: Path, base: int | None, fuse: dict
):
    model = adapted(tiny, "llama", base)
    fuse_adapter(model, **fuse)
    save_fused(model, Tokenizer(), CONFIGS["llama"], tmp_path, tmp_path / "fused")  # pyright: ignore[reportArgumentType]
    loaded, read = load_model(tmp_path / "fused")
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))
    assert read.get("quantization") == quantization_of(model)
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]


def test_mixed_widths_are_written_layer_by_layer(tiny: TinyModel):
    model = tiny("llama", bits=4)
    attach_adapters(model, AdapterConfig(rank=4, target_modules=("q_proj",)))
    fuse_adapter(model, bits=8)
    written = quantization_of(model)
    assert written is not None
    assert written["bits"] == 4
    assert written["model.layers.0.self_attn.q_proj"] == {
        "group_size": 32,
        "bits": 8,
        "mode": "affine",
    }
    assert json.dumps(written)


def test_overwriting_replaces_the_whole_folder(tiny: TinyModel, tmp_path: Path):
    model = adapted(tiny, "llama")
    fuse_adapter(model)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model-00002-of-00002.safetensors").write_text("stale")
    save_fused(model, Tokenizer(), CONFIGS["llama"], tmp_path, tmp_path / "old")  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "old" / "model-00002-of-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_nothing_to_fuse_is_told(tiny: TinyModel):
    with pytest.raises(AdapterError, match="no adapters to fuse"):
        fuse_adapter(tiny("llama"))


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (4, "mxfp4")])
def test_latent_attentions_layers_aredequantize_layer(bits: int, mode: str):
    plain = MultiLinear(64, 32, 4)
    packed = plain.to_quantized(32, bits, mode)
    layer = dequantize_layer("attn.embed_q", packed, mx.float32)
    x = mx.random.normal((1, 4, 3, 64))
    assert type(layer) is MultiLinear
    assert mx.allclose(layer(x), packed(x), atol=1e-4).item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_sizes_are_those_on_disk(tmp_path: Path, dtype: mx.Dtype):
    folder = write_tiny_model(tmp_path / "model")
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {name: array.astype(dtype) for name, array in tensors.items()},  # pyright: ignore
    )
    model, _, _ = load_folder(folder)
    attach_adapters(model, AdapterConfig(rank=4))
    save_adapter(model, tmp_path / "run")

    report = fused(tmp_path, tmp_path / "out")
    count = sum(array.size for array in tensors.values())  # pyright: ignore
    assert report["bytes_before"] == report["bytes_after"] == dtype.size * count
