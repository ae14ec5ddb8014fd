"""Weights that mlx-lm would load in another way than the folder means."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_loraplus.errors import ModelError
from mlx_loraplus.models.loading import load_base, load_folder, stored_dtypes
from mlx_loraplus.models.weight_files import find_packed
from scripts.tiny_model import write_tiny_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read(file: Path) -> dict[str, Any]:
    weights: Any = mx.load(str(file))
    mx.eval(weights)
    return weights


def answer(folder: Path) -> np.ndarray:
    return np.array(load_base(folder)[0](mx.arange(9)[None]))


def split(folder: Path) -> tuple[Path, Path]:
    """Divide model.safetensors in two shards, with an index."""
    weights = read(folder / "model.safetensors")
    names = sorted(weights)
    files = folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
    places = {}
    for file, part in zip(files, (names[:5], names[5:]), strict=True):
        mx.save_safetensors(str(file), {name: weights[name] for name in part})
        places |= dict.fromkeys(part, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()
    return files


def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path: Path):
    folder = write_tiny_model(tmp_path / "model")
    untied = answer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=r"contain a different lm_head\.weight") as raised:
        load_base(folder)
    assert "\n" not in str(raised.value)

    # The advice is right: either setting the field or removing the tensor loads
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    np.testing.assert_array_equal(answer(folder), untied)
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = read(folder / "model.safetensors")
    del weights[HEAD]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    tied = answer(folder)

    # A head that equals the embeddings is no contradiction
    mx.save_safetensors(
        str(folder / "model.safetensors"), weights | {HEAD: mx.array(weights[EMBEDDING])}
    )
    np.testing.assert_array_equal(answer(folder), tied)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    folder = write_tiny_model(tmp_path / "model")
    whole = answer(folder)
    first, second = split(folder)
    np.testing.assert_array_equal(answer(folder), whole)
    weights = read(second)
    mx.save_safetensors(str(second), weights | {HEAD: mx.zeros((128, 32))})
    with pytest.raises(ModelError, match=f"{HEAD} in {first.name} and in {second.name}"):
        load_base(folder)


def test_a_shard_that_the_index_does_not_name_is_refused(tmp_path: Path):
    folder = write_tiny_model(tmp_path / "model")
    shutil.copy(folder / "model.safetensors", tmp_path / "model-old.safetensors")
    split(folder)
    (tmp_path / "model-old.safetensors").rename(folder / "model-old.safetensors")
    with pytest.raises(ModelError, match=r"holds model-old\.safetensors, which .*index\.json does"):
        load_base(folder)


@pytest.mark.parametrize("name", ["model[1]", "what?", "all*", "[!a]"])
def test_a_folder_may_have_wildcards_in_its_path(tmp_path: Path, name: str):
    plain = write_tiny_model(tmp_path / "plain")
    folder = write_tiny_model(tmp_path / name / "model", seed=1)
    for decoy in ("model1", "whatx", "all else", "b"):  # what a glob would find
        shutil.copytree(plain, tmp_path / decoy / "model")
    expected = write_tiny_model(tmp_path / "same", seed=1)
    np.testing.assert_array_equal(answer(folder), answer(expected))
    assert load_folder(folder)[1].encode("a") == load_folder(expected)[1].encode("a")
    assert stored_dtypes(folder) == stored_dtypes(expected)


def test_only_a_scale_of_a_weight_says_that_weights_are_quantized():
    """Gemma 4's routers have a scale of their own."""
    router = ["router.proj.weight", "router.scale", "router.per_expert_scale"]
    assert find_packed(router) is None
    assert find_packed([*router, "q_proj.weight", "q_proj.scale"]) == "q_proj.scale"
