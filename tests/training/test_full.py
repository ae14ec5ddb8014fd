"""Adapter full: every weight trains, the run's folder is a model, and bfloat16 loses no updates."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load

from mlx_loraplus.adapters.attach import attach_adapters, find_adapters
from mlx_loraplus.cli import chat, export, fuse, generate, sweep, train
from mlx_loraplus.config import AdapterConfig, OptimizerConfig, TrainConfig
from mlx_loraplus.errors import AdapterError, ConfigError, OutputError
from mlx_loraplus.memory.model_shapes import measure
from mlx_loraplus.settings import configure
from mlx_loraplus.training.checkpoint import checkpoint_folder
from mlx_loraplus.training.compensation import narrowed, widened
from mlx_loraplus.training.optimizer import LoRAPlus
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import TinyModel, same
from tests.export.test_gguf_lora import converted
from tests.models.gguf_files import write_gguf
from tests.training.teams import Runs, do_jobs
from tests.training.tiny_models import equal_bits, random_like, tiny_llama, trainables
from tests.training.tiny_runs import (
    Place,
    validate_on_what_is_unlearned,
    without_times,
    write_pairs,
)

FULL: dict[str, Any] = {"adapter": "full", "dropout": 0.0}
TOKENS = mx.array([[1, 5, 2, 7, 3, 9, 11, 100, 50, 3]])


def full(**settings: Any) -> OptimizerConfig:
    plain = {
        "learning_rate": 1e-3, "lr_ratio": 1.0, "schedule": "constant", "warmup": 0, "max_grad_norm": 0.0,
    }  # fmt: skip
    return OptimizerConfig(**plain | settings)


def weights_of(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))  # pyright: ignore


def refused(command: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that refuses, and return its only line."""
    with pytest.raises(SystemExit) as stop:
        command(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


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
        ConfigError, match="num_layers 9 is above the model's 3 blocks: give 1 to 3"
    ):
        attach_adapters(tiny("llama"), AdapterConfig(adapter="full", num_layers=9))


def test_a_quantized_model_is_refused_with_the_remedy(tiny: TinyModel):
    with pytest.raises(ConfigError, match=r"have 4 bits .*: load Org/Model, or use adapter lora"):
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
        ({"resume_adapter_file": "some"}, "fuse some with mlx_loraplus.fuse, and give the folder"),
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
    paired = configure(TrainConfig, {"adapter": "full", "objective": "dpo"})
    assert paired.optimizer.learning_rate == pytest.approx(5e-7)


# The update


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_float32_steps_are_those_of_mlx(decay: float):
    """Matrices of blocks decay; norms, embeddings and the head do not, and the ends have their own rate."""
    model = tiny_llama()
    trainable = attach_adapters(model, AdapterConfig(adapter="full"))
    config = full(weight_decay=decay, embedding_learning_rate=1e-4)
    ours = LoRAPlus(config, 9)
    ours.init(model, trainable.groups)

    expected = {name: mx.array(array) for name, array in trainables(model).items()}
    rules: dict[str, optim.Optimizer] = {}
    for name, array in expected.items():
        is_end = trainable.groups[name] == "embedding"
        rate = 1e-4 if is_end else 1e-3
        share = 0.0 if is_end or array.ndim < 2 else decay
        rules[name] = optim.AdamW(rate, weight_decay=share, bias_correction=True)
    for step in range(3):
        gradients = random_like(expected, step)
        flat: dict[str, mx.array] = dict(tree_flatten(gradients))
        for name, rule in rules.items():
            expected[name] = rule.apply_gradients({"p": flat[name]}, {"p": expected[name]})["p"]
        ours.update(model, gradients)
    for name, array in trainables(model).items():
        assert mx.allclose(array, expected[name], rtol=0, atol=1e-6).item(), name


def changed(dtype: mx.Dtype, optimizer: str, rate: float) -> tuple[dict[str, mx.array], LoRAPlus]:
    """Make 100 steps with the same gradients; the weights start from numbers that bfloat16 has."""
    model = tiny_llama()
    model.set_dtype(mx.bfloat16)
    model.set_dtype(dtype)
    trainable = attach_adapters(model, AdapterConfig(adapter="full"))
    rule = LoRAPlus(full(learning_rate=rate, optimizer=optimizer, weight_decay=0.0), 100)
    rule.init(model, trainable.groups)
    shapes = {name: array.astype(mx.float32) for name, array in trainables(model).items()}
    for step in range(100):
        rule.update(model, random_like(shapes, step % 3))
        mx.eval(model.parameters(), rule.state)
    return trainables(model), rule


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "adafactor", "muon"])
def test_bfloat16_weights_are_updated_as_float32_weights_to_the_bit(optimizer: str):
    exact, _ = changed(mx.float32, optimizer, 1e-5)
    weights, rule = changed(mx.bfloat16, optimizer, 1e-5)
    for name, weight in weights.items():
        assert weight.dtype == mx.bfloat16
        kept = rule.state["compensation"][name]
        assert mx.array_equal(widened(weight, kept), exact[name]).item(), name
        unit = 2.0**-8 * mx.abs(exact[name])
        assert (mx.abs(weight.astype(mx.float32) - exact[name]) <= unit).all().item(), name


def test_float16_weights_follow_float32():
    """Weight and compensation have 19 bits together, so a few percent of a small step may be lost."""
    exact, _ = changed(mx.float32, "adamw", 1e-5)
    weights, rule = changed(mx.float16, "adamw", 1e-5)
    for name, weight in weights.items():
        value = widened(weight, rule.state["compensation"][name])
        assert mx.allclose(value, exact[name], rtol=0, atol=5e-5).item(), name


def test_numbers_of_every_size_are_split_and_joined():
    bits = mx.random.randint(0, 2**31 - 1, (10_000,), key=mx.random.key(0)).astype(mx.uint32)
    bits = mx.concatenate(
        [bits, bits | 0x80000000, mx.array([0, 0x80000000, 0x3F808000], mx.uint32)]
    )
    exact = bits.view(mx.float32)
    exact = mx.where(mx.isfinite(exact) & (mx.abs(exact) < 1e38), exact, 1.0)
    weight, low = narrowed(exact, mx.bfloat16)
    assert mx.array_equal(widened(weight, low).view(mx.uint32), exact.view(mx.uint32)).item()
    off = mx.abs(weight.astype(mx.float32) - exact)
    assert (off <= 2.0**-8 * mx.abs(exact) + 1e-38).all().item()


def test_plain_bfloat16_loses_what_compensation_keeps():
    """Adam's steps of 1e-5 on weights of about 0.25: below 2^-9 of them, so plain rounding keeps none."""
    start = (0.25 + 0.1 * mx.random.uniform(shape=(64, 64), key=mx.random.key(0))).astype(
        mx.bfloat16
    )
    gradient = mx.ones((64, 64))

    plain = start
    rule = optim.Adam(1e-5, bias_correction=True)
    model = nn.Linear(64, 64, bias=False)
    model.weight = start
    ours = LoRAPlus(full(learning_rate=1e-5), 300)
    ours.init(model, {"weight": "weights"})
    for _ in range(300):
        plain = rule.apply_gradients({"w": gradient.astype(mx.bfloat16)}, {"w": plain})["w"]
        ours.update(model, {"weight": gradient})
        mx.eval(plain, model.parameters(), ours.state)

    assert mx.array_equal(plain, start).item()
    exact = widened(model.weight, ours.state["compensation"]["weight"])
    change = exact - start.astype(mx.float32)
    assert mx.allclose(change, mx.full(change.shape, -300 * 1e-5), rtol=0.01, atol=0).item()
    assert not mx.any(model.weight == start).item()


def test_a_step_that_is_not_finite_changes_no_bit():
    model = tiny_llama()
    model.set_dtype(mx.bfloat16)
    trainable = attach_adapters(model, AdapterConfig(adapter="full"))
    rule = LoRAPlus(full(), 9)
    rule.init(model, trainable.groups)
    gradients = random_like(trainables(model), 0)
    rule.update(model, gradients)
    before = trainables(model), rule.arrays()
    mx.eval(before)
    gradients["lm_head"]["weight"] = gradients["lm_head"]["weight"] * mx.inf
    rule.update(model, gradients)
    assert equal_bits(trainables(model), before[0])
    after = rule.arrays()
    assert equal_bits(
        {name: a for name, a in after.items() if name.startswith("compensation.")},
        {name: a for name, a in before[1].items() if name.startswith("compensation.")},
    )


def test_the_state_is_restored_with_the_compensation():
    models = []
    for _ in range(2):
        model = tiny_llama()
        model.set_dtype(mx.bfloat16)
        models.append(model)
    groups = [attach_adapters(model, AdapterConfig(adapter="full")).groups for model in models]
    first, second = (LoRAPlus(full(learning_rate=1e-5), 9) for _ in models)
    first.init(models[0], groups[0])
    second.init(models[1], groups[1])
    for step in range(3):
        first.update(models[0], random_like(trainables(models[0]), step))
    assert any(name.startswith("compensation.") for name in first.arrays())
    models[1].load_weights(list(trainables(models[0]).items()))
    second.restore(first.arrays())
    for model, rule in zip(models, (first, second), strict=True):
        rule.update(model, random_like(trainables(model), 7))
    assert equal_bits(trainables(models[0]), trainables(models[1]))
    assert equal_bits(first.arrays(), second.arrays())


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
    assert "adapter full does not work with parallel tensor" in tensor[0]["error"]

    one = teams.alone("one")
    first, second = weights_of(one.folder), weights_of(tmp_path / "two")
    for name, array in first.items():
        assert mx.allclose(array, second[name], rtol=0, atol=1e-5).item(), name


def test_a_sweep_is_refused(place: Place, capsys: pytest.CaptureFixture[str]):
    line = refused(sweep, ["--adapter", "full", "--model", str(place.folder / "model")], capsys)
    assert "a sweep searches rates for A and B, which full does not have" in line


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
    with pytest.raises(AdapterError, match=r"make a model of them with mlx_lm\.fuse"):
        ml.load(str(place.folder / "model"), folder)


# What the commands make of the folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with adapter full."""
    home = tmp_path_factory.mktemp("full")
    write_tiny_model(home / "model", hidden=64)
    write_sums(home / "data")
    Place(home).run(**FULL)
    return home / "run"


def test_generate_and_chat(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    generate([str(trained), "--prompt", "1 + 2 =", "--max-tokens", "4"])
    answer = capsys.readouterr().out
    generate(["--model", str(trained), "--prompt", "1 + 2 =", "--max-tokens", "4"])
    assert capsys.readouterr().out == answer

    lines = iter(["1 + 2 =", "/both"])
    monkeypatch.setattr("builtins.input", lambda _="": next(lines, None) or _end())
    chat([str(trained), "--max-tokens", "4"])
    told = capsys.readouterr().out
    assert told.startswith("model: ")
    assert "no base and no adapter are loaded" in told


def _end() -> str:
    raise EOFError


def test_evaluate(trained: Path, capsys: pytest.CaptureFixture[str]):
    train(["--test", "--adapter-path", str(trained)])
    told = capsys.readouterr().out
    (losses,) = [line.split() for line in told.splitlines() if " loss " in line]
    numbers = [float(word) for word in losses if word.replace(".", "").isdigit()]
    assert numbers[1] < numbers[0]


def test_fuse_copies_and_quantizes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fuse([str(trained), "--save-path", str(tmp_path / "copy")])
    assert same(weights_of(trained), weights_of(tmp_path / "copy"))
    fuse([str(trained), "--save-path", str(tmp_path / "small"), "--bits", "8"])
    assert "KL(before || quantized)" in capsys.readouterr().out
    stock, _ = stock_load(str(tmp_path / "small"))
    full_model, _ = stock_load(str(trained))
    assert mx.allclose(stock(TOKENS), full_model(TOKENS), atol=0.1).item()
    line = refused(fuse, [f"{trained}:0.5", "--save-path", str(tmp_path / "half")], capsys)
    assert "is a whole model, which can't be added to others or weighted" in line


def test_export(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # Characters alone are no tokenizer that GGUF knows, so this is another model's folder.
    ours, _ = converted(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "model")
    export([str(tmp_path / "model"), "--to", "gguf", "--save-path", str(tmp_path / "gguf")])
    assert "a whole model is written, as f16" in capsys.readouterr().out
    model, _ = ml.load(str(tmp_path / "gguf" / "model.gguf"))
    assert mx.allclose(model(TOKENS % 8), ours(TOKENS % 8), atol=0.02).item()
    assert (tmp_path / "gguf" / "Modelfile").is_file()

    line = refused(
        export, [str(trained), "--to", "peft", "--save-path", str(tmp_path / "peft")], capsys
    )
    assert "is a whole model, not an adapter: export it alone with --to gguf or --to hub" in line


def test_the_hub_gets_the_model_and_a_card(trained: Path, tmp_path: Path):
    from mlx_loraplus.export.whole_model import write_model_repository
    from mlx_loraplus.models.loading import load_folder

    model, tokenizer, config = load_folder(trained)
    write_model_repository(model, tokenizer, config, trained, "me/mine", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "all of its weights trained further" in card
    assert "mlx_lm.generate --model me/mine" in card
    assert "adapter is used" not in card
    assert same(weights_of(tmp_path / "hub"), weights_of(trained))


def test_it_is_no_adapter(trained: Path, place: Place):
    with pytest.raises(AdapterError, match="is a model, not an adapter: give it as model="):
        ml.load(str(place.folder / "model"), trained)
    run = place.run("further", model=str(trained))
    assert (run.folder / "adapters.safetensors").is_file()


# Memory


def test_the_plan_counts_weights_gradients_moments_and_compensation(tiny: TinyModel):
    config = configure(TrainConfig, {"adapter": "full"}).adapter
    count = sum(array.size for _, array in tree_flatten(tiny("llama").parameters()))
    for dtype in (mx.float32, mx.bfloat16):
        model = tiny("llama")
        model.set_dtype(dtype)
        before = measure(model, config)
        trainable = attach_adapters(model, config)
        rule = LoRAPlus(full(), 2)
        rule.init(model, trainable.groups)
        state = sum(array.nbytes for array in rule.arrays().values() if array.ndim)
        weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))

        assert before.trainable == count
        assert before.weights + before.adapters() + before.moments("adamw") == weights + state
        assert measure(model, config) == before


def test_what_does_not_fit_names_what_helps():
    from dataclasses import replace

    from mlx_loraplus.device import simulate_mac
    from mlx_loraplus.memory.plan import memory_plan_of

    plan = memory_plan_of(configure(TrainConfig, {"model": "gemma-3-270m", "adapter": "full"}))
    plan = replace(plan, machine=simulate_mac("8GB"))
    big = replace(plan, sizes=replace(plan.sizes, trained=((1 << 16, 1 << 16),)))
    suggestions = big.suggestions(8, 512)
    assert any(line.startswith("--adapter lora") for line in suggestions)
    assert not any("4 bits" in line for line in suggestions)


def test_gradients_of_bfloat16_weights_stay_near_those_of_float32(tiny: TinyModel):
    """The compensation repairs the update only; this bounds what the gradients themselves lose."""
    norms = []
    for dtype in (mx.float32, mx.bfloat16):
        model = tiny("llama")
        model.set_dtype(dtype)
        attach_adapters(model, AdapterConfig(adapter="full"))
        _, tree = nn.value_and_grad(model, lambda m: m(TOKENS).astype(mx.float32).square().mean())(
            model
        )
        norms.append({name: array.astype(mx.float32) for name, array in tree_flatten(tree)})
    off = np.sqrt(sum(float((norms[1][n] - norms[0][n]).square().sum()) for n in norms[0]))
    assert off < 0.05 * np.sqrt(sum(float(a.square().sum()) for a in norms[0].values()))
