"""Small models of the families that Mac users have, for ``memory_grid``: each has what is special about its family.

``STUDIED`` are those that the terms of ``mlx_loraplus.memory.estimate`` were made with: what a block
keeps was read from the model's code and compared with their peaks. ``UNSEEN`` were chosen and measured
afterwards: other families with the same parts, and other sizes of the same families. A family that was
chosen as unseen, was found to be off, and led to a better formula is among ``STUDIED`` since: falcon-h1,
lfm2, granite4-experts and qwen3.5-wider.
"""

from typing import Any

_SMALL = {
    "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
_WIDER = _SMALL | {
    "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 960, "num_attention_heads": 6,
    "vocab_size": 12_000,
}  # fmt: skip
_LATENT = {  # multi-head latent attention
    "kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "attention_bias": False,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 192,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "rope_scaling": None,
}  # fmt: skip
_GEMMA_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
}  # fmt: skip
_WINDOWS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_DELTA = {  # gated delta rule in three of four blocks
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "partial_rotary_factor": 0.25,
}  # fmt: skip
_MAMBA = {
    "shared_intermediate_size": 512, "attention_bias": False, "mlp_bias": False, "logits_scaling": 2.0,
    "attention_multiplier": 0.125, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "mamba_d_conv": 4,
    "mamba_d_state": 64, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}  # fmt: skip

STUDIED: dict[str, dict[str, Any]] = {
    # Per-layer embeddings, shared keys and values, wider MLPs where they are shared
    "gemma4-small": {
        "model_type": "gemma4",
        "text_config": _SMALL | {
            "model_type": "gemma4_text", "num_key_value_heads": 1, "num_hidden_layers": 8, "vocab_size": 8192,
            "vocab_size_per_layer_input": 8192, "global_head_dim": 128, "num_kv_shared_layers": 4, "sliding_window": 128,
            "hidden_size_per_layer_input": 64, "layer_types": 2 * _WINDOWS, "rope_parameters": _GEMMA_ROPE,
            "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
        },
    },
    "gpt-oss": _SMALL | {
        "model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256,
        "sliding_window": 128, "layer_types": 2 * ["sliding_attention", "full_attention"],
    },
    "deepseek": _SMALL | _LATENT | {"model_type": "deepseek_v3", "scoring_func": "sigmoid"},
    "qwen3.5": {
        "model_type": "qwen3_5",
        "text_config": _SMALL | _DELTA | {"model_type": "qwen3_5_text", "num_experts": 0},
    },
    "granite4": _SMALL | _MAMBA | {
        "model_type": "granitemoehybrid", "num_local_experts": 0, "num_experts_per_tok": 0,
        "layer_types": 3 * ["mamba"] + ["attention"],
    },
    "falcon-h1": _SMALL | {
        "model_type": "falcon_h1", "attention_bias": False, "mlp_bias": False, "mamba_d_conv": 4, "mamba_d_state": 64,
        "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_ssm": 512, "mamba_proj_bias": False,
        "mamba_conv_bias": True,
    },
    "lfm2": _SMALL | {
        "model_type": "lfm2", "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 256,
        "block_ff_dim": 768, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3], "tie_word_embeddings": True,
    },
    "granite4-experts": _WIDER | _MAMBA | {
        "model_type": "granitemoehybrid", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256,
        "mamba_n_heads": 12, "layer_types": 2 * ["mamba", "mamba", "attention"],
    },
    "qwen3.5-wider": {
        "model_type": "qwen3_5",
        "text_config": _WIDER | _DELTA | {
            "model_type": "qwen3_5_text", "num_experts": 0, "linear_num_value_heads": 8, "linear_value_head_dim": 64,
            "num_hidden_layers": 4,
        },
    },
    "olmo3": _SMALL | {"model_type": "olmo3", "attention_bias": False, "sliding_window": 128, "layer_types": _WINDOWS},
}  # fmt: skip

UNSEEN: dict[str, dict[str, Any]] = {
    "gemma4-experts": {
        "model_type": "gemma4",
        "text_config": _WIDER | {
            "model_type": "gemma4_text", "vocab_size_per_layer_input": 12_000, "global_head_dim": 128,
            "num_kv_shared_layers": 0, "sliding_window": 256, "hidden_size_per_layer_input": 0,
            "layer_types": (2 * _WINDOWS)[:6], "rope_parameters": _GEMMA_ROPE, "final_logit_softcapping": 30.0,
            "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 192,
            "tie_word_embeddings": True, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        },
    },
    "gemma4-wider": {
        "model_type": "gemma4",
        "text_config": _WIDER | {
            "model_type": "gemma4_text", "vocab_size_per_layer_input": 12_000, "global_head_dim": 128,
            "num_kv_shared_layers": 2, "sliding_window": 256, "hidden_size_per_layer_input": 96,
            "layer_types": (2 * _WINDOWS)[:6], "rope_parameters": _GEMMA_ROPE, "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
    },
    "gpt-oss-wider": _WIDER | {
        "model_type": "gpt_oss", "num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 384,
        "sliding_window": 256, "layer_types": 3 * ["sliding_attention", "full_attention"],
    },
    "glm4-lite": _WIDER | _LATENT | {"model_type": "glm4_moe_lite", "partial_rotary_factor": 0.5},
    "mistral-small4": _SMALL | _LATENT | {
        "model_type": "deepseek_v3", "scoring_func": "sigmoid", "n_routed_experts": 16, "num_experts_per_tok": 4,
        "moe_intermediate_size": 128, "kv_lora_rank": 128, "num_attention_heads": 8, "num_key_value_heads": 8,
    },
    "qwen3.5-square": {
        "model_type": "qwen3_5",
        "text_config": _SMALL | _DELTA | {
            "model_type": "qwen3_5_text", "num_experts": 0, "hidden_size": 192, "linear_num_value_heads": 6,
            "linear_num_key_heads": 6, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        },
    },
    "granite4-long": _WIDER | _MAMBA | {
        "model_type": "granitemoehybrid", "num_local_experts": 0, "num_experts_per_tok": 0, "num_hidden_layers": 4,
        "mamba_n_heads": 12, "mamba_d_head": 32, "mamba_d_state": 96, "layer_types": 2 * ["mamba", "attention"],
    },
    "qwen3-next": _SMALL | _DELTA | {
        "model_type": "qwen3_next", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192,
        "shared_expert_intermediate_size": 192, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "rope_scaling": None, "head_dim": 64,
    },
    "granite4-attention": _WIDER | _MAMBA | {
        "model_type": "granitemoehybrid", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256,
        "layer_types": 6 * ["attention"],
    },
    "qwen3-moe": _WIDER | {
        "model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    },
    "smollm3": _WIDER | {"model_type": "smollm3", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
                         "no_rope_layers": [1, 1, 1, 0, 1, 1]},
    "olmo3-wider": _WIDER | {"model_type": "olmo3", "attention_bias": False, "sliding_window": 256,
                             "layer_types": (2 * _WINDOWS)[:6]},
    "phi4-mini": _WIDER | {
        "model_type": "phi3", "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
    "ministral": _WIDER | {
        "model_type": "ministral3", "sliding_window": None, "layer_types": 6 * ["full_attention"],
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default", "original_max_position_embeddings": 4096,
                            "llama_4_scaling_beta": 0.1},
    },
    "llama4": {
        "model_type": "llama4",
        "text_config": _WIDER | {
            "model_type": "llama4_text", "attention_bias": False, "attention_chunk_size": 256,
            "interleave_moe_layer_step": 2, "intermediate_size": 384, "intermediate_size_mlp": 768,
            "num_experts_per_tok": 1, "num_local_experts": 8, "rope_scaling": None, "use_qk_norm": True,
        },
    },
    "glm4": _SMALL | {"model_type": "glm4", "attention_bias": True, "partial_rotary_factor": 0.5},
    "cohere2": _SMALL | {"model_type": "cohere2", "layer_norm_eps": 1e-5, "layer_norm_bias": False, "logit_scale": 0.1,
                         "attention_bias": False, "sliding_window": 128, "sliding_window_pattern": 4,
                         "tie_word_embeddings": True},
    "gemma2": _SMALL | {
        "model_type": "gemma2", "query_pre_attn_scalar": 64, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "vocab_size": 12_000,
    },
}  # fmt: skip

NEW: dict[str, dict[str, Any]] = {
    "glm4-moe": _SMALL | {
        "model_type": "glm4_moe", "moe_intermediate_size": 192, "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "n_routed_experts": 8, "routed_scaling_factor": 1.0, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "rope_scaling": None, "use_qk_norm": True, "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "seed-oss": _WIDER | {"model_type": "seed_oss", "attention_bias": True},
    "exaone4": _SMALL | {"model_type": "exaone4", "rope_scaling": None, "sliding_window": 128,
                         "sliding_window_pattern": "LLLG", "tie_word_embeddings": True},
    "olmoe": _WIDER | {"model_type": "olmoe", "num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 192},
    "apertus": _SMALL | {"model_type": "apertus", "mlp_bias": False, "attention_bias": False, "post_norm": False,
                         "qk_norm": True},
    "gemma3-tall": _SMALL | {
        "model_type": "gemma3_text", "num_hidden_layers": 12, "hidden_size": 320, "head_dim": 96, "vocab_size": 20_000,
        "sliding_window": 64, "sliding_window_pattern": 6, "query_pre_attn_scalar": 96,
    },
}  # fmt: skip
"""Families and a size that were chosen when the formulas and all other steps were done, and were never measured before."""
