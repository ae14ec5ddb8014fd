"""The commands as typed: exit codes, one line of what to do, and nothing written."""

import contextlib
import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_loraplus import __version__, cli, fuse, generate, train
from mlx_loraplus.arguments import command
from mlx_loraplus.command_config import GenerateConfig, SweepConfig
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.help_text import COMMON, GROUPS
from mlx_loraplus.settings import setting_names
from scripts.tiny_model import write_tiny_model

ROW = {"prompt": "2 + 2 =", "completion": " 4"}


def data(folder: Path, *rows: object) -> str:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def fails(main, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ")
    assert len(said) == 1
    return said[0]


def test_bad_data_is_told_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = data(
        tmp_path / "data", ROW, {"prompt": "no completion"}, {"prompt": "", "completion": ""}, [1]
    )
    out = tmp_path / "run"
    said = fails(
        train.main, ["--model", "nowhere", "--data", folder, "--adapter-path", str(out)], capsys
    )
    assert all(place in said for place in ("train.jsonl:2", "train.jsonl:3", "train.jsonl:4"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (
            ["--valid-split", "0.2"],
            "--valid-split holds out training rows, but the data already has",
        ),
        (["--report-to", "wandb"], "--report-to wandb needs its library"),
    ],
)
def test_what_the_data_and_the_machine_lack_is_told_before_a_model_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    wrong: str,
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    folder = data(tmp_path / "data", ROW)
    (tmp_path / "data" / "valid.jsonl").write_text(json.dumps(ROW))
    place = ["--data", folder, "--adapter-path", str(tmp_path / "run")]
    assert wrong in fails(train.main, ["--model", "nowhere", *place, *words], capsys)


@pytest.mark.parametrize("name", ["gema-3", "nowhere/at/all", "missing.gguf"])
def test_an_unknown_model_is_told_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    folder = data(tmp_path / "data", ROW)
    said = fails(
        train.main,
        ["--model", name, "--data", folder, "--adapter-path", str(tmp_path / "run")],
        capsys,
    )
    assert name in said
    assert "gemma-3" in said if name == "gema-3" else True
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["--model", "--data", "--adapter-path", "-c"])
def test_a_name_that_no_file_can_have_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
):
    words = [] if setting == "--data" else ["--data", data(tmp_path / "data", ROW)]
    said = fails(train.main, [*words, setting, "x" * 300], capsys)
    assert "x" * 20 in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "error: give a command\n"),
        (["trian"], "'trian' is not a command (did you mean 'train'"),
    ],
)
def test_the_package_without_a_command_names_its_commands(words: list[str], told: str):
    done = subprocess.run(
        [sys.executable, "-m", "mlx_loraplus", *words], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert told in done.stderr


@pytest.mark.parametrize("words", [["help", "chat"], ["chat", "--help"]])
def test_the_help_of_a_command_has_two_spellings(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    with contextlib.suppress(SystemExit):
        cli.main(words)
    assert "usage: mlx_loraplus chat [RUN]" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["help", "-h", "--help", "--help-all"])
def test_the_help_of_the_package_lists_the_commands(word: str, capsys: pytest.CaptureFixture[str]):
    cli.main([word])
    assert "usage: mlx_loraplus COMMAND" in capsys.readouterr().out


def test_a_folder_with_a_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "adapters.safetensors").write_text("precious")
    said = fails(train.main, ["--adapter-path", str(tmp_path)], capsys)
    assert "--overwrite" in said
    assert (tmp_path / "adapters.safetensors").read_text() == "precious"


def test_a_missing_data_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--data", str(tmp_path / "nowhere"), "--adapter-path", str(tmp_path / "run")]
    assert "nowhere" in fails(train.main, words, capsys)


def test_chat_rows_need_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    chat = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    }
    words = [
        "--model",
        str(write_tiny_model(tmp_path / "model")),
        "--data",
        data(tmp_path / "data", chat),
        "--adapter-path",
        str(tmp_path / "run"),
    ]
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    assert stop.value.code == 2
    assert "chat template" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_generate_and_fuse_need_an_adapter_that_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    nowhere = str(tmp_path / "nowhere")
    for main in (generate.main, fuse.main):
        words = ["--model", "smollm2-135m", "--adapter-path", nowhere]
        if main is fuse.main:
            words += ["--save-path", str(tmp_path / "fused")]
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert f"there is no folder {nowhere}" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    "command", ["train", "generate", "fuse", "export", "compare", "chat", "plan", "sweep"]
)
def test_both_spellings_work(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module = f"mlx_loraplus.{command}"
    script = str(Path(sys.executable).with_name(module))
    monkeypatch.setattr("sys.argv", [module, "--help"])
    said = []
    for run, name in ((runpy.run_path, script), (runpy.run_module, module)):
        for loaded in (module, f"{module}.__main__"):  # as in a new process
            monkeypatch.delitem(sys.modules, loaded, raising=False)
        with pytest.raises(SystemExit, match="0"):
            run(name, run_name="__main__")
        said.append(capsys.readouterr().out)
    assert "--config" in said[0]
    assert said[0] == said[1]


def test_models_are_listed(capsys: pytest.CaptureFixture[str]):
    train.main(["--list-models"])
    listed = capsys.readouterr().out
    assert "gemma-3-27b-it" in listed
    assert "llama-4-scout" in listed


def test_a_device_that_fails_at_any_command_is_one_line(capsys: pytest.CaptureFixture[str]):
    """What no command explains more closely: MLX's error while a model answers or is fused."""
    for text, said in (
        ("[METAL] Command buffer execution failed: Insufficient Memory.", "error: memory ran out"),
        ("[METAL] Command buffer execution failed: Impacting Interactivity.", "caffeinate -i"),
    ):
        with (
            pytest.raises(SystemExit) as stop,
            command("mlx_loraplus.generate", GenerateConfig, ["--prompt", "Hello"]),
        ):
            raise RuntimeError(text)
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert said in line
        assert text in line

    with (
        pytest.raises(RuntimeError, match="a bug"),
        command("mlx_loraplus.generate", GenerateConfig, ["--prompt", "Hello"]),
    ):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    "command", ["train", "sweep", "plan", "generate", "chat", "fuse", "export", "compare", "serve"]
)
def test_help_is_short_and_grouped(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.COMMANDS[command](["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    words = {
        "plan": " [FAMILY ...]", "generate": " [RUN]", "chat": " [RUN]", "export": " [RUN]",
        "fuse": " [RUN ...]", "compare": " [RUNS ...]", "serve": " [FOLDER]",
    }  # fmt: skip
    word = words.get(command, "")
    assert lines[0] == f"usage: mlx_loraplus {command}{word} [--setting value ...]"
    assert not word or f"  {word.strip(' [].')} " in "\n".join(lines)
    if command == "train":
        assert lines[-1].endswith("mlx_loraplus train --help-all")
        assert "adapter:" in lines


@pytest.mark.parametrize(
    ("command", "flag"),
    [("chat", "--run"), ("plan", "--family"), ("compare", "--runs"), ("serve", "--folder=a")],
)
def test_a_word_without_a_flag_is_not_suggested_as_a_flag(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        cli.COMMANDS[command]([flag, "a"])
    assert f"{flag!r} is not a flag: leave it out, and write" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_prints_the_version(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.COMMANDS[command](["--version"])
    assert capsys.readouterr().out == f"mlx_loraplus {__version__}\n"


def test_every_setting_has_one_group():
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    switches = [field.name for field in dataclasses.fields(cli.TrainSwitches)]
    wanted = {*setting_names(TrainConfig), *setting_names(SweepConfig), *switches}
    assert wanted <= set(grouped)
    assert set(COMMON) <= set(grouped)


def test_all_help_shows_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.train(["--help-all"])
    told = capsys.readouterr().out
    for name in setting_names(TrainConfig):
        assert f"--{name.replace('_', '-')}" in told, name
    assert "\nschedule and length:\n" in told
