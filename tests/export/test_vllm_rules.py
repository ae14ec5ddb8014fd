"""What vLLM loads of an adapter in PEFT's format; scripts/judges/check_vllm asks vLLM's own loader."""

import pytest

from mlx_loraplus.export.vllm_rules import vllm_refusals

LAYER = "base_model.model.model.layers.1."


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
