"""Every family of mlx-lm 0.32.2: its first stages, and the docs' page. ``scripts/judges/families`` walks all stages."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_loraplus import ConfigError, ModelError
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.storage import load_adapter, save_adapter
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.export.fuse import fuse_adapter, quantization_of, save_fused
from mlx_loraplus.memory.model_shapes import find_ends, measure
from mlx_loraplus.models.derived_weights import start_inference
from mlx_loraplus.models.loading import load_folder
from mlx_loraplus.models.skeleton import make_skeleton
from tests.families.walk import CONFIGS, QUICK, TOKENS, walk, write_folder

ROOT = Path(__file__).resolve().parents[2]
RECORDED = json.loads((ROOT / "scripts" / "judges" / "results" / "families.json").read_text())[
    "families"
]
CRASHING = [name for name, stages in RECORDED.items() if "the process ended" in stages["load"]]


def test_every_type_of_mlx_lm_is_there_and_recorded():
    assert RECORDED.keys() == CONFIGS.keys()
    assert len(CONFIGS) >= 138


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in CRASHING])
def test_a_family_is_as_recorded_or_better(name: str):
    """No stage that was right is wrong now, and the family is refused where it was."""
    found = walk(name, QUICK)
    for stage, told in found.items():
        if RECORDED[name][stage] == "ok":
            assert told == "ok", f"{stage}: {told}"
        assert not told.startswith("failed") or RECORDED[name][stage].startswith("failed"), (
            f"{stage}: {told}"
        )


def test_the_page_fits_the_results():
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "judges" / "families.py", "--check"], check=True
    )


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("granitemoe", "router"),
        ("afmoe", "router"),
        ("gemma4_text", "router"),
        ("longcat_flash", "classifier"),
        ("qwen2_moe", "shared_expert_gate"),
        ("step3p5", "mlp.gate"),
        ("dbrx", "router"),
        ("hunyuan", "gate.wg"),
    ],
)
def test_routers_and_gates_get_no_adapter(name: str, router: str):
    model = make_skeleton(CONFIGS[name])
    trainable = attach_adapters(model, AdapterConfig(rank=2))
    assert any(router in path for path in trainable.skipped)
    assert not [
        path
        for path in find_adapters(model)
        if router in path and "proj" not in path.rpartition(".")[2]
    ]
    assert "skipped" in str(trainable)


@pytest.mark.parametrize("name", ["iquestloopcoder", "hunyuan"])
def test_packed_rows_are_right_or_refused(name: str):
    """Too lenient a check once accepted packed rows whose gradients were 9 to 18% off."""
    stages = ("load", "attach", "packing")
    assert walk(name, stages) == dict.fromkeys(stages, "ok")


@pytest.mark.parametrize(
    ("name", "router"), [("laguna", ".gate.proj"), ("bailing_moe", ".gate.gate_proj")]
)
def test_routers_inside_a_gate_get_no_adapter(name: str, router: str):
    model = make_skeleton(CONFIGS[name])
    assert any(path.endswith(router) for path, _ in model.named_modules())
    trainable = attach_adapters(model, AdapterConfig(rank=2))
    assert any(path.endswith(router) for path in trainable.skipped)
    assert not [path for path in find_adapters(model) if path.endswith(router)]


def test_a_router_that_is_named_is_refused():
    with pytest.raises(ConfigError, match="gate can't be adapted"):
        attach_adapters(
            make_skeleton(CONFIGS["mixtral"]), AdapterConfig(rank=2, target_modules=("gate",))
        )


def test_a_looped_model_is_planned_with_every_pass():
    config = AdapterConfig(rank=2)
    once = measure(make_skeleton(CONFIGS["nanbeige"] | {"num_loops": 1}), config, 4)
    twice = measure(make_skeleton(CONFIGS["nanbeige"]), config, 4)
    assert (len(once.blocks), len(twice.blocks), twice.learning) == (2, 4, 4)


def test_blocks_that_share_keys_are_planned_with_the_window_of_their_kind():
    sizes = measure(make_skeleton(CONFIGS["gemma4_text"]), AdapterConfig(rank=2), 4)
    assert [block.window for block in sizes.blocks] == [8, None, 8, None]


@pytest.mark.parametrize(
    "name", ["gpt2", "mamba", "dbrx", "internlm2", "openelm", "nanochat", "bailing_moe"]
)
def test_embedding_and_head_are_found_whatever_their_names(name: str):
    embedding, head = find_ends(make_skeleton(CONFIGS[name]))
    assert embedding.weight.shape == (128, 64) == head.weight.shape


def test_layers_without_a_gradient_are_skipped_and_the_model_is_left_as_it_was():
    model = make_skeleton(CONFIGS["deepseek_v32"])
    before = model(mx.array([[1, 2, 3]]))
    trainable = attach_adapters(model, AdapterConfig(rank=2))
    assert any("indexer" in path for path in trainable.skipped)
    assert mx.array_equal(model(mx.array([[1, 2, 3]])), before)


def test_a_layer_that_the_model_reads_itself_is_not_quantized():
    """Kimi K3 multiplies weights of ``res_proj`` itself, and names them in ``quant_predicate``."""
    found = walk("kimi_k3", ("load", "fuse 4 bits"))
    assert found == {"load": "ok", "fuse 4 bits": "ok"}


def test_weights_that_a_model_derives_follow_what_is_trained(tmp_path: Path):
    """Kimi K3 keeps the product of a norm and a projection from its first answer on."""
    write_folder("kimi_k3", tmp_path)
    config = AdapterConfig(rank=2, train_modules=("norms",))
    model, fresh = (load_folder(tmp_path)[0] for _ in range(2))
    for each in (model, fresh):
        attach_adapters(each, config)
    start_inference(model)
    before = model(TOKENS)

    trained = [
        (name, array + 0.3 * mx.random.normal(array.shape))
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    for each in (model, fresh):
        each.load_weights(trained, strict=False)
        start_inference(each)
    after = model(TOKENS)
    assert mx.abs(after - before).max() > 0.1
    assert mx.array_equal(after, fresh(TOKENS))

    save_adapter(model, tmp_path / "adapter")
    loaded, _, _ = load_folder(tmp_path)
    load_adapter(loaded, tmp_path / "adapter")
    loaded.eval()
    assert mx.allclose(loaded(TOKENS), after, atol=1e-5)


def test_routers_get_the_width_that_mlx_lm_gives_them(tmp_path: Path):
    write_folder("qwen3_moe", tmp_path)
    model, _, _ = load_folder(tmp_path)
    attach_adapters(model, AdapterConfig(rank=2))
    fuse_adapter(model, bits=4)
    settings = quantization_of(model) or {}
    assert settings["bits"] == 4
    assert settings["model.layers.1.mlp.gate"]["bits"] == 8


def test_a_model_that_mlx_lm_cannot_run_is_not_written(tmp_path: Path):
    """The model in memory keeps what it has computed from a weight; one that is loaded does not."""
    write_folder("kimi_k3", tmp_path)
    model, tokenizer, config = load_folder(tmp_path)
    model.eval()
    model(mx.array([[1, 2, 3]]))
    nn.quantize(model, 64, 4, class_predicate=lambda path, _: path.endswith("res_proj"))
    with pytest.raises(ModelError, match="mlx-lm can't run the fused model"):
        save_fused(model, tokenizer, config, tmp_path, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
