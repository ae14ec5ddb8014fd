"""One source of truth: flags, YAML, keyword arguments and defaults are the same settings."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_loraplus import ConfigError
from mlx_loraplus.arguments import Switches, parse
from mlx_loraplus.command_config import (
    CompareConfig,
    DoctorConfig,
    ExportConfig,
    FuseConfig,
    GenerateConfig,
)
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.settings import configure, setting_names, settings_of

KINDS = [TrainConfig, GenerateConfig, FuseConfig]


def read(*words: str) -> TrainConfig:
    return parse(TrainConfig, Switches, words, "mlx_loraplus.train")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_round_trip(kind: type):
    config = configure(kind, {})
    assert configure(kind, settings_of(config)) == config
    assert set(settings_of(config)) == set(setting_names(kind))
    assert len(setting_names(kind)) == len(set(setting_names(kind)))


def test_a_flag_beats_yaml_which_beats_the_default(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("rank: 4\nlr_ratio: 2\n")
    config = read("-c", str(file), "--rank", "32")
    assert (config.adapter.rank, config.optimizer.lr_ratio, config.adapter.alpha) == (32, 2.0, 16.0)
    assert read(f"--config={file}").adapter.rank == 4


def test_defaults_follow_the_adapter_and_its_start_unless_given(tmp_path: Path):
    assert [read().optimizer.learning_rate, read().optimizer.lr_ratio, read().adapter.rank] == [
        5e-4,
        4.0,
        8,
    ]
    assert [read("--lr-ratio", ratio).optimizer.learning_rate for ratio in ("1", "16")] == [
        1e-3,
        2.5e-4,
    ]
    assert read("--lr-ratio", "16", "--learning-rate", "1e-4").optimizer.learning_rate == 1e-4
    assert read("--adapter", "vera").adapter.rank == 256
    assert read("--adapter", "vera", "--rank", "8").adapter.rank == 8
    pissa = read("--init", "pissa").optimizer
    assert pissa.learning_rate == 2e-5
    assert read("--init", "pissa", "--learning-rate", "2e-4").optimizer == dataclasses.replace(
        pissa, learning_rate=2e-4
    )
    file = tmp_path / "run.yaml"
    file.write_text("init: pissa\nquantize: 4\nlr_ratio: 3\n")  # a bare 4 is a number in YAML
    config = read("-c", str(file))
    assert (config.adapter.quantize, config.optimizer.learning_rate, config.optimizer.lr_ratio) == (
        "4",
        2.31e-5,
        3.0,
    )
    file.write_text("init: pissa\nadapter: vera\n")  # at odds in the file alone
    assert read("-c", str(file), "--adapter", "lora").adapter.init == "pissa"


def test_how_a_base_is_quantized():
    def quantization(*words: str) -> dict | None:
        return read(*words).adapter.quantization

    assert quantization() is None
    assert quantization("--init", "pissa") is None
    assert quantization("--init", "loftq") == {"mode": "affine", "bits": 4, "group_size": 64}
    assert quantization("--init", "pissa", "--quantize", "2", "--quantize-group-size", "128") == {
        "mode": "affine",
        "bits": 2,
        "group_size": 128,
    }
    assert quantization("--init", "loftq", "--quantize", "nvfp4") == {
        "mode": "nvfp4",
        "bits": 4,
        "group_size": 16,
    }


def test_print_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from mlx_loraplus.train import main

    words = [
        "--rank",
        "4",
        "--target-modules",
        "q_proj",
        "v_proj",
        "--train-on",
        "last",
        "--data",
        "a",
        "b",
        "--fields",
        "prompt=q",
        "completion=a",
    ]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print-config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["target_modules"] == ["q_proj", "v_proj"]
    file = tmp_path / "run.yaml"
    file.write_text(printed)
    assert read("-c", str(file)) == read(*words)


def test_prompts_full_of_brackets_are_read_again(tmp_path: Path):
    prompts = [json.dumps({"rows": [{"a": [1, {"b": number}]}]}) for number in range(50)] + 50 * [
        "unclosed {["
    ]
    config = configure(TrainConfig, {"prompts": prompts})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings_of(config)))
    assert read("-c", str(tmp_path / "run.yaml")) == config


def test_the_flags_of_mlx_lm_keep_their_names():
    flags = {name.replace("_", "-") for kind in KINDS for name in setting_names(kind)}
    wanted = """
        model data adapter-path iters batch-size learning-rate num-layers max-seq-length seed
        grad-checkpoint grad-accumulation-steps steps-per-report steps-per-eval steps-per-save save-path prompt
        max-tokens lr-ratio rank alpha dropout target-modules epochs warmup schedule optimizer weight-decay
        max-grad-norm overwrite
    """
    assert flags >= set(wanted.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lr-ratio", "sixteen"], "--lr-ratio takes a number, not 'sixteen'"),
        (["--batch-size", "x"], "--batch-size takes a whole number or auto, not 'x'"),
        (["--report-to", "wand"], "--report-to"),
        (["--max-minutes", "long"], "--max-minutes takes a number, not 'long'"),
        (
            ["--data-weights", "much", "1"],
            "--data-weights takes numbers with spaces between them, not 'much', '1'",
        ),
        (["--lr-ration", "4"], "'--lr-ration' is not a flag (did you mean '--lr-ratio'"),
        (["--batch-size", "0"], "--batch-size must be greater than or equal to 1 or 'auto', not 0"),
        (["--rank", "0"], "rank must be greater than or equal to 1, not 0"),
        (["--rank", "x"], "--rank"),
        (["--rank", "0", "--lr-ratio", "-1"], "; --lr-ratio must be greater than 0, not -1.0"),
        (["--lr-ratio", "0"], "--lr-ratio must be greater than 0"),
        (["--learning-rate", "0"], "--learning-rate must be greater than 0"),
        (["--seed", "-1"], "seed must be greater than or equal to 0"),
        (["--seed", str(2**64)], "seed must be less than"),
        (["--iters", str(2**63)], "iters must be less than"),
        (["--warmup", str(2**63)], "warmup must be less than"),
        (["--epochs", "1e300"], "epochs must be less than or equal to 1000000000"),
        (["--epochs", "nan"], "epochs must be"),
        (["--learning-rate", "nan"], "--learning-rate must be"),
        (["--learning-rate", "inf"], "--learning-rate must be"),
        (["--optimizer", "adm"], "adam, adamw, lion, muon, sgd"),
        (["--iters", "5", "--epochs", "1"], "--iters and --epochs both say how long to train"),
        (
            ["--optimizer", "adam", "--weight-decay", "0.1"],
            "--optimizer adam has no --weight-decay: use adamw",
        ),
        (
            ["--optimizer", "muon", "--adapter", "vera"],
            "vera trains only vectors, which muon steps as adamw does: use --optimizer adamw",
        ),
        (["--num-layers", "0"], "--num-layers must be -1 (all blocks) or at least 1"),
        (["--dropout", "1"], "dropout must be less than 1"),
        (
            ["--adapter", "vera", "--init", "pissa"],
            "vera has no --init pissa: its A and B stay random",
        ),
        (["--adapter", "vera", "--rslora"], "vera has no scale: leave --rslora out"),
        (["--adapter", "vera", "--alpha", "8"], "vera has no scale"),
        (["--adapter", "dara"], "dora, full, lora, vera"),
        (
            ["--quantize", "4"],
            "--quantize is for --init pissa and loftq, not init1: load a quantized model instead",
        ),
        (["--init", "loftq", "--quantize", "7"], "--quantize"),
        (
            ["--init", "loftq", "--quantize", "mxfp4", "--quantize-group-size", "32"],
            "--quantize-group-size is for --init",
        ),
        (
            ["--init", "pissa", "--quantize-group-size", "32"],
            "--quantize-group-size is for --init pissa or loftq with",
        ),
        (["--init", "pissa", "--loftq-iters", "3"], "--loftq-iters is for --init loftq, not pissa"),
        (["--svd", "exact"], "--svd is for --init pissa and loftq, not init1"),
        (["--magnitude-lr-ratio", "16"], "--magnitude-lr-ratio is for --adapter dora"),
        (
            ["--init", "init2", "--adapter", "vera", "--svd", "exact"],
            "; --svd is for --init pissa and loftq, not init2",
        ),
        (["--train-on", "all"], "everything, last, turns"),
        (["--data", "a", "b", "--data-weights", "1"], "--data-weights has 1 value for 2 data sets"),
        (["--valid-split", "1"], "--valid-split must be less than 1"),
        (["stray"], "unexpected argument 'stray'"),
        (
            ["-c", "nowhere.yaml"],
            "there is no file nowhere.yaml: give the path of a YAML file of settings",
        ),
    ],
)
def test_bad_flags_are_one_line(words: list[str], told: str):
    with pytest.raises(ConfigError) as error:
        read(*words)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("rnak: 4", "rnak is not a setting (did you mean 'rank'"),
        ("rank: four", "rank must be a valid integer"),
        ("- rank", "must hold settings, one `name: value` a line"),
        ("rank: [", "is not YAML"),
        ("1: 2", "must hold settings"),
        ("data: {a: [1]}", "'data' must be one value, a list of values"),
        ("data: {train: folder}", "data must be a list of values, not {'train': 'folder'}"),
        ("micro_batch_size: 2\niters:\nlocal_rank:", "iters has no value, in line 2"),
        ("prompts: {a: b}", "prompts must be a list of values, not {'a': 'b'}"),
    ],
)
def test_a_bad_yaml_file_is_one_line(tmp_path: Path, content: str, told: str):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        read("-c", str(file))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_switches_take_yamls_truth_values_and_mlx_lms_bare_flag(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("compile: off\ngrad_checkpoint: true\n")
    config = read("-c", str(tmp_path / "run.yaml"))
    assert (config.compile, config.grad_checkpoint) == ("off", "on")
    config = read("--grad-checkpoint", "--rank", "4")
    assert (config.grad_checkpoint, config.adapter.rank) == ("on", 4)
    assert read("--grad-checkpoint", "off").grad_checkpoint == "off"
    assert read().grad_checkpoint == "auto"
    assert read("--grad-checkpoint").grad_checkpoint == "on"


def test_a_yaml_file_without_settings_is_refused(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"run\.yaml is empty: write settings"):
        read("-c", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rank: 4\niters:\n", "iters has no value, in line 2: write one after the colon"),
        ("iters: # 300\nrank: 4\n", "iters has no value, in line 1"),
        ("lora_parameters:\n  rank:\n", "rank has no value, in line 2"),
        ("model: tiny\nrank 8\n", "run.yaml:2: 'rank 8' is not a setting, which has a colon and a space after its name: write rank: 8"),
        ("model tiny\nrank: 8\n", "run.yaml:1: 'model tiny' is not a setting"),
        ("model: tiny\nrank:8\nalpha: 2\n", "run.yaml:2: 'rank:8' is not a setting"),
        ("rank = 8\n", "write rank: 8"),
        ("model: tiny\n rank: 8\n", "run.yaml:2: 'rank: 8' can't be read: begin the line without spaces"),
        ("prompts: Say: hi\n", "run.yaml:1: 'prompts: Say: hi' can't be read: put quotes around a value with a colon"),
        ("prompts:\n  - a\n  - rank 8\nrank 9\n", "run.yaml:4: 'rank 9' is not a setting"),
    ],
)  # fmt: skip
def test_the_line_that_is_wrong_is_named(text: str, told: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read("-c", str(tmp_path / "run.yaml"))
    assert told in str(error.value)


def test_null_is_a_value_that_may_be_written(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("rank: null\niters: ~\n")
    assert read("-c", str(tmp_path / "run.yaml")) == configure(TrainConfig, {})


def test_data_is_one_name_or_several_and_fields_may_be_a_mapping(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("data: folder\nfields: {prompt: q, completion: a}\n")
    config = read("-c", str(tmp_path / "run.yaml"))
    assert config.data.data == ("folder",)
    assert config.data.fields == ("prompt=q", "completion=a")
    assert (
        configure(TrainConfig, {"data": None}).data.data
        == configure(TrainConfig, {}).data.data
        == ()
    )
    assert read("--data", "a", "b", "--data-weights", "1", "0.5").data.data_weights == (1.0, 0.5)


def test_configs_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        configure(TrainConfig, {}).seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_home_folder_is_meant_in_every_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = configure(
        TrainConfig, {"adapter_path": "~/run", "model": "~/m", "data": ["~/a", "org/b"]}
    )
    assert (config.adapter_path, config.model, config.data.data) == (
        "/home/me/run",
        "/home/me/m",
        ("/home/me/a", "org/b"),
    )
    assert configure(FuseConfig, {"adapter_path": ["~/a:0.7"]}).adapter_path == ("/home/me/a:0.7",)
    for kind in (FuseConfig, ExportConfig, CompareConfig, DoctorConfig):
        assert configure(kind, {"save_path": "~/out"}).save_path == "/home/me/out"


@pytest.mark.parametrize(
    "path", ["", " run", "run\n", "a\0b", "x" * 256, "y/" * 600, "~nosuchuser/x", "$NOWHERE/run",
             "runs/$NOWHERE/x", "runs/${NOWHERE}x", "r\udcff"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["adapter_path", "model", "resume_adapter_file", "data"])
def test_what_can_not_be_a_path_is_refused_in_a_line(name: str, path: str):
    with pytest.raises(ConfigError, match=f"^{name} must [^\n]*$"):
        configure(TrainConfig, {name: [path] if name == "data" else path})


@pytest.mark.parametrize(
    "given",
    ["q_proj v_proj", "q_proj,v_proj", "q_proj, v_proj", ["q_proj,", "v_proj"], "['q_proj', 'v_proj']"],
)  # fmt: skip
def test_words_in_one_text_are_several(given: Any):
    assert configure(TrainConfig, {"target_modules": given}).adapter.target_modules == (
        "q_proj",
        "v_proj",
    )


_OF_TRAIN = "is a flag of the command mlx_loraplus.train alone: leave it out"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"target_modules": "none"}, "target_modules must have at least 1 item, not 'none'"),
        ({"target_modules": [0]}, "target_modules must be a valid string, not 0"),
        ({"prompts": [1.5]}, "prompts must be a valid string, not 1.5"),
        ({"kto_weights": [1]}, "kto_weights must have 2 values, not [1]"),
        ({"kto_weights": []}, "kto_weights must have 2 values, not []"),
        ({"dryrun": True}, f"dryrun is not a setting (dry_run {_OF_TRAIN})"),
        ({"dry_run": True}, f"dry_run is not a setting (it {_OF_TRAIN})"),
        (
            {"system_prompt": "Be brief."},
            "system_prompt is not a setting: the rows hold system prompts, in a field system or in a message with the role system",
        ),
    ],
)
def test_values_that_are_refused_are_described(setting: dict[str, Any], told: str):
    with pytest.raises(ConfigError) as error:
        configure(TrainConfig, setting)
    assert str(error.value) == told


def test_a_required_setting_that_is_missing_is_told():
    @dataclasses.dataclass
    class Needed:
        folder: str

    with pytest.raises(ConfigError, match=r"^folder must have a value, not "):
        configure(Needed, {})
