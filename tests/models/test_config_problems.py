"""What mlx-lm's own errors do not say: the field of a config.json that they come from."""

from typing import Any

import pytest

from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.skeleton import make_skeleton
from tests.models.test_layer_kinds import REMOVED, changed


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("deepseek_v3", {"kv_lora_rank": 0}, r"fails \(.*probably because .* kv_lora_rank 0: corr"),
        ("deepseek_v3", {"n_group": 2**40}, "probably because its config.json has n_group 1099511"),
        ("deepseek_v3", {"routed_scaling_factor": "x"}, 'has routed_scaling_factor "x", where'),
        ("qwen3_next", {"linear_conv_kernel_dim": -1}, "has linear_conv_kernel_dim -1: correct"),
        ("gpt_oss", {"layer_types": -1}, "has layer_types -1, where mlx-lm's gpt_oss expects a li"),
        ("llama", {"hidden_size": REMOVED}, "has no hidden_size, which mlx-lm's llama needs"),
        (
            "llama",
            {"model_type": "llama9"},
            "mlx-lm has no models of type 'llama9': use a newer",
        ),
        ("llama", {"rope_theta": [3]}, r"has rope_theta \[3\], where mlx-lm's llama expects a nu"),
        ("gemma3_text", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar null, where"),
        ("gemma3_text", {"query_pre_attn_scalar": "x"}, 'scalar "x", .* expects a number:'),
        ("qwen3_next", {"linear_num_value_heads": "8"}, 'heads "8", .* expects a whole number:'),
        ("qwen3_5", {"linear_num_value_heads": [8]}, r"_heads \[8\], .*qwen3_5 expects a whole"),
        ("qwen3_next", {"linear_num_key_heads": 0}, "heads 0, .* a whole number, not 0:"),
        ("jamba", {"layers_block_type": 3}, "layers_block_type 3, .* a list or null:"),
        ("kimi_k3", {"attn_res_block_size": 0}, "block_size 0, .* null, not 0:"),
    ],
)
def test_the_field_that_mlx_lm_fails_with_is_named(name: str, fields: dict[str, Any], told: str):
    with pytest.raises(ModelError, match=told) as raised:
        make_skeleton(changed(name, **fields))
    assert "\n" not in str(raised.value)
