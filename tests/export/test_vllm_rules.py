"""What vLLM loads of an adapter in PEFT's format; scripts/judges/check_vllm asks vLLM's own loader."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_loraplus.export.vllm_rules import vllm_refusals

JUDGED = Path(__file__).parents[2] / "scripts" / "judges" / "results" / "vllm.json"
LAYER = "base_model.model.model.layers.1."
RESULTS: dict[str, Any] = json.loads(JUDGED.read_text())


@pytest.mark.parametrize(
    ("kind", "accepted", "refused"),
    [
        ("phi3", ("qkv_proj", "gate_up_proj", "lm_head"), ("in_proj_qkv",)),
        ("qwen3_5", ("in_proj_qkv", "in_proj_a", "out_proj", "embed_tokens"), ("in_proj_ba",)),
        ("gemma4", ("per_layer_input_gate", "per_layer_model_projection"), ("embed_tokens",)),
        ("granitemoehybrid", ("in_proj", "input_linear", "lm_head"), ("qkv_proj",)),
        ("smollm3", ("embed_tokens", "q_proj"), ("lm_head",)),
        ("gpt_oss", ("q_proj",), ("embed_tokens", "lm_head")),
        ("mistral", ("q_proj",), ("embed_tokens", "lm_head")),
        ("dots1", ("q_proj", "embed_tokens"), ("lm_head",)),
        ("deepseek_v3", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"), ("kv_b_proj", "lm_head")),
        ("lfm2", ("in_proj", "out_proj", "w1", "lm_head"), ("conv",)),
        ("starcoder2", ("c_fc", "c_proj", "embed_tokens"), ("lm_head",)),
        ("ernie4_5", ("embed_tokens", "lm_head"), ("fc1",)),
        ("seed_oss", ("embed_tokens",), ("lm_head",)),
        ("llama4", ("v_proj", "o_proj", "lm_head"), ("q_proj", "k_proj")),
        ("glm4", ("q_proj", "down_proj"), ("gate_up_proj",)),
    ],
)
def test_vllms_modules_depend_on_the_family(
    kind: str, accepted: tuple[str, ...], refused: tuple[str, ...]
):
    config = {"r": 8, "target_modules": []}
    for leaf in (*accepted, *refused):
        name = f"{LAYER}block.{leaf}.lora_A.weight"
        assert bool(vllm_refusals(config, [name], kind)) == (leaf in refused), leaf


@pytest.mark.parametrize("row", RESULTS["rows"], ids=lambda row: f"{row['model']}, {row['case']}")
def test_vllm_loads_what_our_export_says(row: dict[str, Any]):
    """An adapter without notes changes each weight of vLLM's model as PEFT changes it."""
    loads = row["error"] is None and row["difference"] <= RESULTS["bound"] <= 1e-5
    assert loads == row["loads"] != bool(row["notes"]), row
    assert row["agree"], row


def test_vllm_loads_the_stacked_experts_with_two_settings():
    """Gemma 4 and Granite; vLLM names the settings in its own error."""
    whole = {
        row["model"]: row["mixed"]
        for row in RESULTS["rows"]
        if row["case"] == "lora on experts" and "mixed" in row
    }
    assert whole.keys() == {"gemma4-moe", "granite4-moe", "granite-moe"}
    for model, found in whole.items():
        assert found["error"] is None, model
        assert found["difference"] <= RESULTS["bound"], model


def test_vllm_judged_every_family():
    loaded = {row["kind"] for row in RESULTS["rows"] if row["loads"]}
    assert {
        "llama", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4_text", "mistral", "ministral3", "mixtral", "qwen2",
        "qwen3", "qwen3_5", "qwen2_moe", "qwen3_moe", "qwen3_next", "phi3", "granite", "granitemoe", "granitemoehybrid",
        "smollm3", "olmo2", "olmo3", "olmoe", "cohere", "cohere2", "glm4", "glm4_moe", "glm4_moe_lite", "ernie4_5",
        "ernie4_5_moe", "seed_oss", "starcoder2", "lfm2", "deepseek_v2", "deepseek_v3", "dots1", "gpt_oss", "llama4",
    } <= loaded  # fmt: skip
