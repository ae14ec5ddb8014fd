"""Every architecture that can become GGUF: weights, config and LoRA come back, and are laid out as llama.cpp's are.

That llama.cpp computes the same logits from these files is checked by scripts/judges/check_gguf_families, whose
results are compared here with the list of architectures.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.errors import ModelError
from mlx_loraplus.export.gguf_lora import load_gguf_lora, write_lora
from mlx_loraplus.export.gguf_model import gguf_config, write_model
from mlx_loraplus.models.gguf.architectures import ARCHITECTURES
from mlx_loraplus.models.gguf.convert import write_folder
from mlx_loraplus.models.gguf.pre_tokenizers import BYTE_LEVEL
from mlx_loraplus.models.gguf.reader import read_gguf
from mlx_loraplus.models.loading import load_folder
from scripts.judges.gguf_families import (
    FAMILIES,
    TEXT,
    adapt_family,
    byte_level_tokenizer,
    make_family,
)
from tests.conftest import same

RESULTS = Path(__file__).parents[2] / "scripts" / "judges" / "results" / "gguf_families.json"
TOKENS = mx.array([[1, 5, 200, 7, 31, 9, 80, 0, 140, 3, 12, 260]])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back(name: str, tmp_path: Path):
    # transformers gives every model of the type qwen2 its own pre-tokenizer
    tokenizer = byte_level_tokenizer("qwen2" if name == "qwen2" else "gpt-2")
    model = make_family(name)
    write_model(model, tokenizer, name, tmp_path / "model.gguf", "f32")
    (tmp_path / "back").mkdir()
    write_folder(tmp_path / "model.gguf", tmp_path / "back", "float32")
    back, again, _ = load_folder(tmp_path / "back")

    arrays: Any = tree_flatten(back.parameters())
    stored = dict(arrays)
    for path, array in tree_flatten(model.parameters()):
        assert mx.allclose(stored.pop(path), array, rtol=0, atol=1e-6)
    assert not stored
    expected = model(TOKENS)
    assert mx.abs(back(TOKENS) - expected).max() < 1e-5 * mx.abs(expected).max()
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("name", [name for name in FAMILIES if "," not in name])
def test_a_lora_comes_back(name: str, tmp_path: Path):
    model = adapt_family(make_family(name))
    write_lora(model, tmp_path / "lora.gguf")
    back = load_gguf_lora(make_family(name), tmp_path / "lora.gguf")
    assert find_adapters(back).keys() == find_adapters(model).keys()
    assert same(model.trainable_parameters(), back.trainable_parameters())
    expected = model(TOKENS)
    assert mx.abs(back(TOKENS) - expected).max() < 1e-5 * mx.abs(expected).max()


def test_fewer_bits_lose_more_but_little(tmp_path: Path):
    model, tokenizer = make_family("qwen3_moe"), byte_level_tokenizer()
    expected = model(TOKENS)
    losses: list[float] = []
    for kind in ("f16", "q8_0", "q5_1", "q4_1"):
        write_model(model, tokenizer, "tiny", tmp_path / f"{kind}.gguf", kind)
        stored = read_gguf(tmp_path / f"{kind}.gguf").tensors
        assert stored["blk.0.ffn_up_exps.weight"].type.name == kind.upper()
        assert stored["blk.0.ffn_gate_inp.weight"].type.name == "F32"

        (tmp_path / kind).mkdir()
        write_folder(tmp_path / f"{kind}.gguf", tmp_path / kind, "float32")
        back, _, _ = load_folder(tmp_path / kind)
        losses.append(float(mx.abs(back(TOKENS) - expected).mean() / mx.std(expected)))
    assert losses == sorted(losses)
    assert losses[1] < 0.05


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\] instead of \[\]"),
        ("gemma2", {"query_pre_attn_scalar": 48}, "query_pre_attn_scalar 48 instead of 32"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers"),
        ("olmo3", {"layer_types": ["full_attention"] * 5}, "layer_types"),
        ("qwen3", {"rope_scaling": {"type": "dynamic"}}, "RoPE scaling 'dynamic'"),
        ("qwen3", {"rope_scaling": {"type": "yarn", "mscale": 0.7}}, "'yarn' with mscale"),
        ("mixtral", {"rope_scaling": {"type": "llama3"}}, "RoPE scaling 'llama3'"),
        ("granite", {"mlp_bias": True}, "mlp_bias True"),
    ],
)
def test_what_llama_cpp_fixes_otherwise_is_refused(
    name: str, change: dict[str, Any], told: str, tmp_path: Path
):
    model = make_family(name)
    for key, value in change.items():
        setattr(model.args, key, value)
    with pytest.raises(ModelError, match=f"this model can't become GGUF: .*{told}"):
        write_model(model, byte_level_tokenizer(), name, tmp_path / "model.gguf", "f32")
    assert not list(tmp_path.iterdir())


def test_llama_cpp_judged_every_architecture_and_pre_tokenizer():
    results = json.loads(RESULTS.read_text())
    assert results["families"].keys() == FAMILIES.keys()
    assert {gguf_config(make_family(name))["model_type"] for name in FAMILIES} == {*ARCHITECTURES}
    assert results["pre_tokenizers"] == dict.fromkeys(BYTE_LEVEL, True)
    for judged in results["families"].values():
        assert judged["read back"]
        for row in (judged["base"], judged["lora"], judged["merged"]):
            assert row["error"] < 1e-2
            assert row["equal"] == row["of"]
