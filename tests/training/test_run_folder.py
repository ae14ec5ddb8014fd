"""A run's folder needs nothing else: it names its model, and its paths work from anywhere and after a move."""

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml

import mlx_loraplus as ml
from mlx_loraplus import cli
from mlx_loraplus.adapters.stored_files import model_for
from mlx_loraplus.errors import AdapterError
from mlx_loraplus.models.moved_run_paths import present_path
from scripts.tiny_model import write_tiny_model
from tests.training.tiny_runs import Place


@pytest.fixture
def ended(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    """Make a run whose model and data were given relative to a folder that is left afterwards."""
    monkeypatch.chdir(place.folder)
    place.run("run", model="model", data="data", iters=4)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return place


def error_of(command: str, *words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error line of a command that is refused."""
    with pytest.raises(SystemExit, match="2"):
        cli.COMMANDS[command]([str(word) for word in words])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_the_commands_need_only_the_folder(
    ended: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = str(ended.folder / "run")
    cli.generate([run, "--prompt", "1 + 2 =", "--max-tokens", "4"])
    answer = capsys.readouterr().out
    named = ["--model", str(ended.folder / "model"), "--adapter-path", run]
    cli.generate(["--prompt", "1 + 2 =", "--max-tokens", "4", *named])
    assert capsys.readouterr().out == answer

    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 2 =\n"))
    cli.chat(["--max-tokens", "4", run])
    assert "adapter: " in capsys.readouterr().out

    cli.fuse([run, "--save-path", "fused", "--sample-tokens", "8"])
    cli.export([run, "--to", "peft", "--save-path", "as_peft"])
    cli.export(["--to", "gguf", run, "--save-path", "as_gguf"])
    for made in (
        "fused/model.safetensors",
        "as_peft/adapter_model.safetensors",
        "as_gguf/adapter.gguf",
    ):
        assert Path(made).is_file()


def test_python_loads_a_run(ended: Place):
    run = ml.Run.load(ended.folder / "run")
    model, tokenizer = ml.load(run)
    other, _ = ml.load(str(ended.folder / "run"))
    alone, _ = ml.load(None, ended.folder / "run")
    answers = {ml.complete(each, tokenizer, "1 +", max_tokens=4) for each in (model, other, alone)}
    assert len(answers) == 1
    assert run.config.model == str(ended.folder / "model")
    assert run.config.data.data == (str(ended.folder / "data"),)


def test_a_run_resumes_from_another_folder(ended: Place, capsys: pytest.CaptureFixture[str]):
    cli.train(["-c", str(ended.folder / "run" / "run.yaml"), "--resume", "--iters", "6"])
    said = capsys.readouterr().out
    assert "finished at step 6" in said
    assert "resume: iters 4 -> 6" in said
    assert "resume: model" not in said
    assert "resume: data" not in said
    assert ml.Run.load(ended.folder / "run").progress.step == 6
    assert not Path("run").exists()


def test_a_run_may_move_with_its_model_and_data(ended: Place, tmp_path: Path):
    (tmp_path / "moved").mkdir()
    for name in ("run", "model", "data"):
        (ended.folder / name).rename(tmp_path / "moved" / name)
    folder = tmp_path / "moved" / "run"
    assert ml.Run.load(folder).config.model == str(tmp_path / "moved" / "model")
    assert model_for(None, folder) == str(tmp_path / "moved" / "model")
    cli.train(["-c", str(folder / "run.yaml"), "--resume", "--iters", "5"])
    assert ml.Run.load(folder).progress.step == 5


def test_a_copy_of_a_run_leaves_the_run_alone(ended: Place):
    shutil.copytree(ended.folder / "run", "copy")
    cli.train(["-c", "copy/run.yaml", "--resume", "--iters", "5"])
    assert ml.Run.load("copy").progress.step == 5
    assert ml.Run.load(ended.folder / "run").progress.step == 4


def test_a_lost_model_is_one_line(ended: Place, capsys: pytest.CaptureFixture[str]):
    (ended.folder / "model").rename(ended.folder / "renamed")
    run = str(ended.folder / "run")
    said = error_of("generate", run, capsys=capsys)
    assert str(ended.folder / "model") in said
    assert "give its new place with --model" in said
    cli.generate([run, "--model", str(ended.folder / "renamed"), "--max-tokens", "2"])


def test_another_model_is_refused_in_one_line(
    ended: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, other = str(ended.folder / "run"), str(tmp_path / "other")
    write_tiny_model(tmp_path / "other", hidden=64)
    for command, words in (("generate", []), ("fuse", []), ("export", ["--to", "peft"])):
        said = error_of(command, run, "--model", other, *words, capsys=capsys)
        assert str(ended.folder / "model") in said
        assert "if you leave out --model" in said
        assert len(said) < 600


def test_confused_folders_get_the_right_advice(ended: Place, capsys: pytest.CaptureFixture[str]):
    run, model = str(ended.folder / "run"), str(ended.folder / "model")
    assert f"--model {model} " in error_of("sweep", "--model", run, capsys=capsys)
    assert f"--resume-adapter-file {run}" in error_of("train", "--model", run, capsys=capsys)
    said = error_of(
        "train", "--resume-adapter-file", model, "--adapter-path", "next", capsys=capsys
    )
    assert f"{model} is a model, not an adapter: give it as --model {model}" in said
    assert "no folder nowhere" in error_of("fuse", "nowhere", capsys=capsys)
    said = error_of("generate", run, "--adapter-path", run, capsys=capsys)
    assert "leave out --adapter-path" in said


def test_adapters_of_mlx_lm_name_their_model(ended: Place):
    """mlx-lm stores its own settings, with the paths as they were given."""
    folder = ended.folder / "stock"
    folder.mkdir()
    for name in ("adapters.safetensors", "adapter_config.json"):
        shutil.copy(ended.folder / "run" / name, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"model": "model", "adapter_path": "stock"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert model_for(None, folder) == str(ended.folder / "model")

    config |= {"model": "org/name"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert model_for(None, folder) == "org/name"

    del config["model"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="which model it belongs to: give --model"):
        model_for(None, folder)


def test_settings_of_older_versions_are_read(ended: Place):
    """They hold paths as they were given, relative to a folder that is not known."""
    path = ended.folder / "run" / "run.yaml"
    settings = yaml.safe_load(path.read_text())
    settings |= {"model": "model", "data": ["data"], "adapter_path": "run"}
    path.write_text(yaml.safe_dump(settings))
    config = ml.Run.load(ended.folder / "run").config
    assert config.model == str(ended.folder / "model")
    assert config.data.data == (str(ended.folder / "data"),)
    cli.train(["-c", str(path), "--resume", "--iters", "5"])


def test_names_that_are_no_paths_stay(tmp_path: Path):
    assert present_path("gemma-3", "/a/run", tmp_path) == "gemma-3"
    assert present_path("org/name", "/a/run", tmp_path) == "org/name"
    assert present_path("/lost/model", "/lost/run", tmp_path) == "/lost/model"


def test_a_single_file_is_enough_for_test_and_prompts(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    """A tenth of its rows is held out, which --test scores; --prompts are answered with it."""
    file = place.folder / "data" / "train.jsonl"
    place.run("single", data=str(file), prompts=["1 + 1 ="])
    run = ml.Run.load(place.folder / "single")
    held_out = run.start["valid"]["examples"]
    assert held_out == len(file.read_text().splitlines()) // 10
    assert [prompt["prompt"] for prompt in run.start["prompts"]] == ["1 + 1 ="]
    assert all(len(answers) == 1 for _, answers in run.losses("answers"))
    assert run.losses("answers")

    cli.train(["--test", "--adapter-path", str(run.folder)])
    said = capsys.readouterr().out
    assert "there are no test rows, so the validation rows are used" in said
    assert f"{held_out} valid examples" in said


def test_without_rows_to_test_the_advice_works(place: Place, capsys: pytest.CaptureFixture[str]):
    folder = place.folder / "few"
    folder.mkdir()
    rows = (place.folder / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:5]))
    run = place.run("few-run", data=str(folder))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        cli.train(["--test", "--adapter-path", str(run.folder)])
    said, error = capsys.readouterr()
    assert "the validation rows are used" not in said
    assert f"error: {folder} has no test rows: add test.jsonl to {folder}" in error

    (folder / "test.jsonl").write_text("".join(rows[5:9]))
    cli.train(["--test", "--adapter-path", str(run.folder)])
    assert "4 test examples" in capsys.readouterr().out


def test_a_run_is_evaluated_with_its_own_model_and_data(
    ended: Place, capsys: pytest.CaptureFixture[str]
):
    cli.train(["--test", "--adapter-path", str(ended.folder / "run"), "--rank", "5"])
    said = capsys.readouterr().out
    assert "6 valid examples" in said
    assert "--test scores the run as it is, so these settings have no effect: rank\n" in said
    (ended.folder / "data" / "valid.jsonl").rename(ended.folder / "data" / "test.jsonl")
    cli.train(["--test", "-c", str(ended.folder / "run" / "run.yaml")])
    said = capsys.readouterr().out
    assert "6 test examples" in said
    assert "no effect" not in said
