"""A run resumes with the settings, the model and the data it was trained with, and with no others."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_loraplus as ml
from mlx_loraplus.adapters.attach import attach_adapters
from mlx_loraplus.adapters.storage import load_adapter, save_adapter
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.settings import setting_names
from mlx_loraplus.training.run_fingerprint import (
    RESUME_MAY_CHANGE,
    model_fingerprint,
)
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import TinyModel, randomize_adapters
from tests.training.tiny_runs import (
    Place,
)

CHANGES = [
    (
        {"lr_ratio": 16, "rank": 4},
        r"other settings: rank 8 -> 4; lr_ratio 4.0 -> 16.0; for a new run, leave out",
    ),
    ({"max_seq_length": 16}, "max_seq_length 2048 -> 16"),
    ({"seed": 1}, "seed 0 -> 1"),
]


@pytest.mark.parametrize(("settings", "told"), CHANGES)
def test_changed_settings_are_refused_with_the_difference(place: Place, settings: dict, told: str):
    place.run(stop_at=2)
    before = {
        path: path.read_bytes() for path in (place.folder / "run").rglob("*") if path.is_file()
    }
    with pytest.raises(ml.ConfigError, match=told):
        place.run(resume=True, **settings)
    assert before == {
        path: path.read_bytes() for path in (place.folder / "run").rglob("*") if path.is_file()
    }


def test_another_model_or_other_data_is_refused_in_any_folder(place: Place):
    place.run(stop_at=2)
    write_tiny_model(place.folder / "model", seed=1)
    with pytest.raises(
        ml.ConfigError, match=r"the weights of model=\".*model\" are not those it was trained on"
    ):
        place.run(resume=True)
    write_tiny_model(place.folder / "model", hidden=48)
    with pytest.raises(ml.ConfigError, match="the weights of model="):
        place.run(resume=True)
    write_tiny_model(place.folder / "other", seed=1)
    with pytest.raises(ml.ConfigError, match=r"take both from the run \(see .*run/run\.yaml\), or"):
        place.run(resume=True, model=str(place.folder / "other"))
    config = json.loads((write_tiny_model(place.folder / "elsewhere") / "config.json").read_text())
    (place.folder / "elsewhere" / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))
    with pytest.raises(ml.ConfigError, match=r"the config of model=.* \(rope_theta 10000.* -> 5\)"):
        place.run(resume=True, model=str(place.folder / "elsewhere"))
    write_tiny_model(place.folder / "elsewhere")
    shutil.copytree(place.folder / "data", place.folder / "copy")
    place.run(
        resume=True,
        model=str(place.folder / "elsewhere"),
        data=str(place.folder / "copy"),
        stop_at=3,
        iters=9,
    )
    assert place.told_with("resume: data").endswith("copy']")
    write_tiny_model(place.folder / "model")
    write_sums(place.folder / "data", seed=1)
    with pytest.raises(ml.ConfigError, match="the rows of data, or their tokens, are not those"):
        place.run(resume=True)


def test_a_setting_may_not_change_unless_it_is_listed():
    assert set(setting_names(TrainConfig)) >= RESUME_MAY_CHANGE
    strict = set(setting_names(TrainConfig)) - RESUME_MAY_CHANGE
    assert {
        "rank",
        "lr_ratio",
        "seed",
        "batch_size",
        "grad_accumulation_steps",
        "optimizer",
        "dropout",
    } <= strict


def test_a_fingerprint_changes_with_one_bit_of_the_base_only(tiny: TinyModel, tmp_path: Path):
    model = tiny("gemma3", bits=4)
    plain = model_fingerprint(model)
    attach_adapters(model, TrainConfig().adapter)
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    assert model_fingerprint(model) == plain
    assert model_fingerprint(load_adapter(tiny("gemma3", bits=4), tmp_path)) == plain
    norm = model.layers[1].input_layernorm
    norm.weight = (norm.weight.view(mx.uint32) ^ mx.array([1] + [0] * 63, mx.uint32)).view(
        mx.float32
    )
    assert model_fingerprint(model) != plain
