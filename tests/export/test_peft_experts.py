"""Adapters on experts in PEFT's format: names, shapes and settings; scripts/judges/check_peft asks PEFT."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import _get_classes
from safetensors.numpy import load_file, save_file

from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.errors import AdapterError
from mlx_loraplus.export.peft import load_peft, write_peft
from mlx_loraplus.export.vllm_rules import vllm_refusals
from tests.conftest import randomize_adapters
from tests.families.walk import CONFIGS

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])
PREFIX = "base_model.model.model.layers.1."
KINDS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "gpt_oss",
    "granitemoehybrid", "gemma4", "gemma4_text",
)  # fmt: skip


def make(kind: str) -> Any:
    mx.random.seed(0)
    model_class, args_class = _get_classes(CONFIGS[kind])
    model = model_class(args_class.from_dict(CONFIGS[kind]))
    mx.eval(model.parameters())
    model.eval()
    return model


def adapted(kind: str, **settings: Any) -> Any:
    model = make(kind)
    attach_adapters(model, AdapterConfig(**{"rank": 2, "alpha": 3.0} | settings))
    randomize_adapters(model)
    return model


def written(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    write_peft(model, "org/base", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_experts_comes_back(tmp_path: Path, kind: str):
    model = adapted(kind)
    assert any("switch_mlp" in path or ".experts." in path for path in find_adapters(model))
    config, _ = written(model, tmp_path)
    assert config["lora_dropout"] == 0.0
    back = load_peft(make(kind), tmp_path)
    expected = model(TOKENS)
    assert mx.abs(expected - make(kind)(TOKENS)).max() > 1e-3
    assert mx.abs(back(TOKENS) - expected).max() < 1e-5 * mx.abs(expected).max()


def test_linear_layers_named_like_experts_are_named_by_their_weight(tmp_path: Path):
    """PEFT takes gate_proj, up_proj and down_proj in target_modules for experts alone."""
    config, tensors = written(adapted("deepseek_v3"), tmp_path / "all")
    assert f"{PREFIX}mlp.experts.3.down_proj.lora_A.weight" in tensors
    assert f"{PREFIX}mlp.shared_experts.down_proj.lora_A.weight" in tensors
    assert not [name for name in config["target_modules"] if name.endswith("down_proj")]
    parameters = config["target_parameters"]
    assert "model.layers.1.mlp.shared_experts.down_proj.weight" in parameters
    assert {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"} <= {
        *parameters
    }
    assert config["rank_pattern"] == {"gate_up_proj": 4}
    assert config["alpha_pattern"] == {"gate_up_proj": 6}

    # The same holds without an adapter on experts.
    model = adapted("deepseek_v3", target_modules=("shared_experts.up_proj",))
    config, _ = written(model, tmp_path / "shared")
    assert config["target_modules"] == []
    assert all(name.endswith("up_proj.weight") for name in config["target_parameters"])
    assert "rank_pattern" not in config


def test_experts_without_shared_ones_are_named_as_modules(tmp_path: Path):
    config, tensors = written(adapted("mixtral"), tmp_path)
    assert {"w1", "w2", "w3", "q_proj"} <= {*config["target_modules"]}
    assert "target_parameters" not in config
    assert tensors[f"{PREFIX}block_sparse_moe.experts.0.w1.lora_A.weight"].shape[0] == 2


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss"])
def test_stacked_experts_have_twice_the_rank(tmp_path: Path, kind: str):
    model = adapted(kind)
    config, tensors = written(model, tmp_path)
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert "rank_pattern" not in config
    block = "block_sparse_moe" if kind == "granitemoe" else "mlp"
    name = f"{PREFIX}{block}.experts"
    changes = {
        path.rpartition(".")[2]: np.array(adapter.delta())
        for path, adapter in find_adapters(model).items()
        if ".1." in path
    }
    experts = len(changes["down_proj"])
    for part, leaf in (("", "down_proj"), ("base_layer.", "gate_up_proj")):
        assert f"model.layers.1.{block}.experts.{leaf}" in config["target_parameters"]
        a, b = (tensors[f"{name}.{part}lora_{each}.weight"] for each in "AB")
        for expert in range(experts):
            rows, columns = slice(4 * expert, 4 * expert + 4), slice(expert, None, experts)
            delta = config["lora_alpha"] / config["r"] * b[:, columns] @ a[rows]
            gate, up = changes["gate_proj"][expert], changes["up_proj"][expert]
            wanted = changes["down_proj"][expert]
            if part:
                alternating = np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])
                wanted = alternating if kind == "gpt_oss" else np.concatenate([gate, up])
            np.testing.assert_allclose(delta, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss"])
def test_the_inner_layer_is_the_only_one_if_down_has_no_adapter(tmp_path: Path, kind: str):
    model = adapted(kind, target_modules=("gate_proj", "up_proj"))
    config, tensors = written(model, tmp_path)
    assert all("base_layer" not in name for name in tensors)
    assert all(name.endswith("gate_up_proj") for name in config["target_parameters"])
    back = load_peft(make(kind), tmp_path)
    assert mx.abs(back(TOKENS) - model(TOKENS)).max() < 1e-5


def test_what_vllm_reads_of_experts_is_told(tmp_path: Path):
    """vLLM reads single experts and those of gpt-oss, and other stacked ones if it is asked to."""
    for kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        assert write_peft(adapted(kind), "org/base", tmp_path) == []
    assert write_peft(adapted("gpt_oss"), "org/base", tmp_path) == []
    (told,) = write_peft(adapted("granitemoe"), "org/base", tmp_path)
    assert "--enable-mixed-moe-lora-format" in told
    assert json.loads(told[told.index("{") : told.index("}") + 1])["is_3d_lora_weight"] is True
    down = adapted("qwen3_moe", target_modules=("down_proj",))
    assert write_peft(down, "org/base", tmp_path) == [
        "each expert needs adapters on all three projections"
    ]
    for kind in ("gpt_oss", "granitemoe"):
        half = adapted(kind, target_modules=("down_proj",))
        assert "both" in write_peft(half, "org/base", tmp_path)[0]
    one = [f"{PREFIX}mlp.experts.0.{leaf}.lora_A.weight" for leaf in ("gate_proj", "down_proj")]
    config = {"r": 8, "target_modules": []}
    assert vllm_refusals(config, one, "dots1") == ["vLLM can't adapt the experts of a dots1 model"]


def test_gate_and_up_of_single_experts_need_down(tmp_path: Path):
    model = adapted("qwen2_moe", target_modules=("switch_mlp.gate_proj", "switch_mlp.up_proj"))
    with pytest.raises(AdapterError, match="without its down_proj"):
        write_peft(model, "org/base", tmp_path)


def test_patterns_match_the_full_names_of_stacked_experts(tmp_path: Path):
    """PEFT's patterns see the prefixes of multimodal models, as in other layers."""
    model = adapted("granitemoe")
    config, tensors = written(model, tmp_path)
    towered = {
        name.replace(".model.model.layers.", ".model.model.language_model.layers."): array
        for name, array in tensors.items()
    }
    assert towered.keys().isdisjoint(tensors)
    save_file(towered, tmp_path / "adapter_model.safetensors")

    # Only the patterns give the layers their rank and alpha.
    experts = r"^model\.language_model\.layers\.\d+\.block_sparse_moe\.experts\.\w+"
    others = r"self_attn\.\w+|router\.\w+"
    config |= {
        "rank_pattern": dict.fromkeys((experts, others), config["r"]),
        "alpha_pattern": dict.fromkeys((experts, others), config["lora_alpha"]),
    }
    config |= {"r": 1, "lora_alpha": 1.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    back = load_peft(make("granitemoe"), tmp_path)
    assert mx.abs(back(TOKENS) - model(TOKENS)).max() < 1e-5
