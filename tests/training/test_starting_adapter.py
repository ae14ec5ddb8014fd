"""Settings given with existing adapters: each acts, equals theirs, or raises."""

import json
import shutil
from dataclasses import replace
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_loraplus import train
from mlx_loraplus.adapters.trainable import find_adapters
from mlx_loraplus.config import AdapterConfig
from mlx_loraplus.settings import setting_names
from tests.conftest import same
from tests.training.tiny_runs import Place, adapter_of, poison

OTHER: dict[str, Any] = {
    "adapter": "dora", "init": "init2", "rank": 8, "alpha": 3.0, "rslora": True, "target_modules": ["q_proj"],
    "train_modules": ["model.norm"], "num_layers": 1, "quantize": 4, "quantize_group_size": 32, "loftq_iters": 2,
    "svd": "exact",
}  # fmt: skip
THEIRS = {"rank": 4, "alpha": 8.0, "target_modules": ["v_proj", "o_proj"], "dropout": 0.2}


def begin(place: Place, where: str) -> tuple[Any, dict[str, Any]]:
    """Return a model with adapters, or a model and the setting that names them."""
    folder = str(place.run("first", iters=2, **THEIRS).folder)
    model = str(place.folder / "model")
    if where == "file":
        return ml.load(model), {"resume_adapter_file": folder}
    return ml.load(model, folder), {}


def finetune(place: Place, start: tuple[Any, dict[str, Any]], **settings: Any) -> ml.Run:
    plain = {
        "iters": 2,
        "batch_size": 4,
        "data": str(place.folder / "data"),
        "sample_rows": 0,
        "warmup": 1,
    }
    folder = place.folder / f"run{len(list(place.folder.iterdir()))}"
    return ml.finetune(*start[0], adapter_path=str(folder), **plain | start[1] | settings)


@pytest.mark.parametrize("where", ["file", "model"])
def test_every_adapter_setting_beside_adapters_acts_or_raises(place: Place, where: str):
    start = begin(place, where)
    assert OTHER.keys() | {"dropout"} == set(setting_names(AdapterConfig))
    for name, value in OTHER.items():
        with pytest.raises(ml.ConfigError, match=name):
            finetune(place, start, **{name: value})
    run = finetune(place, start, dropout=0.5)
    assert {adapter.dropout.p for adapter in find_adapters(start[0][0]).values()} == {0.5}
    assert run.config.adapter.dropout == 0.5


@pytest.mark.parametrize("where", ["file", "model"])
def test_settings_default_to_the_adapters_own_and_may_equal_them(place: Place, where: str):
    start = begin(place, where)
    adapter = finetune(place, start).config.adapter
    assert (adapter.rank, adapter.scale, adapter.dropout) == (4, 2.0, 0.2)
    assert {name.rsplit(".", 1)[-1] for name in adapter.target_modules} == {"v_proj", "o_proj"}
    again = finetune(place, begin_again(place, where), **THEIRS)
    assert (again.config.adapter.rank, again.config.adapter.target_modules) == (
        4,
        ("v_proj", "o_proj"),
    )


@pytest.mark.parametrize(
    ("theirs", "given"),
    [
        ({"num_layers": 1, "target_modules": ["q_proj"]}, {"num_layers": 1}),
        ({"num_layers": 1, "target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]}),
        ({"rslora": True, "alpha": 8.0}, {"alpha": 8.0}),
        ({"rslora": True, "alpha": 8.0}, {"rslora": True}),
    ],
)
def test_one_of_several_settings_may_equal_the_adapters_own(
    place: Place, theirs: dict[str, Any], given: dict[str, Any]
):
    first = place.run("first", iters=2, **theirs).config.adapter
    run = finetune(place, begin_again(place, "file"), **given)
    assert run.config.adapter == replace(first, dropout=run.config.adapter.dropout)


def begin_again(place: Place, where: str) -> tuple[Any, dict[str, Any]]:
    model, first = str(place.folder / "model"), str(place.folder / "first")
    return (
        (ml.load(model), {"resume_adapter_file": first})
        if where == "file"
        else (ml.load(model, first), {})
    )


@pytest.mark.parametrize(
    ("kind", "rate"), [({"adapter": "vera", "rank": 16}, None), ({"init": "pissa"}, 2e-5)]
)
def test_default_rates_follow_from_the_existing_adapters(
    place: Place, kind: dict[str, Any], rate: float | None
):
    fresh = place.run("other", iters=1, **kind, dropout=0, learning_rate=None)
    start = ml.load(str(place.folder / "model")), {"resume_adapter_file": str(fresh.folder)}
    run = finetune(place, start)
    assert run.config.optimizer.learning_rate == fresh.config.optimizer.learning_rate
    assert rate is None or run.config.optimizer.learning_rate == rate
    assert run.config.adapter == fresh.config.adapter


def test_a_second_run_on_one_model_does_not_continue_the_first(place: Place):
    model, tokenizer = ml.load(str(place.folder / "model"))
    start: Any = ((model, tokenizer), {})
    first = finetune(place, start)
    with pytest.raises(
        ml.ConfigError, match=r"still has the adapters of an earlier run .* load the model again"
    ):
        finetune(place, start, lr_ratio=1)
    with pytest.raises(ml.ConfigError, match="still has the adapters of an earlier run"):
        finetune(place, start, adapter="dora")
    on = ml.load(str(place.folder / "model"), str(first.folder)), {}
    assert finetune(place, on).losses("valid_loss")[0][1] == first.losses("valid_loss")[-1][1]


def test_a_model_of_another_name_is_refused(place: Place):
    start: Any = (ml.load(str(place.folder / "model")), {})
    with pytest.raises(ml.ConfigError, match="model 'gemma-3' is not the model given"):
        finetune(place, start, model="gemma-3")
    start[0][0].loaded_as = None
    assert finetune(place, start).config.model == "a llama model loaded elsewhere"


def test_a_run_on_a_model_that_was_fused_in_memory_does_not_name_the_loaded_model(place: Place):
    (model, tokenizer), _ = begin(place, "model")
    ml.fuse_adapter(model)
    run = finetune(place, ((model, tokenizer), {}))
    assert run.config.model == "a llama model loaded elsewhere"
    with pytest.raises(ml.AdapterError, match="does not say which model it belongs to"):
        ml.load(str(run.folder))


def test_a_model_whose_weights_were_made_to_train_is_refused(place: Place):
    start: Any = (ml.load(str(place.folder / "model")), {})
    ml.attach_adapters(start[0][0], AdapterConfig(adapter="full"))
    with pytest.raises(ml.ConfigError, match="load the model again, and give adapter="):
        finetune(place, start)


def test_the_command_knows_which_settings_were_given(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    folder = str(place.run("first", iters=2, **THEIRS).folder)
    words = [
        "--model",
        str(place.folder / "model"),
        "--data",
        str(place.folder / "data"),
        "--iters",
        "1",
    ]
    words += [
        "--resume-adapter-file",
        folder,
        "--adapter-path",
        str(place.folder / "next"),
        "--verbosity",
        "silent",
    ]
    with pytest.raises(SystemExit) as stop:  # the default, but asked for
        train.main([*words, "--rank", "8"])
    assert stop.value.code == 2
    assert "rank 8 (theirs: 4)" in capsys.readouterr().err
    train.main(words)
    assert ml.Run.load(place.folder / "next").config.adapter.rank == 4
    shutil.move(folder, place.folder / "gone")
    train.main(
        [
            "-c",
            str(place.folder / "next" / "run.yaml"),
            "--resume",
            "--iters",
            "2",
            "--verbosity",
            "silent",
        ]
    )
    assert ml.Run.load(place.folder / "next").progress.step == 2


def test_a_run_in_which_no_step_took_effect_fails(place: Place, capsys: pytest.CaptureFixture[str]):
    poison(place, *range(40))
    with pytest.raises(ml.LoRAPlusError, match="no step took effect: all 3 were skipped"):
        place.run(iters=3)
    run = ml.Run.load(place.folder / "run")
    assert (run.outcome, run.finished) == ("failed", False)
    with pytest.raises(ml.LoRAPlusError, match="no step took effect"):
        place.run(iters=3, resume=True)
    words = ["-c", str(place.folder / "run" / "run.yaml"), "--overwrite"]
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    assert stop.value.code == 2
    assert (
        json.loads((place.folder / "run" / "history.jsonl").read_text().splitlines()[-1])["outcome"]
        == "failed"
    )


def test_the_home_folder_is_expanded(place: Place, monkeypatch: pytest.MonkeyPatch):
    run = place.run("first", iters=2)
    monkeypatch.setenv("HOME", str(place.folder))
    model, _ = ml.load(str(place.folder / "model"))
    ml.load_adapter(model, "~/first")
    assert find_adapters(model)
    assert ml.Run.load("~/first").history == run.history
    assert ml.Run.load("~/first").folder == run.folder

    for name in ("", "~nobody-has-this-name/run", " first"):
        with pytest.raises(ml.AdapterError, match=r"^(load_adapter: )?adapter_path .*must "):
            ml.load_adapter(model, name)
        with pytest.raises(ml.OutputError, match=r"^folder .*must "):
            ml.Run.load(name)


def test_a_run_of_muon_with_magnitudes_resumes_bit_exactly(place: Place):
    settings = {"optimizer": "muon", "adapter": "dora", "train_modules": ["norms"], "iters": 4}
    one = place.run("one", **settings)
    place.run("two", stop_at=2, **settings)
    assert same(adapter_of(place.run("two", resume=True, **settings)), adapter_of(one))


def test_a_rate_of_embeddings_needs_embeddings(place: Place):
    settings: dict[str, Any] = {"iters": 1, "embedding_learning_rate": 1e-3}
    with pytest.raises(ml.ConfigError, match=r"embedding_learning_rate=0\.001 has no effect"):
        place.run("none", **settings)
    place.run("norms", **settings, train_modules=["norms"])
    place.run("head", **settings, target_modules=["embed_tokens", "q_proj"])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_that_mlx_lm_put_on_the_model_are_refused(place: Place, kind: str):
    """New adapters would be put inside of them, and theirs would be lost when ours are saved."""
    name = str(place.folder / "model")
    model, tokenizer = ml.load(name)
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    told = r"the model has adapters of mlx_lm \(model\..* is a \w+Linear\)"
    with pytest.raises(ml.AdapterError, match=told):
        finetune(place, ((model, tokenizer), {}))
    with pytest.raises(ml.AdapterError, match=told):
        ml.attach_adapters(model, AdapterConfig(rank=2))

    # What the message advises works.
    place.run("first", iters=2)
    with pytest.raises(ml.AdapterError, match=told):
        ml.load_adapter(model, place.folder / "first")
    finetune(place, (ml.load(name, adapter_path=place.folder / "first"), {}))
