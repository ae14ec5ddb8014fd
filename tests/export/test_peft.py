"""PEFT's format: names, transposes and scales as PEFT has them, and adapters that come back bit-exactly."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma3
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

from mlx_loraplus import AdapterError
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.base_layers import full_weight
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.export import transformers_names
from mlx_loraplus.export.peft import load_peft, unchecked_names, write_peft
from mlx_loraplus.export.peft_import_tensors import PEFTConfig
from mlx_loraplus.export.transformers_names import hub_path, missing_modules
from mlx_loraplus.export.vllm_rules import vllm_refusals
from scripts.judges.gguf_families import make_family
from tests.conftest import CONFIGS, make_model, randomize_adapters, same

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])
GOLDEN = Path(__file__).parent.parent / "golden" / "peft"
JUDGED = Path(__file__).parents[2] / "scripts" / "judges" / "results" / "peft.json"
NAMES = Path(transformers_names.__file__).with_suffix(".json")
LAYER = "base_model.model.model.layers.1."


def vision_model() -> nn.Module:
    """A Gemma 3 whose names are those of the multimodal checkpoints."""
    mx.random.seed(0)
    settings = {"model_type": "gemma3", "text_config": dict(CONFIGS["gemma3"]), "vocab_size": 128}
    model = gemma3.Model(gemma3.ModelArgs.from_dict(settings))
    model.language_model.tie_word_embeddings = True
    model.language_model.pop("lm_head")
    mx.eval(model.parameters())
    return model


def make(kind: str) -> nn.Module:
    return vision_model() if kind == "gemma3-vision" else make_model(kind)


def adapted(kind: str, **settings: Any) -> nn.Module:
    model = make(kind)
    attach_adapters(model, AdapterConfig(**{"rank": 4, "alpha": 6.0} | settings))
    randomize_adapters(model)
    return model


def written(model: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder.mkdir(exist_ok=True)
    write_peft(model, "org/base", folder)
    return json.loads((folder / "adapter_config.json").read_text()), load_file(
        folder / "adapter_model.safetensors"
    )


CASES = {
    "llama": {},
    "llama embeddings": {"target_modules": ("all-linear", "embed_tokens", "lm_head")},
    "llama norms": {"train_modules": ("norms",)},
    "llama last": {"num_layers": 1, "rslora": True},
    "llama dora": {"adapter": "dora", "dropout": 0.1},
    "gemma3 full": {"train_modules": ("embed_tokens",)},
    "gemma3 tied": {"target_modules": ("all-linear", "embed_tokens")},
    "gemma3-vision": {},
    "mixtral": {},
    "qwen3_moe": {},
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_comes_back_bit_exactly(tmp_path: Path, case: str):
    kind = case.split()[0]
    model = adapted(kind, **CASES[case])
    written(model, tmp_path / "peft")
    back = load_peft(make(kind), tmp_path / "peft")
    assert same(model.trainable_parameters(), back.trainable_parameters())
    assert mx.array_equal(model(TOKENS), back(TOKENS))
    assert {a.dropout.p for a in find_adapters(back).values()} == {
        a.dropout.p for a in find_adapters(model).values()
    }


@pytest.mark.parametrize(
    "settings", [{"adapter": "vera", "rank": 16, "alpha": 16.0}, {"init": "pissa"}]
)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_vera_and_pissa_become_the_lora_they_are(tmp_path: Path, kind: str, settings: dict):
    model = adapted(kind, **settings)
    config, _ = written(model, tmp_path / "peft")
    assert config["r"] == (
        16 if "adapter" in settings else 8
    )  # PiSSA with its start: twice the rank
    back = load_peft(make(kind), tmp_path / "peft")
    assert mx.abs(back(TOKENS) - model(TOKENS)).max() < 2e-5 * mx.abs(model(TOKENS)).max()


@pytest.mark.parametrize("kind", ["llama", "gemma3-vision"])
def test_what_is_written_adds_up_by_pefts_own_rule(tmp_path: Path, kind: str):
    model = adapted(kind, rslora=True)
    config, tensors = written(model, tmp_path / "peft")
    assert not config["use_rslora"]
    for path, adapter in find_adapters(model).items():
        name = (
            path
            if kind == "llama"
            else path.replace("language_model.model.", "model.language_model.")
        )
        a, b = (tensors[f"base_model.model.{name}.lora_{each}.weight"] for each in "AB")
        delta = config["lora_alpha"] / config["r"] * b @ a
        weight = full_weight(adapter.base, mx.float32)
        assert delta.shape == weight.shape
        np.testing.assert_allclose(
            np.array(adapter.merged(weight)) - np.array(weight), delta, atol=1e-5
        )


def test_names_shapes_and_targets(tmp_path: Path):
    _, tensors = written(adapted("mixtral"), tmp_path / "mixtral")
    assert tensors[f"{LAYER}block_sparse_moe.experts.3.w2.lora_A.weight"].shape == (
        4,
        96,
    )  # down: 96 → 64
    assert tensors[f"{LAYER}block_sparse_moe.experts.3.w3.lora_B.weight"].shape == (96, 4)
    config, tensors = written(adapted("llama"), tmp_path / "llama")
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert tensors[f"{LAYER}self_attn.k_proj.lora_B.weight"].shape == (32, 4)
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (
        4,
        6,
        "org/base",
    )
    config, _ = written(adapted("llama", num_layers=1), tmp_path / "last")
    assert "model.layers.2.self_attn.q_proj" in config["target_modules"]
    config, _ = written(adapted("gemma3-vision"), tmp_path / "vision")
    assert "model.language_model.layers.0.self_attn.q_proj" in config["target_modules"]
    config, tensors = written(
        adapted("gemma3", target_modules=("embed_tokens",)), tmp_path / "tied"
    )
    assert config["target_modules"] == ["embed_tokens", "lm_head"]
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (4, 128)
    assert tensors["base_model.model.lm_head.lora_B.weight"].shape == (128, 4)


def test_other_ranks_and_scales_become_one(tmp_path: Path):
    model = adapted("llama", target_modules=("up_proj",))
    first, second, third = find_adapters(model).values()
    second.lora_a, second.lora_b = second.lora_a[:, :2], second.lora_b[:2]
    third.scale *= 3
    config, tensors = written(model, tmp_path / "peft")
    assert config["r"] == 4
    assert not tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][:, 2:].any()
    back = load_peft(make("llama"), tmp_path / "peft")
    assert {adapter.scale for adapter in find_adapters(back).values()} == {first.scale}
    assert mx.abs(back(TOKENS) - model(TOKENS)).max() < 1e-5


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_a_scale_that_peft_has_none_of_goes_into_b(tmp_path: Path, scale: float):
    model = adapted("llama")
    for adapter in find_adapters(model).values():
        adapter.scale = scale
    config, _ = written(model, tmp_path / "peft")
    assert config["lora_alpha"] > 0
    back = load_peft(make("llama"), tmp_path / "peft")
    assert mx.abs(back(TOKENS) - model(TOKENS)).max() < 1e-5


def test_an_expert_has_the_scale_of_its_own_name(tmp_path: Path):
    written(adapted("mixtral"), tmp_path / "peft")
    changed(tmp_path / "peft", alpha_pattern={"w1": 12.0, "experts.2.w2": 3.0})  # 6 for the others
    as_was, scaled = adapted("mixtral"), load_peft(make("mixtral"), tmp_path / "peft")
    for path, adapter in find_adapters(scaled).items():
        ratio = (adapter.delta() / find_adapters(as_was)[path].delta()).reshape(
            len(adapter.base.weight), -1
        )
        wanted = {"gate_proj": [2.0] * 4, "down_proj": [1, 1, 0.5, 1]}.get(
            path.rpartition(".")[2], [1.0] * len(ratio)
        )
        assert mx.allclose(mx.median(ratio, axis=1), mx.array(wanted), atol=1e-3), path


@pytest.mark.parametrize(
    ("key", "applies"),
    [("q_proj", True), ("^q_proj", False), (r".*\.q_proj", True), ("^model.*q_proj", True), ("proj", False),
     ("self_attn.q_proj", True), ("layers.1.self_attn.q_proj", False), ("(q|v)_proj", True), ("q_pro", False)],
)  # fmt: skip
def test_an_alpha_pattern_matches_as_in_peft(tmp_path: Path, key: str, applies: bool):
    """The rule is get_pattern_key's of PEFT 0.21: the key behind a dot or at the start of the whole name."""
    written(
        adapted("llama", target_modules=("model.layers.0.self_attn.q_proj",)), tmp_path / "peft"
    )
    before = next(iter(find_adapters(load_peft(make("llama"), tmp_path / "peft")).values())).delta()
    changed(tmp_path / "peft", alpha_pattern={key: 24.0})  # 6 without it
    after = next(iter(find_adapters(load_peft(make("llama"), tmp_path / "peft")).values())).delta()
    assert mx.allclose(after, before * (4 if applies else 1), atol=1e-5)


def test_every_alpha_pattern_matches_as_peft_itself_said():
    """scripts/judges/golden_peft asked PEFT's get_pattern_key for each of these keys and names."""
    golden = json.loads((GOLDEN.parent / "peft_patterns.json").read_text())
    assert len(golden["matches"]) >= 40
    for key, matched in golden["matches"].items():
        config = PEFTConfig(peft_type="LORA", r=4, lora_alpha=6, alpha_pattern={key: 24})
        ours = [name for name in golden["names"] if config.scale_of(name, 4) == 6.0]
        assert ours == matched, key


def test_names_are_those_of_the_class_that_transformers_takes(tmp_path: Path):
    """AutoModelForCausalLM takes the text part of Llama 4 and Qwen 3.5 alone, and all of Gemma 3."""
    _, tensors = written(
        adapted("llama4", target_modules=("q_proj", "v_proj")), tmp_path / "llama4"
    )
    assert {name.partition(".layers.")[0] for name in tensors} == {"base_model.model.model"}
    assert (
        hub_path("language_model.model.layers.0.mlp.up_proj", "qwen3_5")
        == "model.layers.0.mlp.up_proj"
    )
    assert hub_path("language_model.model.norm", "gemma3") == "model.language_model.norm"
    assert hub_path("language_model.lm_head", "gemma3") == "lm_head"
    assert not missing_modules(["model.layers.7.self_attn.qkv_proj", "lm_head"], "phi3")
    assert missing_modules(["model.layers.7.self_attn.q_proj"], "phi3") == [
        "transformers has no layer model.layers.7.self_attn.q_proj in phi3"
    ]
    assert not missing_modules(["model.anything"], "a type that transformers does not have")


def test_a_type_without_known_names_is_reported(tmp_path: Path):
    model = adapted("llama")
    assert unchecked_names(model) == ""
    model.model_type = "openelm"
    written(model, tmp_path / "peft")
    line = unchecked_names(model)
    assert line.startswith("the module names were not checked: transformers' names for openelm")
    assert "\n" not in line


def test_an_adapter_of_a_vision_tower_is_told_as_such(tmp_path: Path):
    written(adapted("llama"), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.vision_tower.encoder.layers.0.q_proj.lora_A.weight"
    save_file(
        tensors | {name: np.zeros((4, 8), np.float32)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match="a part for images or sound"):
        load_peft(make("llama"), tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("mixtral", {"adapter": "dora"}, "DoRA on the experts"),
        (
            "gemma3",
            {"adapter": "dora", "target_modules": ("embed_tokens",)},
            "DoRA on the embedding",
        ),
        ("llama", {"init": "loftq", "quantize_group_size": 32}, "a quantized base of its own"),
        ("llama4", {}, "whose names in PEFT are not known here"),
        ("mixtral", {"target_modules": ("gate_proj",)}, "without its up_proj"),
    ],
)
def test_what_peft_can_not_express_is_told(tmp_path: Path, kind: str, settings: dict, told: str):
    model = adapted(kind, **settings)
    with pytest.raises(AdapterError, match=rf"PEFT can't express.*{told}.*mlx_loraplus\.fuse"):
        write_peft(model, "org/base", tmp_path)
    assert not list(tmp_path.iterdir())


def test_vllm_takes_ours_and_its_rules_are_told(tmp_path: Path):
    for kind in ("llama", "gemma3-vision", "mixtral"):
        assert write_peft(adapted(kind), "org/base", tmp_path) == []
    config, names = written(adapted("llama"), tmp_path)
    assert vllm_refusals(config, names, "llama") == []
    for change, told in (
        ({"r": 1024}, "rank is 1024"),
        ({"rank_pattern": {"gate_up_proj": 1024}}, "rank is 1024"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ".*_proj"}, "pattern"),
    ):
        assert told in "; ".join(vllm_refusals(config | change, names, "llama"))
    for name, told in (
        ("norm.weight", "neither a lora_A"),
        ("layers.0.mlp.fc1.lora_A.weight", "can't adapt model.layers.0.mlp.fc1"),
    ):
        assert told in vllm_refusals(config, [f"base_model.model.model.{name}"], "llama")[0]
    assert (
        len(
            write_peft(
                adapted("llama", adapter="dora", train_modules=("norms",)), "org/base", tmp_path
            )
        )
        > 2
    )
    embeddings = {"target_modules": ("all-linear", "embed_tokens")}
    assert write_peft(adapted("llama", **embeddings), "org/base", tmp_path) == []
    assert (
        len(write_peft(adapted("gemma3", **embeddings), "org/base", tmp_path)) == 2
    )  # the embeddings and the head


def test_keys_that_are_values_are_told_for_vllm(tmp_path: Path):
    """vLLM would adapt the keys of Gemma 4 31B and not the values, which are the same numbers."""
    model = make_family("gemma4, MoE")
    attach_adapters(model, AdapterConfig(rank=4, target_modules=("q_proj", "k_proj", "v_proj")))
    (told,) = {
        problem.split(" computes ")[1] for problem in write_peft(model, "org/base", tmp_path)
    }
    assert "vLLM would change only the keys" in told
    model = make_family("gemma4, MoE")
    attach_adapters(model, AdapterConfig(rank=4, target_modules=("q_proj", "v_proj")))
    assert write_peft(model, "org/base", tmp_path) == []


def test_pefts_own_adapters_give_pefts_own_logits():
    """Made by scripts/judges/check_peft --golden: rsLoRA, patterns, DoRA; embeddings and head; a norm in full."""
    tokens = mx.array([[1, 5, 2, 7, 3, 9, 11, 10, 15, 3, 17, 9]])
    for name in ("theirs0", "theirs1", "theirs2"):
        model, _ = load_model(GOLDEN / "base")
        model.set_dtype(mx.float32)
        expected = np.load(GOLDEN / f"{name}.npy")
        plain = np.array(model(tokens)[0])
        load_peft(model, GOLDEN / name)
        found = np.array(model(tokens)[0])
        assert (
            np.abs(found - expected).max()
            < 1e-4 * np.abs(expected).max()
            < 0.01 * np.abs(expected - plain).max()
        ), name


def changed(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "parts"),
    [("granitemoehybrid", "self_attn"), ("lfm2", "conv"), ("llama4_text", "feed_forward")],
)
def test_every_kind_of_layer_has_a_name_in_transformers(name: str, parts: str):
    """The names come from configs, of which the default one may lack a kind of layers."""
    names = json.loads(NAMES.read_text())["names"][name]
    path = {"self_attn": "q_proj", "conv": "in_proj", "feed_forward": "up_proj"}[parts]
    assert f"model.layers.N.{parts}.{path}" in names
    assert not missing_modules([f"model.layers.3.{parts}.{path}"], name)


def test_peft_judged_every_family_both_ways():
    """The stored results of scripts/judges/check_peft: logits within 1e-4 of the largest one."""
    results = json.loads(JUDGED.read_text())
    assert results["bound"] <= 1e-4
    for row in results["rows"]:
        assert row["difference"] <= results["bound"] * row["largest_logit"] < row["effect"], row

    ways: dict[str, set[str]] = {"ours → PEFT": set(), "PEFT → ours": set()}
    for row in results["rows"]:
        ways[row["where"]].add(row["model"].partition("-")[0])
    families = {
        "llama", "gemma2", "gemma3", "gemma4", "mistral", "ministral3", "mixtral", "qwen2", "qwen3",
        "phi3", "smollm3", "olmo2", "olmo3", "granite", "granite4", "deepseek", "gpt",
    }  # fmt: skip
    assert all(families <= {*found, "gpt"} for found in ways.values()), ways
