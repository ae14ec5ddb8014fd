"""The names of mlx-lm, PEFT, TRL and Unsloth: translated where they mean the same, refused with ours otherwise."""

from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
import yaml
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import build_schedule

from mlx_loraplus import ConfigError
from mlx_loraplus.arguments import Switches, given_names, parse
from mlx_loraplus.command_config import FuseConfig, GenerateConfig
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.foreign_names import PROGRAMS, find_foreign
from mlx_loraplus.migration import translate
from mlx_loraplus.settings import configure, setting_names
from mlx_loraplus.training.optimizer import LoRAPlus

OFFICIAL = """
model: "mlx_model"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config: {adamw: {betas: [0.9, 0.999], weight_decay: 0.05, bias_correction: true}}
data: "training/data"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
report_to: null
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
mask_prompt: true
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 4
  scale: 20.0
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-4, 1000, 1e-7]
"""


def read(*words: str) -> TrainConfig:
    return parse(TrainConfig, Switches, words, "mlx_loraplus.train")[0]


def read_yaml(folder: Path, text: str, *words: str) -> TrainConfig:
    (folder / "lora_config.yaml").write_text(text)
    return read("-c", str(folder / "lora_config.yaml"), *words)


def test_a_file_of_mlx_lm_is_read_and_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = read_yaml(tmp_path, OFFICIAL)
    assert config == configure(
        TrainConfig,
        {
            "model": "mlx_model", "data": "training/data", "num_layers": 16, "batch_size": 4, "iters": 1000,
            "learning_rate": 1e-4, "schedule": "cosine", "warmup": 100, "rank": 4, "alpha": 80, "dropout": 0.1,
            "target_modules": ["self_attn.q_proj", "self_attn.v_proj"], "weight_decay": 0.05, "train_on": "last",
            "grad_checkpoint": "off", "steps_per_report": 10, "steps_per_eval": 200,
        },
    )  # fmt: skip
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("mlx-lm's settings: ")
    assert "scale 20 → alpha 80" in told
    assert "save_every 100 → steps_per_save 100" in told
    assert "left out: val_batches (all of the rows are used)" in told
    for part in (
        "learning_rate (lr_schedule sets the rate)",
        "lr_schedule's end 1e-07 (schedules end at 0 here)",
        "lr_schedule's warmup_init 1e-07 (a warm-up begins at 0 here)",
    ):
        assert part in told
    assert "the loss is over" not in told, "mask_prompt says what is learned"


def test_what_a_schedule_has_besides_is_told(capsys: pytest.CaptureFixture[str]):
    schedule = {
        "name": "linear_schedule",
        "arguments": [1e-4, 1e-6, 100],
        "warmup_init": 1e-6,
        "decay": 2,
    }
    translate(TrainConfig, {"lr_schedule": schedule, "iters": 100})
    told = capsys.readouterr().err
    assert "lr_schedule's end 1e-06 (schedules end at 0 here)" in told
    assert "lr_schedule's warmup_init 1e-06 (there is no warm-up)" in told
    assert "lr_schedule's decay (mlx-lm does not read it either)" in told
    translate(TrainConfig, {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-4, 100]}})
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "is_told"),
    [
        ({"save_every": 5}, True),
        ({"save_every": 5, "train_on": "last"}, False),
        ({"save_every": 5, "mask_prompt": False}, False),
        ({"save_every": 5, "objective": "dpo"}, False),
        ({"lora_alpha": 16}, False),
    ],
)
def test_what_is_learned_is_told_to_who_comes_from_mlx_lm(
    capsys: pytest.CaptureFixture[str], settings: dict[str, Any], *, is_told: bool
):
    translate(TrainConfig, settings)
    told = capsys.readouterr().err
    line = "only the answers are learned, as with mlx-lm's mask_prompt (train_on everything:"
    assert (line in told) == is_told


def test_the_scale_is_that_of_mlx_lm(tmp_path: Path):
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    stock: Any = LoRALinear.from_base(nn.Linear(8, 8), r=4, scale=20.0)
    config = configure(TrainConfig, translate(TrainConfig, {"lora_parameters": parameters}))
    assert config.adapter.scale == stock.scale
    # A flag changes the rank, but not the scale.
    config = read_yaml(tmp_path, OFFICIAL, "--rank", "16")
    assert (config.adapter.rank, config.adapter.scale) == (16, 20.0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("cosine_decay", [1e-4, 90, 0.0]), ("linear_schedule", [1e-4, 0.0, 90])],
)
def test_a_schedule_has_the_rates_of_mlx_lm(name: str, arguments: list[float]):
    schedule = {"name": name, "warmup": 10, "arguments": arguments}
    stock = build_schedule(schedule)
    config = configure(
        TrainConfig, translate(TrainConfig, {"lr_schedule": schedule, "iters": 100, "lr_ratio": 1})
    )
    ours = LoRAPlus(config.optimizer, 100)
    import mlx.core as mx

    for step in (2, 9, 20, 50, 80):
        rate = ours._rates(mx.array(step))["lora_a"].item()  # pyright: ignore[reportPrivateUsage]
        assert rate == pytest.approx(float(stock(mx.array(step))), abs=0.11e-4)


def test_batches_become_steps_with_accumulation():
    settings = {"iters": 1000, "grad_accumulation_steps": 4, "save_every": 100, "val_batches": -1}
    found = translate(TrainConfig, settings)
    assert found == {"iters": 250, "grad_accumulation_steps": 4, "steps_per_save": 25}
    with pytest.raises(ConfigError, match="divide --iters by --grad-accumulation-steps 4"):
        read("--save-every", "10", "--iters", "100", "--grad-accumulation-steps", "4")


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("--use-dora --r 4 --lora-alpha 8", {"adapter": "dora", "rank": 4, "alpha": 8}),
        ("--use_dora False --use-rslora True", {"rslora": True}),
        ("--lr 1e-4 --max-steps 30", {"learning_rate": 1e-4, "iters": 30}),
        ("--num-train-epochs 2 --max-steps -1", {"epochs": 2}),
        ("--num-train-epochs 2 --max-steps 30", {"iters": 30}),
        ("--output-dir out --save-total-limit 3", {"adapter_path": "out", "keep_checkpoints": 3}),
        ("--per_device_train_batch_size=4 --bf16 True", {"batch_size": 4}),
        ("--max-steps 100 --warmup-ratio 0.1", {"iters": 100, "warmup": 10}),
        ("--iters 100 --warmup-steps 0.1", {"iters": 100, "warmup": 10}),
        ("--warmup-steps 7", {"warmup": 7}),
        ("--lr-scheduler-type constant", {"schedule": "constant", "warmup": 0}),
        ("--optim paged_adamw_8bit --packing", {"optimizer": "adamw", "pack": True}),
        ("--mask-prompt --fine-tune-type dora", {"train_on": "last", "adapter": "dora"}),
        ("--report-to none --save-steps 5", {"report_to": [], "steps_per_save": 5}),
        ("--report-to wandb,trackio", {"report_to": ["wandb", "trackio"]}),
        ("--target-modules q_proj,v_proj", {"target_modules": ["q_proj", "v_proj"]}),
        ("--modules-to-save embed_tokens lm_head", {"train_modules": ["embed_tokens", "lm_head"]}),
        ("--dataset-text-field body", {"fields": ["text=body"]}),
        ("--load-in-4bit False --random-state 7 --model-name m", {"seed": 7, "model": "m"}),
        ("--use-gradient-checkpointing unsloth", {"grad_checkpoint": "on"}),
        ("--init-lora-weights pissa", {"init": "pissa"}),
        ("--lora-target all", {"target_modules": ["all-linear"]}),
        ("--lora-target q_proj,v_proj", {"target_modules": ["q_proj", "v_proj"]}),
        ("--loss-type ipo --torch-dtype bfloat16", {"objective": "ipo"}),
        ("--stage dpo --pref-loss orpo", {"objective": "orpo"}),
        ("--stage dpo --pref-beta 0.2", {"objective": "dpo", "beta": 0.2}),
        ("--rl dpo --rl-beta 0.2", {"objective": "dpo", "beta": 0.2}),
    ],
)
def test_flags_of_other_programs(words: str, settings: dict[str, Any]):
    assert read(*words.split()) == configure(TrainConfig, settings)


def test_keywords_of_other_programs(capsys: pytest.CaptureFixture[str]):
    found = translate(
        TrainConfig,
        {"r": 8, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    )
    assert found == {"rank": 8, "init": "loftq", "quantize": "4", "loftq_iters": 1}
    assert "r 8 → rank 8" in capsys.readouterr().err
    assert translate(TrainConfig, {"rank": 8}) == {"rank": 8}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--trust-remote-code", "code from a model's repository is never run"),
        ("--load-in-4bit", "give a quantized model: --list-models"),
        ("--lr-scheduler-type polynomial", "--schedule takes cosine, linear and constant"),
        ("--warmup-ratio 0.1", "give --iters N too, or --warmup in steps instead"),
        ("--layers-to-transform 1 2", "--num-layers N adapts the last N blocks"),
        ("--r 8 --rank 16", "--r 8 is --rank 8 here, but --rank is also 16: give one of them"),
        ("--r 8 --lora-r 4", "--lora-r 4 is --rank 4 here, but --rank is also 8"),
        ("--neftune-noise-alpha 5", "noise on embeddings does not exist here"),
        ("--ref-model base", "--reference base or start"),
        ("--wandb my-project", "--report-to sets the tracker"),
        ("--loss-type hinge", "--objective takes sft, dpo, ipo, orpo, simpo and kto"),
        ("--eval-strategy epoch --bias all", "give --steps-per-eval; PEFT's --bias all can't"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_names_ours(words: str, told: str):
    with pytest.raises(ConfigError) as error:
        read(*words.split())
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "lora_parameters: {rank: 8, alpha: 16}",
            "alpha is unknown: mlx-lm has scale, which is alpha / rank: write scale: 2 instead, or alpha: 16",
        ),
        ("lora_parameters: 8", "lora_parameters must hold settings, not 8"),
        ("lora_parameters: {scale: big}", "both must be numbers"),
        (
            "lr_schedule: {name: step_decay, arguments: [1e-1, 0.9, 10]}",
            "its name is step_decay, and only cosine_decay and linear_schedule are known",
        ),
        ("lr_schedule: {name: cosine_decay, arguments: [1, 2, 3, {a: b}]}", "lr_schedule"),
        (
            "iters: 9\nlr_schedule: {name: cosine_decay, arguments: [1e-5, 99]}",
            "ends at step 99 (warmup 0 + 99) of a run of 9, and schedules",
        ),
        (
            "optimizer_config: {adamw: {betas: [0.9, 0.98]}}",
            "it is [0.9, 0.999] here; leave it out",
        ),
        ("hf_dataset: {path: a/b}", "data org/name, with fields"),
        ("train: false\ntest: true", "--test only evaluates"),
    ],
)
def test_a_file_that_means_something_else_is_refused(tmp_path: Path, text: str, told: str):
    with pytest.raises(ConfigError) as error:
        read_yaml(tmp_path, text)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_setting_without_a_counterpart_may_be_off(tmp_path: Path):
    config = read_yaml(tmp_path, "iters: 5\nhf_dataset: false\nwandb: null\nupload_repo: false\n")
    assert config.iters == 5


def test_every_setting_of_mlx_lm_is_known():
    known = {*setting_names(TrainConfig), "config"}
    parameters = {"rank", "dropout", "scale", "keys"}
    for name in (*CONFIG_DEFAULTS, *parameters):
        assert name in known or find_foreign(name), name


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_table_names_settings_and_values_that_exist(program: str):
    known = [
        name for kind in (TrainConfig, GenerateConfig, FuseConfig) for name in setting_names(kind)
    ]
    for name, setting in PROGRAMS[program].items():
        assert name not in known, f"{name} is a setting here too"
        assert setting.ours or setting.note, name
        assert setting.ours is None or setting.ours in known, name
        if setting.ours and setting.values:
            assert isinstance(setting.values, dict)
            for value in setting.values.values():
                if value is not None:
                    others = {"init": "loftq"} if setting.ours == "quantize" else {}
                    kind = TrainConfig if setting.ours in setting_names(TrainConfig) else FuseConfig
                    configure(kind, {setting.ours: value} | others)


def test_another_commands_setting_is_told():
    with pytest.raises(
        ConfigError, match="--lora-alpha is --alpha here, which this command does not have"
    ):
        parse(GenerateConfig, Switches, ["--lora-alpha", "8"], "mlx_loraplus.generate")
    config = parse(GenerateConfig, Switches, ["--temp", "0.5"], "mlx_loraplus.generate")[0]
    assert config.temperature == 0.5


def test_translated_settings_count_as_given(tmp_path: Path):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"save_every": 5}))
    words = ["--lora-alpha", "8", "-c", str(tmp_path / "x.yaml"), "--seed", "1"]
    assert given_names(TrainConfig, words) == {"alpha", "steps_per_save", "seed"}
