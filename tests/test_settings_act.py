"""Every accepted setting acts: with another value a run, an answer or a fused model is another one, to the bit.

A new setting has no entry here, and its test fails until it gets one: another value, beside what it
needs to matter, or the name of a test of it where what it does is not seen from outside.
"""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx_loraplus as ml  # isort: skip  before mlx
import mlx.nn as nn
import pytest
from mlx_lm.utils import save_config, save_model

from mlx_loraplus import chat, fuse, generate
from mlx_loraplus.command_config import (
    ChatConfig,
    CompareConfig,
    DoctorConfig,
    ExportConfig,
    FuseConfig,
    GenerateConfig,
    ServeConfig,
    SweepConfig,
)
from mlx_loraplus.config import ObjectiveConfig, TrainConfig
from mlx_loraplus.export.fuse import quantization_of
from mlx_loraplus.models.loading import load_folder
from mlx_loraplus.settings import setting_names
from scripts.tiny_model import write_sums, write_tiny_model
from tests.conftest import same
from tests.training.tiny_runs import TIMES, Place, adapter_of, write_labeled, write_pairs

TESTS = Path(__file__).parent
PLAIN = {"iters": 4, "steps_per_eval": 4, "sample_rows": 0, "learning_rate": 1e-2}
PAIRED = {"objective": "dpo", "data": "pairs"}
QUANTIZED = {"init": "pissa", "quantize": 4}

# setting: another value, what both runs have beside it. Or the file and the test that show what it
# does.
RUN: dict[str, tuple[Any, dict[str, Any]] | str] = {
    "model": ("other-model", {}),
    "adapter_path": ("elsewhere", {}),
    "resume_adapter_file": ("before", {}),
    "resume": (True, {"adapter_path": "before", "iters": 5}),
    "overwrite": (True, {"adapter_path": "before"}),
    "iters": (3, {}),
    "epochs": (0.5, {"iters": None}),
    "grad_accumulation_steps": (2, {}),
    "grad_checkpoint": ("on", {}),
    "compile": "test_interrupts.py::test_a_batch_that_is_not_finite_is_skipped_and_counted",
    "selfcheck": "test_step_choices.py::test_a_wrong_gradient_stops_the_run_before_it_starts",
    "parallel": "test_tensor.py::test_two_are_as_one",
    "distributed_timeout": "test_distributed.py::test_the_others_stop_with_a_checkpoint_where_one_is_lost",
    "steps_per_report": (4, {}),
    "steps_per_eval": (1, {}),
    "steps_per_save": (1, {}),
    "keep_checkpoints": (1, {}),
    "on_save_error": "test_lost_disks.py::test_a_full_disk_keeps_the_older_checkpoint",
    "patience": (
        1,
        {"iters": 12, "steps_per_eval": 1, "learning_rate": 2.0, "schedule": "constant"},
    ),
    "max_minutes": (1e-9, {}),
    "max_skipped_steps": (
        "test_interrupts.py::test_too_many_in_a_row_stop_with_a_checkpoint_and_the_batch"
    ),
    "seed": (1, {}),
    "sample_rows": (1, {}),
    "prompts": (["1 + 1 ="], {}),
    "report_to": (["tensorboard"], {}),
    "adapter": ("dora", {}),
    "init": ("init2", {}),
    "rank": (4, {}),
    "alpha": (8.0, {}),
    "rslora": (True, {}),
    "dropout": (0.5, {}),
    "target_modules": (["q_proj"], {}),
    "train_modules": (["norms"], {}),
    "num_layers": (1, {}),
    "quantize": (4, {"init": "pissa"}),
    "quantize_group_size": (32, QUANTIZED),
    "loftq_iters": (1, {"init": "loftq"}),
    "svd": ("exact", QUANTIZED),
    "optimizer": ("lion", {}),
    "learning_rate": (2e-2, {}),
    "lr_ratio": (1, {}),
    "magnitude_lr_ratio": (4, {"adapter": "dora"}),
    "embedding_learning_rate": (1e-3, {"train_modules": ["norms"]}),
    "weight_decay": (0.5, {}),
    "schedule": ("constant", {}),
    "warmup": (3, {}),
    "max_grad_norm": (1e-3, {}),
    "objective": ("dpo", PAIRED | {"objective": "ipo"}),
    "beta": (0.5, PAIRED),
    "label_smoothing": (0.2, PAIRED),
    "simpo_gamma": (0.5, PAIRED | {"objective": "simpo"}),
    "orpo_lambda": (0.5, PAIRED | {"objective": "orpo"}),
    "kto_weights": ([1, 3], {"objective": "kto", "data": "labeled"}),
    "reference": (
        "start",
        PAIRED | {"resume_adapter_file": "before", "dropout": 0.1},
    ),
    "data": ("other-data", {}),
    "data_weights": ([1, 0.25], {"data": ["data", "other-data"]}),
    "fields": (["prompt=completion", "completion=prompt"], {}),
    "valid_split": (0.5, {"data": "data/train.jsonl"}),
    "on_bad": ("drop", {"data": "bad-data"}),
    "on_long": ("drop", {"max_seq_length": 14}),
    "train_on": ("everything", {}),
    "batch_size": (2, {}),
    "max_seq_length": (14, {}),
    "pack": (True, {}),
}
GENERATE = {
    "model": (["other-model"], []),
    "adapter_path": (["before"], []),
    "max_tokens": (["9"], []),
    "temperature": (["5"], []),
    "seed": (["1"], ["--temperature", "5"]),
    "prompt": (["7 + 8 ="], []),
    "chat": ("--no-chat", ["--model", "chat-model"]),
    "system": (["Be brief."], []),
    "tools": (["tools.json"], ["--model", "tools-model"]),
}
FUSE = {
    "model": (["model"], []),
    "adapter_path": (["small-run:0.5"], []),
    "save_path": (["elsewhere"], []),
    "bits": (["8"], []),
    "dequantize": ("--dequantize", []),
    "keep_vision": "test_vision.py::test_the_vision_tower_stays_as_it_was",
    "data": (["other-data"], []),
    "sample_tokens": (["40"], []),
    "overwrite": ("--overwrite", ["--save-path", "full"]),
}
SWEEP = {
    "model": ("other-model", {}),
    "adapter_path": ("elsewhere", {}),
    "resume_adapter_file": ("before", {}),
    "learning_rates": ([1e-3], {}),
    "lr_ratios": ([2], {}),
    "ranks": ([2], {}),
    "alphas": ([8], {}),
    "iters": (2, {}),
    "rounds": (2, {"lr_ratios": [1, 2, 4, 8]}),
    "seeds": (2, {}),
    "valid_rows": (1, {}),
    "grad_accumulation_steps": (2, {}),
    "max_minutes": (1e-9, {}),
    "seed": (1, {}),
    "resume": (True, {"adapter_path": "swept"}),
    "overwrite": (True, {"adapter_path": "swept"}),
} | {name: RUN[name] for name in setting_names(ObjectiveConfig)}
OUTSIDE = {
    CompareConfig: dict.fromkeys(
        ("runs", "save_path", "overwrite"), "test_compare.py::test_the_command"
    ),
    ServeConfig: dict.fromkeys(
        ("folder", "host", "port", "token"), "test_server.py::test_the_command"
    ),
    DoctorConfig: {
        "model": "test_doctor.py::test_the_tables_of_a_model",
        "save_path": "test_doctor.py::test_where_the_page_can_t_be_saved",
        "overwrite": "test_doctor.py::test_where_the_page_can_t_be_saved",
    },
    ExportConfig: (
        dict.fromkeys(
            ("to", "from_", "model", "adapter_path", "save_path"),
            "test_export_command.py::test_out_and_back",
        )
        | {
            "merged": "test_export_command.py::test_a_whole_model_is_written",
            "repo_id": (
                "test_hub.py::test_the_hub_gets_every_format_and_a_card_and_never_the_token"
            ),
            "overwrite": "test_export_command.py::test_what_is_there_is_kept",
        }
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two models, data of all sorts, and a run."""
    folder = tmp_path_factory.mktemp("settings")
    for name, seed in (("model", 0), ("other-model", 1)):
        write_tiny_model(folder / name, hidden=64, seed=seed)
    shutil.copytree(folder / "model", folder / "chat-model")
    template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    (folder / "chat-model" / "chat_template.jinja").write_text(template)
    shutil.copytree(folder / "model", folder / "tools-model")
    template = "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + template
    (folder / "tools-model" / "chat_template.jinja").write_text(template)
    (folder / "tools.json").write_text('[{"name": "weather forecast"}]')
    for name, seed in (("data", 0), ("other-data", 1), ("bad-data", 0)):
        write_sums(folder / name, seed=seed)
    with (folder / "bad-data" / "train.jsonl").open("a") as file:
        file.write('{"prompt": 1}\n')
    write_pairs(folder / "pairs")
    write_labeled(folder / "labeled")
    place = Place(folder)
    place.run("before", **PLAIN)
    model, _, config = load_folder(folder / "model")
    nn.quantize(model, group_size=32, bits=4)
    shutil.copytree(folder / "model", folder / "small-model")
    save_model(folder / "small-model", model)
    save_config(
        config | {"quantization": quantization_of(model)}, folder / "small-model" / "config.json"
    )
    place.run("small-run", **PLAIN, model=str(folder / "small-model"))
    return place


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    """What was seen of runs, sweeps and fused models without the other value, by their settings."""
    return {}


def found(place: Place, settings: dict[str, Any], home: Path) -> dict[str, Any]:
    """Return settings with the names of models and data as paths, and of what is written as paths in ``home``."""
    paths = settings.copy()
    for name in {"model", "data", "resume_adapter_file", "adapter_path"} & settings.keys():
        folder = home if name == "adapter_path" else place.folder
        value = settings[name]
        paths[name] = (
            [str(folder / one) for one in value] if isinstance(value, list) else str(folder / value)
        )
    return paths


def run_of(place: Place, settings: dict[str, Any], home: Path) -> tuple[Any, ...]:
    """Return what can be seen of a run: its adapter, its history without times, its files, or its refusal."""
    shutil.copytree(place.folder / "before", home / "before")
    settings = found(place, PLAIN | {"adapter_path": "run"} | settings, home)
    try:
        run = place.run(settings.pop("adapter_path"), **settings)
    except ml.LoRAPlusError as error:
        return type(error).__name__, None
    history = [
        {key: value for key, value in event.items() if key not in TIMES} for event in run.history
    ]
    files = sorted(
        str(path.relative_to(home)) for path in home.rglob("*") if "tfevents" not in path.name
    )
    plan = [re.sub(r"\d+", "", line) for line in place.told if "checkpointing" in line]
    return adapter_of(run), [json.dumps(history), files, run.outcome, plan]


def answer_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    generate.main(words)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", setting_names(TrainConfig))
def test_every_setting_of_a_run_acts(
    place: Place, before: dict[str, Any], tmp_path: Path, name: str
):
    if isinstance(RUN[name], str):
        check_named(name, RUN[name])
        return
    value, beside = RUN[name]
    key = json.dumps(beside)
    if key not in before:
        before[key] = run_of(place, beside, tmp_path / "a")
    adapter, seen = before[key]
    other, also_seen = run_of(place, beside | {name: value}, tmp_path / "b")
    assert seen != also_seen or not (isinstance(adapter, str) or same(adapter, other))


@pytest.mark.parametrize(
    "name", [name for name in setting_names(SweepConfig) if name not in RUN or name in SWEEP]
)
def test_every_setting_of_a_sweep_acts(
    place: Place, before: dict[str, Any], tmp_path: Path, name: str
):
    value, beside = SWEEP[name]
    plain = {
        "model": "model", "data": "data", "adapter_path": "sweep", "learning_rates": [1e-2], "lr_ratios": [4],
        "iters": 3, "rounds": 1, "seeds": 1, "batch_size": 2, "warmup": 0,
    }  # fmt: skip

    def sweep_of(settings: dict[str, Any], home: Path) -> Any:
        settings = found(place, plain | settings, home)
        model, tokenizer = ml.load(settings["model"])
        if beside.get("adapter_path"):
            ml.sweep_rates(model, tokenizer, **found(place, plain | beside, home))
        try:
            sweep = ml.sweep_rates(model, tokenizer, **settings)
        except ml.LoRAPlusError as error:
            return type(error).__name__
        trials = [(trial.point, trial.steps, trial.seed, trial.loss) for trial in sweep.trials]
        return (
            trials,
            sweep.outcome,
            sorted(str(path.relative_to(home)) for path in home.rglob("*")),
        )

    key = f"sweep {json.dumps(beside)}"
    if key not in before:
        before[key] = sweep_of(beside, tmp_path / "a")
    assert before[key] != sweep_of(beside | {name: value}, tmp_path / "b")


def words_of(place: Place, home: Path, words: list[str]) -> list[str]:
    """Return words with the names of what is in ``place`` as its paths, and others of folders as paths in ``home``."""
    return [
        str(place.folder / word) if (place.folder / word.split(":")[0]).exists()
        else str(home / word) if word in ("elsewhere", "full", "out") else word
        for word in words
    ]  # fmt: skip


@pytest.mark.parametrize("name", setting_names(GenerateConfig))
def test_every_setting_of_an_answer_acts(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
):
    value, beside = GENERATE[name]
    flag = [value] if isinstance(value, str) else [f"--{name.replace('_', '-')}", *value]
    plain = ["--model", "model", "--max-tokens", "5", "--prompt", "1 + 2 ="]
    answers = [
        answer_of(words_of(place, tmp_path, plain + beside + more), capsys) for more in ([], flag)
    ]
    assert answers[0] != answers[1]
    if name not in setting_names(ChatConfig):
        return
    talks = []
    for more in ([], flag):
        monkeypatch.setattr("sys.stdin", io.StringIO("1 + 2 =\n"))
        chat.main(words_of(place, tmp_path, plain[:4] + beside + more))
        talks.append(capsys.readouterr().out)
    assert talks[0] != talks[1]


@pytest.mark.parametrize("name", setting_names(FuseConfig))
def test_every_setting_of_a_fuse_acts(
    place: Place,
    before: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
):
    if isinstance(FUSE[name], str):
        check_named(name, FUSE[name])
        return
    value, beside = FUSE[name]
    flag = [value] if isinstance(value, str) else [f"--{name.replace('_', '-')}", *value]
    plain = [
        "--model",
        "small-model",
        "--adapter-path",
        "small-run",
        "--save-path",
        "out",
        "--data",
        "data",
    ]

    def fuse_in(home: Path, more: list[str]) -> Any:
        (home / "full").mkdir(parents=True)
        (home / "full" / "file").write_text("precious")
        try:
            fuse.main(words_of(place, home, plain + beside + more))
        except SystemExit:
            capsys.readouterr()
        said = capsys.readouterr().out.replace(str(home), "")
        return said, sorted(str(path.relative_to(home)) for path in home.rglob("*"))

    key = f"fuse {json.dumps(beside)}"
    if key not in before:
        before[key] = fuse_in(tmp_path / "a", [])
    assert before[key] != fuse_in(tmp_path / "b", flag)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in OUTSIDE for name in setting_names(kind)]
)
def test_every_setting_of_other_commands_is_tested(kind: type, name: str):
    check_named(name, OUTSIDE[kind][name])


def check_named(setting: str, test: str) -> None:
    """Check that the test is there and that its file gives the setting."""
    file, function = test.split("::")
    (path,) = TESTS.rglob(file)
    text = path.read_text(encoding="utf-8")
    assert f"def {function}(" in text, test
    plain = setting.rstrip("_")
    assert plain in text or f"--{plain.replace('_', '-')}" in text, (
        f"{test} does not give {setting}"
    )
