"""Activations: what a config names against what mlx-lm's layers compute."""

from typing import Any

import pytest

from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.activation_note import _computed, activation_note
from mlx_loraplus.models.skeleton import make_skeleton
from tests.families.walk import CONFIGS

TANH = "gelu_pytorch_tanh"
COMPUTED = {
    "llama": "silu", "qwen2": "silu", "mixtral": "silu", "phi3": "silu", "phimoe": "silu", "internlm2": "silu",
    "exaone": "silu", "cohere": "silu", "olmoe": "silu", "granitemoe": "silu", "gemma": "gelu", "gemma2": TANH,
    "gemma3": TANH, "gemma3_text": TANH, "gemma4_text": TANH, "gpt2": TANH, "gptj": TANH, "gpt_neox": TANH, "phi": TANH,
    "gpt_bigcode": "gelu", "starcoder2": "gelu", "bitnet": "relu2", "nanochat": "relu2", "nemotron": "relu2",
    "gpt_oss": None, "apertus": None, "mamba": None,
}  # fmt: skip


def with_activation(name: str, activation: str, field: str = "hidden_act") -> dict[str, Any]:
    config = CONFIGS[name]
    if "text_config" in config:
        return config | {"text_config": config["text_config"] | {field: activation}}
    return config | {field: activation}


@pytest.mark.parametrize(("name", "activation"), COMPUTED.items())
def test_what_a_family_computes_is_found(name: str, activation: str | None):
    assert _computed(make_skeleton(CONFIGS[name])) == activation


@pytest.mark.parametrize(
    ("name", "activation", "field"),
    [
        ("llama", "gelu", "hidden_act"),
        ("llama", "relu2", "hidden_act"),
        ("qwen3_moe", "relu", "hidden_act"),
        ("gemma3", "silu", "hidden_activation"),
        ("gemma2", "silu", "hidden_activation"),
        ("gpt2", "relu", "activation_function"),
        ("bitnet", "silu", "hidden_act"),
        ("starcoder2", "quick_gelu", "hidden_act"),
    ],
)
def test_another_function_is_refused(name: str, activation: str, field: str):
    with pytest.raises(ModelError, match=f"has the activation {activation}, but mlx-lm's {name}"):
        make_skeleton(with_activation(name, activation, field))


@pytest.mark.parametrize(
    ("name", "activation", "noted"),
    [
        ("llama", "silu", False),
        ("llama", "swish", False),
        ("gemma", TANH, True),
        ("gemma", "gelu", True),  # a legacy value, which transformers reads as the approximation
        ("gemma2", "gelu", False),
        ("gpt_neox", "gelu", True),
        ("gpt_neox", "gelu_fast", False),
        ("starcoder2", TANH, True),
        ("nemotron-nas", "gelu", False),
        ("gpt_oss", "silu", False),
    ],
)
def test_an_approximation_is_noted(name: str, activation: str, noted: bool):
    config = with_activation(name, activation)
    note = activation_note(make_skeleton(config), config)
    assert (note is not None) == noted
    assert note is None or "the two differ by less than 0.0005" in note


@pytest.mark.parametrize("activation", ["xielu", "laplace", "SiLU"])
def test_a_name_that_is_not_known_is_noted(activation: str):
    config = CONFIGS["llama"] | {"hidden_act": activation}
    note = activation_note(make_skeleton(config), config)
    assert note is not None
    assert f"the activation '{activation}', a name that is not known here" in note
    assert "mlx-lm computes silu" in note


def test_the_field_that_transformers_reads_counts():
    """Gemma 2 and 3 have both fields, and hidden_activation is the one that is used."""
    make_skeleton(CONFIGS["gemma2"] | {"hidden_activation": TANH, "hidden_act": "silu"})
    config = CONFIGS["starcoder2"] | {"hidden_activation": None, "hidden_act": "gelu"}
    assert activation_note(make_skeleton(config), config) is None
