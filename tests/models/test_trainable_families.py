"""A family that can't be trained is reported from its config alone, with the nearest that can."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

import mlx_loraplus as ml
from mlx_loraplus.models import trainable_families as trainable
from mlx_loraplus.models.known_models import KNOWN
from mlx_loraplus.models.trainable_families import check_trainable
from mlx_loraplus.train import main as train_main

RESULTS = Path(__file__).parents[2] / "scripts" / "judges" / "results" / "families.json"


def folder_of(model_type: str, folder: Path) -> str:
    """Return a folder that holds only a config, as of a model whose weights are not there yet."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


def test_known_families_that_cannot_be_trained_name_the_nearest(tmp_path: Path):
    name = folder_of("gemma3n", tmp_path)
    with pytest.raises(ml.ModelError, match=r"can't train .*, a gemma3n: .*gemma-4-e2b-it"):
        check_trainable(name)
    with pytest.raises(ml.ModelError, match=r"that can be trained is .*gemma-4-e2b-it"):
        ml.plan_memory(name, "16GB")


def test_unknown_families_name_their_relatives(tmp_path: Path):
    with pytest.raises(ml.ModelError, match=r"of type 'qwen9', .*: qwen3-0.6b, qwen3-1.7b, "):
        check_trainable(folder_of("qwen9", tmp_path))
    with pytest.raises(ml.ModelError, match="such as gemma-3 or gemma-4"):
        check_trainable(folder_of("whisper", tmp_path))


def test_a_package_that_mlx_lm_needs_is_named_before_any_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    said = r"type olmo: To run olmo .*pip install ai2-olmo; or use another .*: olmo-3-7b"
    with pytest.raises(ml.ModelError, match=said):
        check_trainable(folder_of("olmo", tmp_path))
    assert capsys.readouterr().out == ""


def test_what_only_a_mac_cannot_train_is_refused_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name = folder_of("rwkv7", tmp_path)
    check_trainable(name)
    monkeypatch.setattr(trainable, "backend", lambda: "cuda")
    check_trainable(name)
    monkeypatch.setattr(trainable, "backend", lambda: "metal")
    with pytest.raises(ml.ModelError, match=r"a rwkv7: its Metal kernel .*--model qwen3.5-0.8b"):
        check_trainable(name)
    assert all(found.instead in KNOWN for found in trainable._UNTRAINABLE_ON_METAL.values())


def test_train_says_so_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_main(["--model", folder_of("whisper", tmp_path), "--data", "nowhere"])
    assert stop.value.code == 2
    assert "no models of type 'whisper'" in capsys.readouterr().err


def test_models_that_can_be_trained_pass(tmp_path: Path):
    for name in ("gemma-3", "qwen3.5-4b", "gpt-oss-20b", folder_of("llama", tmp_path)):
        check_trainable(name)
    check_trainable(str(tmp_path / "nothing"))  # reported when the model is loaded


def test_the_table_is_what_the_judge_of_families_found():
    judged = json.loads(RESULTS.read_text())
    families = judged.get("families", judged)
    for model_type, found in trainable._UNTRAINABLE.items():
        assert found.instead in KNOWN
        assert any("refused" in said for said in families[model_type].values()), model_type
    assert version("mlx-lm") == trainable._CHECKED_VERSION
