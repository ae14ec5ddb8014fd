"""Every setting of an adapter, given beside adapters that exist: accepted if equal, else refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_loraplus import train
from mlx_loraplus.config import KINDS, AdapterConfig, TrainConfig
from mlx_loraplus.models.loading import load_base
from mlx_loraplus.settings import checked, configure, setting_names, settings_of
from mlx_loraplus.spelling import flag_of
from mlx_loraplus.training.starting_adapter import resolve_config
from tests.conftest import same
from tests.families.walk import write_folder
from tests.training.tiny_runs import Place, adapter_of

STARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chosen": {"rank": 4, "alpha": 6.0, "dropout": 0.2, "target_modules": ["q_proj", "o_proj"], "num_layers": 1,
               "train_modules": ["norms"]},
    "rslora": {"rank": 4, "alpha": 6.0, "rslora": True},
    "init2": {"init": "init2"},
    "pissa": {"init": "pissa", "svd": "exact"},
    "quantized pissa": {"init": "pissa", "quantize": "8", "quantize_group_size": 32},
    "loftq": {"init": "loftq", "loftq_iters": 2, "svd": "exact", "quantize_group_size": 32},
    "loftq in mxfp8": {"init": "loftq", "quantize": "mxfp8"},
    "dora": {"adapter": "dora", "init": "init2"},
    "vera": {"adapter": "vera", "rank": 16},
}  # fmt: skip

OTHERS: dict[str, list[Any]] = {
    "adapter": ["dora", "lora"], "init": ["init2", "loftq"], "rank": [3], "alpha": [3.0], "rslora": [True, False],
    "target_modules": [["k_proj"]], "train_modules": [["model.norm"]], "num_layers": [1, 2], "quantize": ["3"],
    "quantize_group_size": [32, 128], "loftq_iters": [7], "svd": ["exact", "randomized"],
}  # fmt: skip
"""For each setting, values to give; the first one that differs from the adapters' own is used."""

WAYS = ("attached", "loaded", "file")


def start_with(place: Place, config: AdapterConfig, way: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model and settings that start from saved adapters in one of three ways."""
    name, folder = str(place.folder / "model"), place.folder / "saved"
    model, _ = ml.load(name)
    ml.attach_adapters(model, config)
    if way == "attached":
        return model, {}
    ml.save_adapter(model, folder, overwrite=True)
    if way == "loaded":
        return ml.load(name, str(folder))[0], {}
    return ml.load(name)[0], {"resume_adapter_file": str(folder)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", STARTS)
def test_equal_settings_are_accepted_and_others_refused(place: Place, start: str, way: str):
    own = configure(TrainConfig, STARTS[start])
    assert OTHERS.keys() | {"dropout"} == set(setting_names(AdapterConfig))
    model, base = start_with(place, own.adapter, way)

    # The adapters' own settings are the defaults, and each of them may be given, or all.
    found = resolve_config(model, base)
    assert found.optimizer == own.optimizer
    settings = settings_of(found.adapter)
    assert settings | {"train_modules": [], "target_modules": []} == (
        settings_of(own.adapter) | {"train_modules": [], "target_modules": []}
    )
    for name in setting_names(AdapterConfig):
        given = settings_of(own.adapter)[name]
        assert resolve_config(model, base | {name: given}) == found, name
    assert resolve_config(model, base | settings_of(own.adapter)).optimizer == found.optimizer

    # Every other value is refused by name, except that of dropout.
    for name, values in OTHERS.items():
        other = next(value for value in values if value != settings_of(own.adapter)[name])
        with pytest.raises(ml.ConfigError, match=f"{name}|{flag_of(name)}"):
            resolve_config(model, base | {name: other})
    assert resolve_config(model, base | {"dropout": 0.5}).adapter.dropout == 0.5


@pytest.mark.parametrize("way", WAYS)
def test_settings_of_one_kind_are_judged_by_the_adapters_kind(place: Place, way: str):
    names = {name for facts in KINDS.values() for name in facts.own}
    assert names == {"magnitude_lr_ratio"}
    model, base = start_with(place, AdapterConfig(adapter="dora"), way)
    found = resolve_config(model, base | {"magnitude_lr_ratio": 4})
    assert found.optimizer.magnitude_lr_ratio == 4
    model, base = start_with(place, AdapterConfig(), way)
    with pytest.raises(
        ml.ConfigError,
        match=r"^(--magnitude-lr-ratio is for --|magnitude_lr_ratio is for )adapter dora, not lora$",
    ):
        resolve_config(model, base | {"magnitude_lr_ratio": 4})


@pytest.mark.parametrize(
    ("theirs", "given"),
    [
        ({"adapter": "dora"}, ["--magnitude-lr-ratio", "4"]),
        (
            {"init": "pissa", "quantize": "4", "quantize_group_size": 32, "svd": "exact"},
            ["--quantize", "4", "--quantize-group-size", "32", "--svd", "exact"],
        ),
        ({"init": "loftq", "quantize_group_size": 32}, ["--quantize", "4"]),
        ({"init": "loftq", "quantize_group_size": 32, "loftq_iters": 2}, ["--loftq-iters", "2"]),
    ],
)
def test_the_command_accepts_settings_that_need_the_adapters_kind_or_init(
    place: Place, theirs: dict[str, Any], given: list[str]
):
    first = place.run("first", iters=1, **theirs)
    again = ["-c", f"{first.folder}/run.yaml", "--resume-adapter-file", str(first.folder)]
    for number, words in enumerate((given, [])):  # a few settings, or all of the first run's
        folder = place.folder / f"next{number}"
        source = again if not words else [*again[2:], "--model", str(place.folder / "model")]
        data = ["--data", str(place.folder / "data"), "--iters", "1", "--verbosity", "silent"]
        train.main([*source, *words, *data, "--adapter-path", str(folder)])
        found, expected = ml.Run.load(folder).config.adapter, first.config.adapter
        assert found.quantization == expected.quantization
        assert replace(found, dropout=expected.dropout, quantize=expected.quantize) == expected


def test_a_start_that_is_not_recorded_may_be_any_that_the_arrays_allow(place: Place):
    folder = place.folder / "saved"
    for settings, allowed, refused in (
        ({"init": "init2"}, ["init1", "init2"], ["pissa", "loftq"]),
        ({"init": "pissa"}, ["pissa"], ["init1", "init2", "loftq"]),
        ({"init": "pissa", "quantize": "4", "quantize_group_size": 32}, ["loftq", "pissa"], ["init1", "init2"]),
    ):  # fmt: skip
        model, base = start_with(place, AdapterConfig(**settings), "file")
        config = json.loads((folder / "adapter_config.json").read_text())
        del config["made_with"]
        (folder / "adapter_config.json").write_text(json.dumps(config))

        quantization = AdapterConfig(**settings).quantization
        found = resolve_config(model, base).adapter
        assert (found.init, found.quantization) == (allowed[0], quantization)
        for init in allowed:
            found = resolve_config(model, base | {"init": init}).adapter
            assert (found.init, found.quantization) == (init, quantization)
        for init in refused:
            with pytest.raises(ml.ConfigError, match=rf"init {init} \(theirs: {allowed[0]}\)"):
                resolve_config(model, base | {"init": init})


def test_a_record_that_the_arrays_contradict_is_not_used(place: Place):
    model, base = start_with(place, AdapterConfig(alpha=6.0), "file")
    file = place.folder / "saved" / "adapter_config.json"
    stored = json.loads(file.read_text())
    lies: list[Any] = [
        {"init": "pissa", "alpha": 99, "target_modules": ["q_proj"], "train_modules": ["norms"]},
        {"init": "init2", "quantize": "4"},
        {"init": "init3"},
        {"num_layers": "many"},
        {},
    ]
    for lie in lies:
        file.write_text(json.dumps(stored | {"made_with": lie}))
        found = resolve_config(model, base).adapter
        assert (found.init, found.scale, found.quantization) == ("init1", 0.75, None)
        assert (found.target_modules, found.train_modules) == (("all-linear",), ())


@pytest.mark.parametrize("way", WAYS)
def test_the_start_is_kept_by_runs_that_follow(place: Place, way: str):
    config = AdapterConfig(init="pissa", quantize="4", quantize_group_size=32, alpha=6.0)
    model, base = start_with(place, config, way)
    settings: dict[str, Any] = {
        "iters": 2, "batch_size": 4, "data": str(place.folder / "data"), "sample_rows": 0, "steps_per_save": 1,
    }  # fmt: skip
    tokenizer = ml.load(str(place.folder / "model"))[1]
    run = ml.finetune(model, tokenizer, adapter_path=str(place.folder / "one"), **base, **settings)
    expected = settings_of(checked(config))
    assert settings_of(run.config.adapter) == expected
    assert run.config.optimizer.learning_rate == 2e-5

    # The run's folder, its checkpoints, and what is saved from the model have the same start.
    ml.save_adapter(model, place.folder / "two")
    for folder in (run.folder, run.folder / "checkpoints" / "000001", place.folder / "two"):
        name = str(place.folder / "model")
        fresh = ml.load(name)[0]
        found = resolve_config(fresh, {"resume_adapter_file": str(folder)})
        assert settings_of(found.adapter) == expected
        assert settings_of(resolve_config(ml.load(name, str(folder))[0], {}).adapter) == expected


def test_a_run_of_attached_adapters_resumes_with_their_settings(place: Place):
    model, _ = start_with(place, AdapterConfig(init="init2", rank=4), "attached")
    tokenizer = ml.load(str(place.folder / "model"))[1]
    settings: dict[str, Any] = {
        "iters": 3, "batch_size": 4, "data": str(place.folder / "data"), "sample_rows": 0,
        "adapter_path": str(place.folder / "run"),
    }  # fmt: skip
    first = ml.finetune(model, tokenizer, max_minutes=1e-6, **settings)
    assert first.outcome == "out of time"
    run = ml.finetune(model, tokenizer, resume=True, **settings)
    assert (run.outcome, run.config.adapter) == ("finished", first.config.adapter)
    assert (run.config.adapter.init, run.config.adapter.rank) == ("init2", 4)


def test_adapters_of_several_ranks_train_and_resume(place: Place):
    _, base = start_with(place, AdapterConfig(rank=4, alpha=8.0), "file")
    file = place.folder / "saved" / "adapters.safetensors"
    weights = load_file(file)
    path = min(weights).rpartition(".")[0]
    a, b = (weights[f"{path}.{leaf}"] for leaf in ("lora_a", "lora_b"))
    weights |= {f"{path}.lora_a": np.tile(a, (1, 2)), f"{path}.lora_b": np.tile(b, (2, 1))}
    save_file(weights, file)
    config = place.folder / "saved" / "adapter_config.json"
    stored = json.loads(config.read_text())
    stored["lora_parameters"]["rank"] = 8
    config.write_text(json.dumps(stored))

    # The run's rank is the largest one, and the scale stays.
    settings = {"iters": 3, "dropout": 0.0, **base}
    one = place.run("one", **settings)
    assert (one.config.adapter.rank, one.config.adapter.scale) == (8, 2.0)
    place.run("two", stop_at=1, **settings)
    assert same(adapter_of(place.run("two", resume=True, **settings)), adapter_of(one))
    assert place.run("three", **settings, rank=8).config.adapter == one.config.adapter
    with pytest.raises(ml.ConfigError, match=r"rank 4 \(theirs: 4 and 8\)"):
        place.run("four", **settings, rank=4)


def test_the_same_command_resumes_a_run_that_started_from_an_adapter(place: Place):
    config = AdapterConfig(adapter="dora", init="init2", rank=4)
    _, base = start_with(place, config, "file")
    words = [
        "--model", str(place.folder / "model"), "--data", str(place.folder / "data"), "--iters", "4",
        "--resume-adapter-file", base["resume_adapter_file"], "--adapter-path", str(place.folder / "run"),
        "--magnitude-lr-ratio", "4", "--verbosity", "silent",
    ]  # fmt: skip
    train.main([*words, "--max-minutes", "0.000001"])
    assert ml.Run.load(place.folder / "run").outcome == "out of time"
    train.main([*words, "--resume"])
    run = ml.Run.load(place.folder / "run")
    assert (run.outcome, run.config.adapter) == ("finished", checked(config))


@pytest.mark.parametrize("name", ["gemma3n", "mamba", "jamba", "laguna"])
def test_all_linear_is_accepted_where_some_layers_get_no_adapter(name: str, tmp_path: Path):
    write_folder(name, tmp_path)
    model, _ = load_base(tmp_path)
    assert ml.attach_adapters(model, AdapterConfig()).skipped
    for given in ({}, {"target_modules": ["all-linear"]}):
        assert resolve_config(model, given).adapter.target_modules == ("all-linear",)
