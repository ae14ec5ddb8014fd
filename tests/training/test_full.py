"""Adapter full: every weight trains, and the run's folder is a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load

from mlx_loraplus.adapters.attach import attach_adapters, find_adapters
from mlx_loraplus.cli import sweep, train
from mlx_loraplus.config import AdapterConfig, TrainConfig
from mlx_loraplus.errors import AdapterError, ConfigError, OutputError
from mlx_loraplus.memory.model_shapes import measure
from mlx_loraplus.settings import configure
from mlx_loraplus.training.checkpoint import checkpoint_folder
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import TinyModel, same
from tests.training.teams import Runs, do_jobs
from tests.training.tiny_runs import (
    Place,
    validate_on_what_is_unlearned,
    without_times,
    write_pairs,
)

FULL: dict[str, Any] = {"adapter": "full", "dropout": 0.0}
TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])


def weights_of(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))  # pyright: ignore


# What trains


def test_every_parameter_trains_and_the_ends_have_their_own_rate(tiny: TinyModel):
    model = tiny("llama")
    trainable = attach_adapters(model, AdapterConfig(adapter="full"))
    parameters = dict(tree_flatten(model.parameters()))
    assert trainable.groups.keys() == parameters.keys()
    assert trainable.trainable == trainable.total == sum(a.size for a in parameters.values())
    ends = {name for name, group in trainable.groups.items() if group == "embedding"}
    assert ends == {"model.embed_tokens.weight", "lm_head.weight"}


def test_num_layers_trains_the_last_blocks_only(tiny: TinyModel):
    model = tiny("llama")
    trainable = attach_adapters(model, AdapterConfig(adapter="full", num_layers=2))
    assert {name.split(".")[2] for name in trainable.groups} == {"1", "2"}
    assert all(name.startswith("model.layers.") for name in trainable.groups)
    assert set(trainable.groups.values()) == {"weights"}


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_moe", "cohere", "mixtral"])
def test_other_families_train_too(tiny: TinyModel, kind: str):
    model = tiny(kind)
    trainable = attach_adapters(model, AdapterConfig(adapter="full"))
    sizes = measure(model, AdapterConfig(adapter="full"))
    assert sizes.trainable == trainable.trainable
    assert sizes.weights == 0


def test_too_many_blocks_are_refused(tiny: TinyModel):
    with pytest.raises(
        ConfigError, match="--num-layers 9 is above the model's 3 blocks: give 1 to 3"
    ):
        attach_adapters(tiny("llama"), AdapterConfig(adapter="full", num_layers=9))


def test_a_quantized_model_is_refused_with_the_remedy(tiny: TinyModel):
    with pytest.raises(ConfigError, match=r"have 4 bits .*: load Org/Model, or use --adapter lora"):
        attach_adapters(tiny("llama", bits=4), AdapterConfig(adapter="full"), "Org/Model")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_ratio": 4}, "full has no B, so lr_ratio can't be 4: leave it out"),
        ({"rank": 8}, "full trains the weights themselves and has no rank: leave rank out"),
        ({"alpha": 8.0}, "no alpha"),
        ({"rslora": True}, "no rslora"),
        ({"dropout": 0.1}, "no dropout"),
        ({"init": "pissa", "quantize": "4"}, "no init, quantize"),
        ({"target_modules": ["q_proj"]}, "no target_modules"),
        ({"train_modules": ["norms"]}, "no train_modules"),
        ({"svd": "exact"}, "no svd"),
        ({"loftq_iters": 2}, "no loftq_iters"),
        ({"quantize_group_size": 32}, "no quantize_group_size"),
        ({"magnitude_lr_ratio": 2.0}, "magnitude_lr_ratio is for adapter dora, not full"),
        (
            {"resume_adapter_file": "some"},
            "give as model the folder that mlx_loraplus.fuse some writes",
        ),
        ({"num_layers": 1, "embedding_learning_rate": 1e-4}, "no embedding trains"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ConfigError) as error:
        configure(TrainConfig, {"adapter": "full"} | settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_defaults():
    config = configure(TrainConfig, {"adapter": "full", "lr_ratio": 1})
    assert (config.optimizer.learning_rate, config.optimizer.lr_ratio) == (1e-5, 1.0)
    assert config.adapter.rank is None
    for objective, rate in (("dpo", 5e-7), ("orpo", 1e-5)):
        paired = configure(TrainConfig, {"adapter": "full", "objective": objective})
        assert paired.optimizer.learning_rate == pytest.approx(rate)


# Runs


def test_the_folder_is_a_model_that_stock_loads(place: Place):
    run = place.run(**FULL)
    assert place.told_with("try it:") == f"try it:  mlx_loraplus.chat {run.folder}"
    assert not any("fuse it" in line for line in place.told)
    start, tokenizer = ml.load(str(place.folder / "model"))
    model, _ = ml.load(run)
    stock, _ = stock_load(str(run.folder))
    expected = model(TOKENS)
    assert mx.array_equal(stock(TOKENS), expected).item()
    assert not mx.allclose(start(TOKENS), expected, atol=1e-3).item()
    assert not find_adapters(model)
    assert not (run.folder / "adapters.safetensors").exists()

    # The last validation scored just this model.
    found = ml.evaluate(model, tokenizer, data=str(place.folder / "data"), answers=0, batch_size=4)
    assert found.loss == pytest.approx(run.losses("valid_loss")[-1][1], rel=1e-5)
    assert run.losses("valid_loss")[-1][1] < run.losses("valid_loss")[0][1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grad_accumulation_steps": 2},
        {"compile": "on"},
        {"grad_checkpoint": "on"},
        {"pack": True},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_a_killed_run_resumes_to_the_bit(place: Place, settings: dict[str, Any]):
    settings = FULL | settings
    whole = place.run("whole", **settings)
    cut = place.run("cut", stop_at=3, **settings)
    assert cut.outcome == "interrupted"
    again = place.run("cut", resume=True, **settings)
    assert same(weights_of(whole.folder), weights_of(again.folder))
    assert without_times(whole.history) == without_times(again.history)


def test_a_killed_bfloat16_run_resumes_to_the_bit(place: Place):
    def run(name: str, **more: Any) -> ml.Run:
        model, tokenizer = ml.load(str(place.folder / "model"))
        model.set_dtype(mx.bfloat16)
        settings = {
            "adapter": "full",
            "batch_size": 4,
            "data": str(place.folder / "data"),
            "steps_per_save": 2,
        }
        path = str(place.folder / name)
        return ml.finetune(model, tokenizer, adapter_path=path, **settings | more)

    whole = run("whole", iters=6, schedule="constant")
    run("cut", iters=3, schedule="constant")
    again = run("cut", iters=6, schedule="constant", resume=True)
    assert same(weights_of(whole.folder), weights_of(again.folder))
    states = [
        dict(mx.load(str(checkpoint_folder(each.folder, 6) / "state.safetensors")))  # pyright: ignore
        for each in (whole, again)
    ]
    assert same(*states)
    assert any(name.startswith("compensation.") for name in states[0])
    assert {array.dtype for array in weights_of(whole.folder).values()} == {mx.bfloat16}

    # Stock computes the same logits from the file, which holds bfloat16.
    stock, _ = stock_load(str(whole.folder))
    stock.set_dtype(mx.float32)
    ours, _ = ml.load(whole)
    assert mx.allclose(stock(TOKENS), ours(TOKENS), atol=1e-5).item()


def test_the_best_weights_are_kept(place: Place):
    validate_on_what_is_unlearned(place)
    run = place.run(
        iters=12, steps_per_eval=1, patience=2, sample_rows=0, **FULL | {"learning_rate": 1e-2}
    )
    assert run.outcome == "stopped early"
    assert run.progress.best_step is not None
    best = mx.load(
        str(run.folder / f"checkpoints/best-{run.progress.best_step:06d}/trained.safetensors")
    )
    assert same(weights_of(run.folder), best)


def test_the_last_blocks_alone(place: Place):
    run = place.run(num_layers=1, **FULL)
    before, after = weights_of(place.folder / "model"), weights_of(run.folder)
    changed = {name for name in after if not mx.array_equal(before[name], after[name]).item()}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)


def test_a_run_replaces_one_of_the_other_kind(place: Place):
    whole = place.run("run", **FULL)
    with pytest.raises(OutputError, match=r"already holds a run \(.*\): resume=True continues it"):
        place.run("run", **FULL)
    place.run("run", overwrite=True)
    assert (whole.folder / "adapters.safetensors").is_file()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert not (whole.folder / name).exists()
    ml.load(whole)

    place.run("run", overwrite=True, **FULL)
    assert not (whole.folder / "adapters.safetensors").exists()
    model, _ = ml.load(whole)
    assert not find_adapters(model)


def test_a_folder_with_another_model_is_left_alone(place: Place):
    shutil.copytree(place.folder / "model", place.folder / "run")
    with pytest.raises(OutputError, match="holds a model"):
        place.run("run", overwrite=True, **FULL)


def test_a_trained_model_is_not_trained_again_by_accident(place: Place):
    model, tokenizer = ml.load(str(place.folder / "model"))
    settings = {"data": str(place.folder / "data"), "iters": 2, "batch_size": 4}
    path = str(place.folder / "first")
    ml.finetune(model, tokenizer, adapter="full", adapter_path=path, **settings)
    for more in (
        {"adapter": "full"},
        {},
        {"adapter": "full", "resume": True, "adapter_path": path},
    ):
        with pytest.raises(
            ConfigError, match=r"were trained by an earlier run .*: load the model again"
        ):
            ml.finetune(
                model, tokenizer, **{"adapter_path": str(place.folder / "next")} | settings | more
            )

    # Following the advice works.
    model, tokenizer = ml.load(path)
    ml.finetune(
        model, tokenizer, adapter="full", adapter_path=str(place.folder / "next"), **settings
    )


def test_a_model_from_elsewhere_is_refused(place: Place):
    model, tokenizer = stock_load(str(place.folder / "model"))
    with pytest.raises(ConfigError, match=r"only for models from mlx_loraplus\.load"):
        ml.finetune(model, tokenizer, adapter="full", data=str(place.folder / "data"))


def test_preferences_compare_with_the_start(place: Place):
    write_pairs(place.folder / "pairs")
    data = str(place.folder / "pairs")
    runs = [
        place.run(name, objective="dpo", data=data, reference=name, **FULL)
        for name in ("base", "start")
    ]
    assert same(weights_of(runs[0].folder), weights_of(runs[1].folder))
    margins = [margin for _, margin in runs[0].losses("valid_reward_margin")]
    assert margins[0] == pytest.approx(0.0, abs=1e-5)  # the model is the reference
    assert margins[-1] > 0.01
    again = place.run("base", objective="dpo", data=data, resume=True, iters=8, **FULL)
    assert again.finished


def test_two_processes_train_as_one(tmp_path: Path):
    write_tiny_model(tmp_path / "model")
    write_sums(tmp_path / "data", rows=19)
    plain = {
        "adapter": "full",
        "iters": 6,
        "batch_size": 5,
        "steps_per_save": 3,
        "steps_per_report": 1,
        "learning_rate": 1e-3,
    }
    teams = Runs(tmp_path, plain)
    jobs = [teams.job("two"), teams.job("legs", iters=3), teams.job("tensor", parallel="tensor")]
    two, legs, tensor = do_jobs(2, jobs, tmp_path / "logs")
    assert [rank["outcome"] for rank in (*two, *legs)] == ["finished"] * 4
    assert 'adapter="full" does not work with parallel="tensor"' in tensor[0]["error"]

    one = teams.alone("one")
    first, second = weights_of(one.folder), weights_of(tmp_path / "two")
    for name, array in first.items():
        assert mx.allclose(array, second[name], rtol=0, atol=1e-5).item(), name


def test_a_sweep_is_refused(place: Place, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        sweep(["--adapter", "full", "--model", str(place.folder / "model")])
    told = capsys.readouterr().err
    assert "a sweep searches rates for A and B, which full does not have" in told


def test_the_settings_of_mlx_lm(place: Place, capsys: pytest.CaptureFixture[str]):
    """The file of mlx-lm holds LoRA's settings too, which mlx-lm ignores."""
    file = place.folder / "lora_config.yaml"
    file.write_text(
        "fine_tune_type: full\nnum_layers: 1\niters: 2\nbatch_size: 4\nlearning_rate: 1.0e-5\n"
        "lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0}\n"
    )
    words = [
        "-c",
        str(file),
        "--model",
        str(place.folder / "model"),
        "--data",
        str(place.folder / "data"),
    ]
    train([*words, "--adapter-path", str(place.folder / "run")])
    told = capsys.readouterr().err
    assert "fine_tune_type full → adapter full" in told
    assert "left out: lora_parameters (there is no LoRA with fine_tune_type full)" in told
    assert "B learns" not in told
    assert (place.folder / "run" / "model.safetensors").is_file()


def test_weights_of_mlx_lm_are_no_adapter(place: Place):
    folder = place.folder / "theirs"
    folder.mkdir()
    shutil.copy(place.folder / "model" / "model.safetensors", folder / "adapters.safetensors")
    config = {"fine_tune_type": "full", "num_layers": 2, "lora_parameters": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"convert them to a model with mlx_lm\.fuse"):
        ml.load(str(place.folder / "model"), folder)
