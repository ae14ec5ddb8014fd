"""Sliding windows of a config that mlx-lm ignores."""

from typing import Any

import pytest

from mlx_loraplus.models.ignored_window import ignored_window
from mlx_loraplus.models.skeleton import make_skeleton
from tests.families.walk import CONFIGS

ON = {"use_sliding_window": True, "max_window_layers": 0}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
FULL = {"layer_types": ["full_attention", "full_attention"]}


def window_of(name: str, **settings: Any) -> int | None:
    config = CONFIGS[name] | settings
    return ignored_window(make_skeleton(config), config)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mistral", {}),
        ("mixtral", {}),
        ("phi3", {}),
        ("phimoe", {}),
        ("starcoder2", {}),
        ("gemma2", {}),
        ("gemma2", LAYERS),
        ("qwen2", ON),
        ("qwen2", ON | LAYERS),
        ("qwen3", ON),
        ("qwen2_moe", ON),
        ("qwen3_moe", ON),
        ("smollm3", ON),
    ],
)
def test_a_window_that_mlx_lm_ignores_is_found(name: str, settings: dict[str, Any]):
    assert window_of(name, sliding_window=8, **settings) == 8


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen2", ON | {"max_window_layers": 28}),
        ("qwen3", ON | FULL),
        ("smollm3", {}),
        ("llama", {}),
        ("gemma2", FULL),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_a_window_that_is_switched_off_is_none(name: str, settings: dict[str, Any]):
    assert window_of(name, **{"sliding_window": 8} | settings) is None


@pytest.mark.parametrize(
    "name",
    [
        "gemma3_text", "gemma3", "gemma3n", "gemma4_text", "gpt_oss", "cohere2", "olmo3", "exaone4", "afmoe", "baichuan_m1",
        "plamo3", "mellum", "muse_glimmer", "step3p5", "deepseek_v41", "recurrent_gemma",
    ],
)  # fmt: skip
def test_a_window_that_the_caches_apply_is_none(name: str):
    assert window_of(name) is None


def test_layers_that_llama_and_ministral_have_a_window_for_apply_it():
    assert window_of("llama", sliding_window=8, **LAYERS) is None
    assert window_of("ministral3", sliding_window=8, **LAYERS) is None
