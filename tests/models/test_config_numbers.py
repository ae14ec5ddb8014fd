"""A config with numbers that no model has is refused in one line, with the field and what is allowed."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.config_numbers import check_numbers
from mlx_loraplus.models.loading import load_base
from mlx_loraplus.models.skeleton import make_skeleton
from tests.conftest import CONFIGS

FAMILIES = json.loads((Path(__file__).parents[1] / "families" / "configs.json").read_text())
COUNTS = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "head_dim")


def changed(kind: str, **fields: Any) -> dict[str, Any]:
    """Return a tiny config with other values in the language model's part."""
    config = json.loads(json.dumps(CONFIGS[kind]))
    config.get("text_config", config).update(fields)
    return config


@pytest.mark.parametrize("kind", ["llama", "gemma3", "llama4", "mixtral"])
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -4, 1.5, "8", True, 2**40])
def test_a_size_is_a_positive_whole_number(kind: str, name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"has {name} {value!r}; allowed is a whole number"):
        make_skeleton(changed(kind, **{name: value}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": None}, "has num_hidden_layers None"),
        ({"text_config": [1]}, r"has text_config \[1\]; allowed is an object with the language"),
        ({"num_key_value_heads": [2, 0]}, r"has num_key_value_heads \[2, 0\]"),
        ({"rms_norm_eps": 0}, "has rms_norm_eps 0; allowed is a small positive number"),
        ({"rms_norm_eps": "1e-5"}, "has rms_norm_eps '1e-5'"),
        ({"max_position_embeddings": -1}, "has max_position_embeddings -1"),
        ({"num_experts_per_tok": 9}, "9; allowed is 1 to num_local_experts, which is 4"),
        ({"num_experts_per_tok": 0}, "0; allowed is 1 to num_local_experts, which is 4"),
        ({"rope_scaling": "linear"}, "has rope_scaling 'linear'; allowed is null, or as in"),
        ({"rope_scaling": {"type": "dynamic"}}, "a factor beside the type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "a factor beside the type 'yarn'"),
        ({"rope_scaling": {"factor": 2.0}}, "a rope_type beside the factor"),
    ],
)
def test_other_numbers_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_skeleton(changed("mixtral", **fields))


def test_null_means_the_default_of_a_family() -> None:
    check_numbers(changed("llama", num_key_value_heads=None, head_dim=None, rope_scaling=None))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_is_refused(name: str) -> None:
    check_numbers(FAMILIES[name])


def test_the_refusal_names_the_folder(tmp_path: Path, place: Any) -> None:
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    with pytest.raises(ModelError, match=r"model can't be used: its config\.json has num_"):
        load_base(tmp_path / "model")


@pytest.mark.parametrize("kind", ["mixtral", "gemma2", "qwen3_moe", "cohere"])
@pytest.mark.parametrize("scaling", [
    {"type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}, {"type": "spiral"},
])  # fmt: skip
def test_a_scaling_that_a_family_ignores_is_refused(kind: str, scaling: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"ignores the rope_scaling .* use a newer mlx-lm"):
        make_skeleton(changed(kind, rope_scaling=scaling))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3"])
def test_a_scaling_that_a_family_applies_is_accepted(kind: str) -> None:
    make_skeleton(changed(kind, rope_scaling={"type": "linear", "factor": 4.0}))


@pytest.mark.parametrize("scaling", [{"type": "default"}, {"type": "linear", "factor": 1.0}])
def test_a_scaling_that_changes_nothing_is_accepted(scaling: dict[str, Any]) -> None:
    make_skeleton(changed("gemma2", rope_scaling=scaling))
