"""Models with few layers, or with layers of only one kind: trained right, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.config_translation import for_mlx_lm
from mlx_loraplus.models.loading import load_base
from mlx_loraplus.models.skeleton import make_skeleton
from tests.families import walk as walks
from tests.families.walk import CONFIGS, QUICK, walk, write_folder

REMOVED = object()
SLIDING, FULL = "sliding_attention", "full_attention"


def changed(name: str, **fields: Any) -> dict[str, Any]:
    """Return a tiny config with other values in the language model's part."""
    config = json.loads(json.dumps(CONFIGS[name]))
    part = config.get("text_config", config)
    part.update(fields)
    for field, value in fields.items():
        if value is REMOVED:
            del part[field]
    return config


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("gemma3_text", {"num_hidden_layers": 2}, "2 layers, sliding_window_pattern 3"),
        ("gemma3_text", {"sliding_window_pattern": REMOVED}, "3 layers"),
        ("cohere2", {"num_hidden_layers": 1}, "1 layer, sliding_window_pattern 2"),
        ("llama4", {"num_hidden_layers": 3}, "3 layers"),
        ("gpt_oss", {"layer_types": [FULL] * 2}, f"2 layers, layer_types of {FULL}"),
        ("olmo3", {"layer_types": [SLIDING] * 2}, f"2 layers, layer_types of {SLIDING}"),
        ("llama", {"layer_types": [SLIDING] * 2}, f"2 layers, layer_types of {SLIDING}"),
        ("qwen3_next", {"full_attention_interval": 1}, "2 layers, full_attention_interval 1"),
        ("qwen3_next", {"full_attention_interval": 3}, "2 layers, full_attention_interval 3"),
        ("qwen3_5", {"full_attention_interval": 1}, "2 layers, full_attention_interval 1"),
        ("qwen3_5_moe", {"full_attention_interval": 7}, "2 layers, full_attention_interval 7"),
        ("gemma4_text", {"num_hidden_layers": 3}, "3 layers, sliding_window_pattern 2, num_kv_"),
        ("mellum", {"layer_types": [SLIDING] * 2}, f"2 layers, layer_types of {SLIDING}"),
        ("jamba", {"num_hidden_layers": 1}, "1 layer, attn_layer_period 2, attn_layer_offset 1"),
        ("nemotron_h", {"hybrid_override_pattern": "MM"}, 'hybrid_override_pattern "MM"'),
    ],
)
def test_a_kind_of_layer_that_is_missing_is_one_line(
    name: str, fields: dict[str, Any], told: str, tmp_path: Path
):
    config = changed(name, **fields)
    told = f"has {told}" if told[0].isdigit() else told
    with pytest.raises(
        ModelError, match=f"{told}.* mlx-lm's {name} may need layers of every"
    ) as one:
        make_skeleton(config)
    assert "\n" not in str(one.value)

    # A folder is named.
    write_folder(name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"{tmp_path} can't be (used|loaded by mlx-lm): "):
        load_base(tmp_path)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gemma3_text", {"num_hidden_layers": 1, "sliding_window_pattern": 1}),
        ("exaone4", {"layer_types": [FULL] * 2, "sliding_window": None}),
    ],
)
def test_layers_of_one_kind_are_trained_right(
    name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(walks.CONFIGS, "odd", changed(name, **fields))
    stages = (*QUICK, "cache")
    assert walk("odd", stages) == dict.fromkeys(stages, "ok")


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        (
            "mellum",
            {"layer_types": [SLIDING]},
            "has 2 layers, but layer_types has 1 entry; allowed",
        ),
        ("laguna", {"mlp_layer_types": ["dense"]}, "2 layers, but mlp_layer_types has 1 entry"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval 0; allowed is a"),
        ("gemma3_text", {"sliding_window_pattern": -2}, "sliding_window_pattern -2; allowed is a"),
        ("gemma3_text", {"sliding_window_pattern": "LG"}, "sliding_window_pattern 'LG'; allowed"),
        ("gemma3_text", {"sliding_window": 0}, "sliding_window 0; allowed is a whole number of"),
        ("gpt_oss", {"sliding_window": -1}, "has sliding_window -1; allowed is a whole number"),
        ("llama4", {"attention_chunk_size": 2.5}, "attention_chunk_size 2.5; allowed is a whole"),
        ("jamba", {"attn_layer_period": 2.5}, "attn_layer_period 2.5; allowed is a whole number"),
    ],
)
def test_lists_and_periods_are_checked(name: str, fields: dict[str, Any], told: str):
    with pytest.raises(ModelError, match=told):
        make_skeleton(changed(name, **fields))


def test_windows_in_other_layers_than_in_the_config_are_refused():
    with pytest.raises(ModelError, match=r"has full_attention in layer 0 .*llama4 has a window"):
        make_skeleton(changed("llama4", layer_types=[FULL, "chunked_attention"] * 2))
    with pytest.raises(
        ModelError, match=r"has sliding_attention in layer 1 .*plamo3 has no window"
    ):
        make_skeleton(changed("plamo3", layer_types=[SLIDING] * 2))
    make_skeleton(changed("llama4", layer_types=[*["chunked_attention"] * 3, FULL]))


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"sliding_window_pattern": 4}, "LLLG"),
        ({"sliding_window_pattern": 4, "layer_types": [SLIDING, FULL] * 2}, None),
        ({"sliding_window_pattern": "LG", "layer_types": [SLIDING, FULL] * 2}, "LG"),
        ({"layer_types": [FULL, SLIDING, SLIDING]}, "GLL"),
        ({"layer_types": [FULL] * 2, "sliding_window": None}, None),
        ({"layer_types": [FULL] * 2}, "GG"),
    ],
)
def test_the_layers_of_exaone_4_are_those_of_transformers(
    fields: dict[str, Any], pattern: str | None
):
    base = {"model_type": "exaone4", "sliding_window": 8}
    if isinstance(fields.get("sliding_window_pattern"), int) and "layer_types" in fields:
        with pytest.raises(ModelError, match="pattern LLLG, but its layer_types say LGLG"):
            for_mlx_lm(base | fields)
    else:
        assert for_mlx_lm(base | fields)["sliding_window_pattern"] == pattern


def test_a_trial_of_a_skeleton_computes_nothing():
    before = mx.get_active_memory()
    config = changed("llama", hidden_size=4096, intermediate_size=16384, num_hidden_layers=40)
    skeleton = make_skeleton(config)
    assert mx.get_active_memory() - before < 1 << 24
    assert skeleton.training


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("exaone_moe", {"sliding_window_pattern": "LLLG"}),  # K-EXAONE, as published
        ("llama4_text", {"interleave_moe_layer_step": 0, "moe_layers": []}),  # without experts
        ("qwen3", {"layer_types": ["full_attention"]}),  # a merge with more layers
    ],
)
def test_settings_that_mlx_lm_does_not_read_are_not_checked(name: str, fields: dict[str, Any]):
    assert len(make_skeleton(changed(name, **fields)).layers) > 1
