"""Every architecture that can become GGUF: weights, config and LoRA come back, and are laid out as llama.cpp's are.

That llama.cpp computes the same logits from these files is checked by scripts/judges/check_gguf_families, whose
results are compared here with the list of architectures.
"""

import mlx_loraplus as ml  # noqa: I001  before mlx: it gives MLX a fast BLAS

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from mlx.utils import tree_flatten

from mlx_loraplus.adapters.base_layers import full_weight
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.errors import ModelError
from mlx_loraplus.export.gguf_lora import load_gguf_lora, write_lora
from mlx_loraplus.export.gguf_model import gguf_config, write_model
from mlx_loraplus.models.gguf.architectures import ARCHITECTURES
from mlx_loraplus.models.gguf.convert import check_tensors, describe_conversion, write_folder
from mlx_loraplus.models.gguf.pre_tokenizers import BYTE_LEVEL, SYNONYMS
from mlx_loraplus.models.gguf.read_config import config_from_gguf
from mlx_loraplus.models.gguf.reader import read_gguf
from mlx_loraplus.models.loading import load_folder
from scripts.judges.gguf_families import (
    SIZE,
    FAMILIES,
    TEXT,
    adapt_family,
    byte_level_tokenizer,
    make_family,
    sentencepiece_tokenizer,
)
from tests.conftest import same

RESULTS = Path(__file__).parents[2] / "scripts" / "judges" / "results" / "gguf_families.json"
TOKENS = mx.array([[1, 5, 200, 7, 31, 9, 80, 0, 140, 3, 12, 260]])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back(name: str, tmp_path: Path):
    # transformers gives every model of these types its own pre-tokenizer
    model = make_family(name)
    own = {"qwen2": "qwen2", "qwen3_5": "qwen35", "qwen3_5_moe": "qwen35"}
    tokenizer = byte_level_tokenizer(own.get(name, "gpt-2"))
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


@pytest.mark.parametrize(("name", "kind"), [("gemma3", "llama"), ("gemma4", "gemma4")])
def test_gemmas_tokenizers_come_back(name: str, kind: str, tmp_path: Path):
    tokenizer = sentencepiece_tokenizer()
    write_model(make_family(name), tokenizer, name, tmp_path / "model.gguf", "f32")
    metadata = read_gguf(tmp_path / "model.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == kind
    assert metadata["tokenizer.ggml.add_space_prefix"] is False

    (tmp_path / "back").mkdir()
    write_folder(tmp_path / "model.gguf", tmp_path / "back", "float32")
    again = load_folder(tmp_path / "back")[1]
    for text in (TEXT, " the  other", "<|tool_call>the\n\n"):
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids[1:]) == tokenizer.decode(ids[1:])


def test_the_end_of_a_turn_is_stored_beside_the_end_of_a_text(tmp_path: Path):
    tokenizer = byte_level_tokenizer()
    ends = set(tokenizer.eos_token_ids)
    turn_end = next(number for number in range(SIZE) if number not in ends)
    tokenizer.eos_token_ids = {*ends, turn_end}
    write_model(make_family("llama"), tokenizer, "llama", tmp_path / "model.gguf", "f32")
    metadata = read_gguf(tmp_path / "model.gguf").metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert metadata["tokenizer.ggml.eot_token_id"] == turn_end


@pytest.mark.parametrize("name", [name for name in FAMILIES if "," not in name or "MoE" in name])
def test_a_lora_comes_back(name: str, tmp_path: Path):
    model = adapt_family(make_family(name))
    write_lora(model, tmp_path / "lora.gguf")
    back = load_gguf_lora(make_family(name), tmp_path / "lora.gguf")
    assert find_adapters(back).keys() == find_adapters(model).keys()
    # Gemma 4's experts multiply and divide B by the scale of each expert
    if name != "gemma4, MoE":
        assert same(model.trainable_parameters(), back.trainable_parameters())
    expected = model(TOKENS)
    assert mx.abs(back(TOKENS) - expected).max() < 1e-5 * mx.abs(expected).max()


def test_halves_with_an_a_of_their_own_become_one_adapter(tmp_path: Path):
    """llama.cpp's own tools may adapt the gate and the up matrix of a shared MLP apart."""
    name = "granitemoehybrid, MoE"
    model = adapt_family(make_family(name))
    write_lora(model, tmp_path / "lora.gguf")
    file = read_gguf(tmp_path / "lora.gguf")
    gate, up = (f"blk.0.ffn_{half}_shexp.weight" for half in ("gate", "up"))
    other = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)

    def write(tensors: dict[str, np.ndarray]) -> Path:
        writer = GGUFWriter(tmp_path / "changed.gguf", "granitehybrid")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", file.metadata["adapter.lora.alpha"])
        for tensor, array in tensors.items():
            writer.add_tensor(tensor, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "changed.gguf"

    shared = {
        f"{tensor}.{leaf}": file.read(f"{tensor}.{leaf}")
        for tensor in (gate, up)
        for leaf in ("lora_a", "lora_b")
    }
    back = load_gguf_lora(make_family(name), write(shared | {f"{up}.lora_a": other}))
    ((_, adapter),) = find_adapters(back).items()
    a, b = (np.array(array) for array in adapter.lora_matrices())
    scale = file.metadata["adapter.lora.alpha"] / 4
    expected = np.concatenate(
        [shared[f"{gate}.lora_b"] @ shared[f"{gate}.lora_a"], shared[f"{up}.lora_b"] @ other]
    )
    assert np.allclose((a @ b).T * adapter.scale, expected * scale, atol=1e-5)

    half = {key: array for key, array in shared.items() if key.startswith(gate)}
    with pytest.raises(ml.AdapterError, match=r"ffn_gate_shexp.* and .*ffn_up_shexp.* differently"):
        load_gguf_lora(make_family(name), write(half))


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


def rewritten(path: Path, to: Path, change: Any) -> None:
    """Copy a GGUF file, with ``change`` applied to its numbers and its tensors."""
    file = read_gguf(path)
    architecture = file.metadata["general.architecture"]
    numbers = {
        key: value
        for key, value in file.metadata.items()
        if key.startswith((f"{architecture}.", "tokenizer."))
    }
    tensors = {name: file.read(name) for name in file.tensors}
    change(numbers, tensors)

    writer = GGUFWriter(to, architecture)
    for key, value in numbers.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)
    for name, array in tensors.items():
        raw_type = None
        if isinstance(array, tuple):
            array, raw_type = array
        writer.add_tensor(name, array, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["gemma4, MoE", "qwen3_5_moe"])
def test_experts_whose_gate_and_up_are_one_tensor_are_read(name: str, tmp_path: Path):
    def fuse(numbers: dict[str, Any], tensors: dict[str, Any]) -> None:
        for gate in [name for name in tensors if name.endswith("ffn_gate_exps.weight")]:
            up = gate.replace("gate", "up")
            fused = np.concatenate([tensors.pop(gate), tensors.pop(up)], axis=1)
            tensors[gate.replace("gate", "gate_up")] = fused

    model = make_family(name)
    write_model(model, byte_level_tokenizer("qwen35"), name, tmp_path / "apart.gguf", "f32")
    rewritten(tmp_path / "apart.gguf", tmp_path / "fused.gguf", fuse)
    (tmp_path / "back").mkdir()
    write_folder(tmp_path / "fused.gguf", tmp_path / "back", "float32")
    back = dict(tree_flatten(load_folder(tmp_path / "back")[0].parameters()))
    for path, array in tree_flatten(model.parameters()):
        assert mx.allclose(back.pop(path), array, rtol=0, atol=1e-6)
    assert not back


def test_a_layer_that_predicts_further_tokens_is_left_out_and_said(tmp_path: Path):
    def add_layer(numbers: dict[str, Any], tensors: dict[str, Any]) -> None:
        numbers["qwen35.block_count"] += 1
        numbers["qwen35.nextn_predict_layers"] = 1
        tensors["blk.4.nextn.enorm.weight"] = np.ones(64, np.float32)

    model = make_family("qwen3_5")
    write_model(model, byte_level_tokenizer("qwen35"), "tiny", tmp_path / "plain.gguf", "f32")
    rewritten(tmp_path / "plain.gguf", tmp_path / "more.gguf", add_layer)
    (tmp_path / "back").mkdir()
    write_folder(tmp_path / "more.gguf", tmp_path / "back", "float32")
    assert load_folder(tmp_path / "back")[2]["num_hidden_layers"] == 4
    assert "predicts further tokens is left out" in describe_conversion(tmp_path / "more.gguf")


@pytest.mark.parametrize(
    "name", ["gemma4", "qwen3_5_moe", "granitemoehybrid", "ministral3", "gpt_oss", "lfm2"]
)
def test_wrong_numbers_are_refused_in_one_line(name: str, tmp_path: Path):
    tokenizer = byte_level_tokenizer("qwen35")
    write_model(make_family(name), tokenizer, "tiny", tmp_path / "right.gguf", "f32")
    file = read_gguf(tmp_path / "right.gguf")
    architecture = file.metadata["general.architecture"]
    keys = [key for key in file.metadata if key.startswith(f"{architecture}.")]
    assert len(keys) > 12

    # Only the metadata is checked, because the tensors stay
    for key in keys:
        for wrong in (0, -1, 1 << 23, "x", [1], [], 0.5, None):
            file.metadata[key], right = wrong, file.metadata[key]
            said = ""
            try:
                check_tensors(file, config_from_gguf(file))
            except ModelError as problem:
                said = str(problem)
            assert "\n" not in said
            file.metadata[key] = right


def test_mxfp4_stays_exactly_as_it_is(tmp_path: Path):
    def quantize_experts(numbers: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("exps.weight")]:
            kind = GGMLQuantizationType.MXFP4
            tensors[name] = (quantize(tensors[name], kind), kind)

    model = make_family("gpt_oss")
    write_model(model, byte_level_tokenizer(), "tiny", tmp_path / "plain.gguf", "f32")
    rewritten(tmp_path / "plain.gguf", tmp_path / "mxfp4.gguf", quantize_experts)
    for weights in ("float32", "stored"):
        (tmp_path / weights).mkdir()
        write_folder(tmp_path / "mxfp4.gguf", tmp_path / weights, weights)
    exact, packed = (load_folder(tmp_path / weights)[0] for weights in ("float32", "stored"))
    experts: Any = packed.model.layers[0].mlp.experts.gate_proj
    assert (experts.mode, experts.bits, experts.group_size) == ("mxfp4", 4, 32)
    plain: Any = exact.model.layers[0].mlp.experts.gate_proj
    assert mx.array_equal(full_weight(experts, mx.float32), plain.weight)
    expected = exact(TOKENS)
    assert mx.abs(packed(TOKENS) - expected).max() < 2e-2 * mx.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\] instead of \[\]"),
        ("llama4", {"attention_chunk_size": 4096}, "attention_chunk_size 4096 instead of 8192"),
        ("llama4", {"use_qk_norm": False}, "use_qk_norm False"),
        ("gemma2", {"query_pre_attn_scalar": 48}, "query_pre_attn_scalar 48 instead of 32"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers"),
        ("olmo3", {"layer_types": ["full_attention"] * 5}, "layer_types"),
        ("qwen3", {"rope_scaling": {"type": "dynamic"}}, "RoPE scaling 'dynamic'"),
        ("qwen3", {"rope_scaling": {"type": "yarn", "mscale": 0.7}}, "'yarn' with mscale"),
        ("mixtral", {"rope_scaling": {"type": "llama3"}}, "RoPE scaling 'llama3'"),
        ("granite", {"mlp_bias": True}, "mlp_bias True"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads 2 instead of 4"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm True"),
        ("cohere2", {"sliding_window_pattern": 3}, "sliding_window_pattern 3 instead of 4"),
        ("qwen2_moe", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaling 'linear'"),
        ("gpt_oss", {"rope_scaling": {"type": "llama3"}}, "RoPE scaling 'llama3'"),
        ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen3_5", {"linear_value_head_dim": 64}, "linear_value_head_dim 64 instead of 32"),
        ("gemma4", {"vocab_size_per_layer_input": 64}, "vocab_size_per_layer_input 64"),
    ],
)
def test_what_llama_cpp_fixes_otherwise_is_refused(
    name: str, change: dict[str, Any], told: str, tmp_path: Path
):
    model = make_family(name)
    text = getattr(model, "language_model", model)
    for key, value in change.items():
        setattr(text.args, key, value)
    with pytest.raises(ModelError, match=f"this model can't be written as GGUF: .*{told}"):
        write_model(model, byte_level_tokenizer(), name, tmp_path / "model.gguf", "f32")
    assert not list(tmp_path.iterdir())


def test_llama_cpp_judged_every_architecture_and_pre_tokenizer():
    results = json.loads(RESULTS.read_text())
    assert results["families"].keys() == FAMILIES.keys()
    assert {gguf_config(make_family(name))["model_type"] for name in FAMILIES} == {*ARCHITECTURES}
    assert results["pre_tokenizers"] == dict.fromkeys(
        [*BYTE_LEVEL, *SYNONYMS, "gemma3", "gemma4"], True
    )
    for judged in results["families"].values():
        assert judged["read back"]
        for row in (judged["base"], judged["lora"], judged["merged"]):
            assert row["error"] < 2e-3
            assert row["equal"] == row["of"]
        if "saturated" in judged:
            assert judged["saturated"]["error"] < 1e-4
