"""A multimodal checkpoint: its text weights are fused, and put back beside the untouched rest."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_loraplus import fuse as fuse_command
from mlx_loraplus import fuse_adapter, save_adapter
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.models.loading import load_folder
from scripts.tiny_model import write_tiny_model
from tests.conftest import CONFIGS, randomize_adapters

TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])
VISION = {  # as google/gemma-3-4b-it names them
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (8, 3, 4, 4),
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias": (16,),
    "multi_modal_projector.mm_input_projection_weight": (8, 64),
}


@pytest.fixture
def checkpoint(tmp_path: Path, tiny) -> Path:
    """A Gemma 3 with a vision tower, in two files."""
    folder = write_tiny_model(tmp_path / "multimodal")  # for its tokenizer
    text = {**CONFIGS["gemma3"], "num_attention_heads": 4, "num_key_value_heads": 1}
    config = {
        "model_type": "gemma3",
        "vocab_size": 128,
        "text_config": text,
        "vision_config": {"hidden_size": 8},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text('{"image_size": 16}')
    weights: dict[str, mx.array] = dict(tree_flatten(tiny("gemma3").parameters()))
    shards = [
        {f"language_model.{name}": array for name, array in weights.items()},
        {name: mx.random.normal(shape).astype(mx.bfloat16) for name, shape in VISION.items()},
    ]
    (folder / "model.safetensors").unlink()
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), shard)
        places |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def tensors(folder: Path) -> dict[str, mx.array]:
    found: dict[str, Any] = {}
    for file in folder.glob("model*.safetensors"):
        found |= mx.load(str(file))  # pyright: ignore
    return found


def write_adapter(checkpoint: Path, folder: Path) -> mx.array:
    """Write an adapter for the checkpoint, and return what the fused model answers."""
    model, _, _ = load_folder(checkpoint)
    attach_adapters(model, AdapterConfig(rank=4))
    randomize_adapters(model)
    save_adapter(model, folder)
    fuse_adapter(model)
    return model(TOKENS)


def test_the_vision_tower_stays_as_it_was(checkpoint: Path, tmp_path: Path):
    wanted = write_adapter(checkpoint, tmp_path / "run")
    out = tmp_path / "fused"
    words = [
        "--model",
        str(checkpoint),
        "--adapter-path",
        str(tmp_path / "run"),
        "--save-path",
        str(out),
    ]
    fuse_command.main([*words, "--keep-vision"])
    before, after = tensors(checkpoint), tensors(out)
    assert after.keys() == before.keys()
    for name in VISION:
        assert after[name].dtype == before[name].dtype
        assert mx.array_equal(after[name], before[name])
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("language_model.model.layers.") for name in changed)
    assert (
        json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].keys()
        == before.keys()
    )
    config = json.loads((out / "config.json").read_text())
    assert config["vision_config"] == {"hidden_size": 8}
    assert (out / "preprocessor_config.json").read_text() == '{"image_size": 16}'
    loaded, _ = load_model(out)
    assert mx.allclose(loaded(TOKENS), wanted, atol=1e-5)


def test_leaving_it_out_is_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_adapter(checkpoint, tmp_path / "run")
    out = tmp_path / "fused"
    fuse_command.main(
        [
            "--model",
            str(checkpoint),
            "--adapter-path",
            str(tmp_path / "run"),
            "--save-path",
            str(out),
        ]
    )
    assert "4 tensors of" in capsys.readouterr().out
    assert not set(tensors(out)) & set(VISION)
    assert "vision_config" not in json.loads((out / "config.json").read_text())


def test_there_must_be_something_to_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = write_tiny_model(tmp_path / "text")
    loaded, _, _ = load_folder(model)
    attach_adapters(loaded, AdapterConfig(rank=4))
    save_adapter(loaded, tmp_path / "run")
    words = [
        "--model",
        str(model),
        "--adapter-path",
        str(tmp_path / "run"),
        "--save-path",
        str(tmp_path / "fused"),
    ]
    with pytest.raises(SystemExit):
        fuse_command.main([*words, "--keep-vision"])
    assert "no vision tower" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
