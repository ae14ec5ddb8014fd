"""Stock mlx-lm loads what we save, with the same logits, and we load what it saves."""

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.tuner.utils as stock
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from mlx_loraplus import AdapterError, OutputError, load_adapter, save_adapter
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from tests.conftest import CONFIGS, TinyModel, randomize_adapters

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("bits", [None, 4])
def test_stock_mlx_lm_loads_what_we_save(
    tiny: TinyModel,
    tmp_path: Path,
    kind: str,
    bits: int | None,
):
    model = tiny(kind, bits=bits)
    attach_adapters(model, AdapterConfig(rank=4, alpha=12, num_layers=1))
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    other = stock.load_adapters(tiny(kind, bits=bits), str(tmp_path))

    assert mx.abs(other(TOKENS) - model(TOKENS)).max() < 1e-5


def test_we_load_what_we_save_bit_exactly(tiny: TinyModel, tmp_path: Path):
    model = tiny("gemma3")
    attach_adapters(
        model, AdapterConfig(rank=4, dropout=0.1, target_modules=("all-linear", "embed_tokens"))
    )
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    other = load_adapter(tiny("gemma3"), tmp_path)

    assert mx.array_equal(other(TOKENS), model(TOKENS))
    assert {adapter.dropout.p for adapter in find_adapters(other).values()} == {0.1}

    ours, theirs = (dict(tree_flatten(m.trainable_parameters())) for m in (model, other))

    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.up_proj"]])
def test_we_load_what_stock_mlx_lm_saves(
    tiny: TinyModel,
    tmp_path: Path,
    keys: list[str] | None,
):
    model = tiny("llama")
    model.freeze()
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    stock.linear_to_lora_layers(model, 2, parameters)
    randomize_adapters(model)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)

    assert mx.abs(load_adapter(tiny("llama"), tmp_path)(TOKENS) - model(TOKENS)).max() < 1e-5


@pytest.fixture
def saved(tiny: TinyModel, tmp_path: Path) -> Path:
    model = tiny("llama")
    attach_adapters(model, AdapterConfig(rank=4))
    return save_adapter(model, tmp_path / "adapter")


def test_an_adapter_of_another_model_is_refused_with_both_shapes(tiny: TinyModel, saved: Path):
    weights = mx.load(str(saved / "adapters.safetensors"))
    weights["model.layers.0.self_attn.q_proj.lora_a"] = mx.zeros((48, 4))
    mx.eval(weights)  # the file is written over
    mx.save_safetensors(str(saved / "adapters.safetensors"), weights)
    model = tiny("llama")

    with pytest.raises(
        AdapterError, match=r"q_proj\.lora_a has shape \(48, 4\), the model needs \(64, 4\)"
    ):
        load_adapter(model, saved)
    assert not find_adapters(model)


def test_an_adapter_with_other_layers_is_refused(tiny: TinyModel, saved: Path):
    with pytest.raises(
        AdapterError, match=r"belongs to another model: .*is not a layer of this model"
    ):
        load_adapter(tiny("mixtral"), saved)

    (saved / "run.yaml").write_text("model: smollm2-135m\n")

    with pytest.raises(
        AdapterError,
        match=r"another model, 'smollm2-135m' \(commands load that if you leave out model\): ",
    ):
        load_adapter(tiny("mixtral"), saved)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.5, 0.99])
def test_a_truncated_file_raises(
    tiny: TinyModel,
    saved: Path,
    keep: float,
):
    file = saved / "adapters.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep if keep > 1 or keep == 0 else keep * len(whole))])
    with pytest.raises(
        AdapterError, match=r"broken or cut off: .*; copy the file again|holds no lora"
    ):
        load_adapter(tiny("llama"), saved)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not an adapter's config: its content must be an object"),
        (
            '{"fine_tune_type": "full", "lora_parameters": {"scale": 1}}',
            "holds weights that mlx-lm trained",
        ),
        ('{"lora_parameters": {"rank": 4}}', "lora_parameters.scale is missing"),
        (
            '{"lora_parameters": {"scale": NaN}}',
            "lora_parameters.scale must be a finite number",
        ),
        (
            '{"lora_parameters": {"scale": -1e10}}',
            "lora_parameters.scale must be greater than or equal to -1000000000",
        ),
        (
            '{"lora_parameters": {"scale": 1, "dropout": 1}}',
            "lora_parameters.dropout must be less than 1",
        ),
        (
            '{"lora_parameters": {"scale": 1}, "start_rank": 0}',
            "start_rank must be greater than or equal to 1",
        ),
        (
            '{"lora_parameters": {"scale": 1}, "start_rank": 3}',
            r"is damaged: .*lora_a has rank 4, but start_rank 3 in adapter_config\.json needs 6",
        ),
        (
            '{"lora_parameters": {"scale": 1, "rank": 8}}',
            r"holds matrices of rank 4, but its adapter_config\.json has rank 8: correct the rank",
        ),
        (
            '{"lora_parameters": {"scale": 1}, "base_quantization": {"bits": 7}}',
            "base_quantization.bits must be 2",
        ),
        (
            '{"lora_parameters": {"scale": 1}, "train_modules": 3}',
            "train_modules must be a valid list",
        ),
        (
            '{"lora_parameters": {"scale": 1}, "train_modules": ["norm"]}',
            "there is no modules.safetensors",
        ),
        (
            '{"lora_parameters": {"scale": 1}, "fine_tune_type": "dora"}',
            r"is incomplete: .*\.m is missing from the file",
        ),
        (
            '{"lora_parameters": {"scale": 1}, "fine_tune_type": "vera"}',
            "projection_a and projection_b are missing",
        ),
    ],
)
def test_a_bad_config_raises(
    tiny: TinyModel,
    saved: Path,
    config: str,
    message: str,
):
    (saved / "adapter_config.json").write_text(config)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tiny("llama"), saved)


@pytest.mark.parametrize("value", [mx.nan, mx.inf])
def test_an_adapter_with_numbers_that_are_not_finite_is_refused(
    tiny: TinyModel, saved: Path, value: float
):
    weights = mx.load(str(saved / "adapters.safetensors"))
    name = min(weights)
    weights[name] = weights[name] + mx.where(mx.arange(weights[name].shape[-1]) == 1, value, 0.0)
    mx.eval(weights)
    mx.save_safetensors(str(saved / "adapters.safetensors"), weights)
    model = tiny("llama")
    with pytest.raises(AdapterError, match=r"is damaged: .* holds values that are not finite"):
        load_adapter(model, saved)
    assert not find_adapters(model)


def test_an_adapter_with_half_a_layer_is_incomplete(tiny: TinyModel, saved: Path):
    weights = mx.load(str(saved / "adapters.safetensors"))
    mx.eval(weights)
    name = next(name for name in weights if name.endswith("lora_b"))
    del weights[name]
    mx.save_safetensors(str(saved / "adapters.safetensors"), weights)
    with pytest.raises(AdapterError, match=r"is incomplete: .*lora_b is missing from the file"):
        load_adapter(tiny("llama"), saved)


def test_an_adapter_that_lost_a_layer_is_incomplete(tiny: TinyModel, saved: Path):
    weights = load_file(saved / "adapters.safetensors")
    path = next(iter(weights)).rpartition(".")[0]
    kept = {name: array for name, array in weights.items() if not name.startswith(path)}
    save_file(kept, saved / "adapters.safetensors")
    told = rf"is incomplete: {re.escape(path)}, which lora_parameters.keys names, is missing"
    with pytest.raises(AdapterError, match=told):
        load_adapter(tiny("llama"), saved)


@pytest.mark.parametrize("leaf", ["lora_a", "lora_b"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda array: array.astype(np.int32), "holds values of type int32, which are no weights"),
        (lambda array: array > 0, "holds values of type bool, which are no weights"),
        (lambda array: array.astype(np.float64), "is stored in the type F64, which MLX can't read"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(
    tiny: TinyModel, saved: Path, leaf: str, change: Callable[[Any], Any], told: str
):
    weights = load_file(saved / "adapters.safetensors")
    name = next(name for name in weights if name.endswith(leaf))
    save_file(weights | {name: change(weights[name])}, saved / "adapters.safetensors")
    with pytest.raises(AdapterError, match=rf"{re.escape(name)} {told}") as caught:
        load_adapter(tiny("llama"), saved)
    assert "broken" not in str(caught.value)


def test_a_rank_of_zero_is_refused(tiny: TinyModel, saved: Path):
    weights = load_file(saved / "adapters.safetensors")
    path = next(iter(weights)).rpartition(".")[0]
    empty = {f"{path}.lora_a": weights[f"{path}.lora_a"][:, :0]}
    empty[f"{path}.lora_b"] = weights[f"{path}.lora_b"][:0]
    save_file(weights | empty, saved / "adapters.safetensors")
    with pytest.raises(
        AdapterError, match=rf"is damaged: {re.escape(path)}\.lora_a has shape .* no rank"
    ):
        load_adapter(tiny("llama"), saved)


@pytest.mark.parametrize("leaf", ["lora_a", "lora_b"])
def test_a_file_that_has_lost_a_matrix_is_incomplete(tiny: TinyModel, saved: Path, leaf: str):
    weights = load_file(saved / "adapters.safetensors")
    path = next(iter(weights)).rpartition(".")[0]
    del weights[f"{path}.{leaf}"]
    save_file(weights, saved / "adapters.safetensors")
    told = rf"is incomplete: {re.escape(path)}\.{leaf} is missing from the file"
    with pytest.raises(AdapterError, match=told):
        load_adapter(tiny("llama"), saved)
    save_file(weights | {"foo.bar": weights[min(weights)]}, saved / "adapters.safetensors")
    with pytest.raises(AdapterError, match=r"holds no lora adapter: foo\.bar is not known"):
        load_adapter(tiny("llama"), saved)


@pytest.mark.parametrize(("num_layers", "is_lost"), [(-1, True), (2, False), (3, True)])
def test_a_layer_that_the_keys_of_mlx_lm_name_is_missing(
    tiny: TinyModel, saved: Path, num_layers: int, is_lost: bool
):
    """mlx-lm writes names inside a block, and how many of the last blocks are adapted."""
    config = json.loads((saved / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"] = ["self_attn.q_proj", "self_attn.nothing"]
    (saved / "adapter_config.json").write_text(json.dumps(config | {"num_layers": num_layers}))
    load_adapter(tiny("llama"), saved)

    lost = "model.layers.0.self_attn.q_proj."
    tensors = load_file(saved / "adapters.safetensors")
    left = {name: array for name, array in tensors.items() if not name.startswith(lost)}
    save_file(left, saved / "adapters.safetensors")
    config = json.loads((saved / "adapter_config.json").read_text())
    del config["base"]  # of all layers
    (saved / "adapter_config.json").write_text(json.dumps(config))
    if not is_lost:
        load_adapter(tiny("llama"), saved)
        return
    with pytest.raises(
        AdapterError, match=r"is incomplete: model\.layers\.0\.self_attn\.q_proj, which"
    ):
        load_adapter(tiny("llama"), saved)


def test_a_folder_without_an_adapter_raises(tiny: TinyModel, tmp_path: Path):
    with pytest.raises(AdapterError, match="holds no adapter"):
        load_adapter(tiny("llama"), tmp_path)
    with pytest.raises(AdapterError, match="no adapters to save"):
        save_adapter(tiny("llama"), tmp_path)

    # A run has its settings before its first checkpoint.
    (tmp_path / "run.yaml").write_text("model: tiny\n")
    told = r"has saved no adapter yet: .* mlx_loraplus\.train -c \S+run\.yaml --resume"
    with pytest.raises(AdapterError, match=told):
        load_adapter(tiny("llama"), tmp_path)


def test_a_full_disk_keeps_the_older_adapter(tiny: TinyModel, saved: Path):
    model = tiny("llama")
    attach_adapters(model, AdapterConfig(rank=4))
    before = (saved / "adapters.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, hard)
    )  # as a full disk: writing fails halfway
    new = saved.with_name("new")
    try:
        with pytest.raises(OutputError, match="can't write"):
            save_adapter(model, saved, overwrite=True)
        with pytest.raises(OutputError, match="can't write"):
            save_adapter(model, new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert not new.exists()
    assert (saved / "adapters.safetensors").read_bytes() == before
    assert {path.name for path in saved.iterdir()} == {
        "adapters.safetensors",
        "adapter_config.json",
    }


def test_a_folder_that_cannot_be_written_raises(tiny: TinyModel, tmp_path: Path):
    model = tiny("llama")
    attach_adapters(model, AdapterConfig(rank=4))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't write"):
        save_adapter(model, tmp_path / "file" / "adapter")
